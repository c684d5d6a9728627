"""The objective of a training step: a weighted sum of terms.

A term is a config dataclass with its weight, and pure functions. A step calls them in this order:

1. `encode`, while a chunk of the batch is encoded: numbers of each pair (such as a caption's loss),
   or a teacher's embeddings.
2. `loss`, once the outputs of the global batch are known (a global term compares them).
3. `update`, after the parameters have changed, for a term that carries a state of its own.

Embeddings and the results of `encode` are kept for the global batch; all other outputs of the
towers exist only while their chunk is encoded. So any term works with gradient accumulation.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from clip_jax.errors import InputError
from clip_jax.models.clip import CLIP, CLIPConfig, Params
from clip_jax.models.inputs import Input
from clip_jax.models.layers import Operations
from clip_jax.models.outputs import output
from clip_jax.parts import Part

Inputs = dict[str, Any]  # the batch by name: "image", "text", and further inputs of terms
Outputs = dict[str, Float[Array, "B ..."]]
Metrics = dict[str, Any]  # name -> scalar
Result = tuple[Float[Array, ""], Metrics]
AnyMesh = Mesh | AbstractMesh  # an abstract one is that of a trace, which runs nothing

# Metrics of the step itself, whose names no term's metric takes.
OF_STEP = frozenset(
    {"loss", "grad_norm", "param_norm", "logit_scale", "learning_rate"}
    | {"skipped_updates", "skipped_in_a_row", "full_padding"}
)


AVERAGE = "moving_average"  # the averages' name among what a state carries


class Axes(NamedTuple):
    """The mesh axes that split the rows of a batch, a kernel's width, and its vocabulary."""

    rows: tuple[str, ...]
    width: str
    vocabulary: str


class Frozen(NamedTuple):
    """A model that a term uses and nothing trains, such as a teacher."""

    config: CLIPConfig  # its dtype is also that of the parameters in memory
    weights: str  # path of a run, a model folder or a weight file
    texts: int = 1  # number of texts that it encodes with each image, for FLOPs


class Parameter(NamedTuple):
    """A trainable array of a term."""

    shape: tuple[int, ...]
    dims: str  # the names of its dimensions, as in `models.layers`
    std: float | None = None  # of its first values, drawn from N(0, std²); None: 1 / √shape[0]
    in_loss: bool = False  # whether `loss` takes it; else `encode` does


class Pass(NamedTuple):
    """A further pass of a tower over each sample in one step, for FLOPs."""

    operations: Operations  # forward
    is_trained: bool = True  # forward and backward; else forward alone, as by an average


@dataclass(frozen=True)
class Context:
    """The input of a term's functions: for one chunk in `encode`, else for the global batch."""

    model: CLIP  # with the mesh's layout; `replace(model, config=...)` is another model with it
    # In `loss` only those of no tower, `logit_scale` and `logit_bias`, and `Parameter.in_loss`.
    params: Params
    inputs: Inputs
    outputs: Outputs  # of the towers, and of the term's own `encode`
    mesh: AnyMesh
    axes: Axes
    frozen: Mapping[str, Params] = field(default_factory=dict)  # by the names of `frozen`
    carried: Any = None  # as `init` or the last `update` returned it
    average: Params = field(default_factory=dict)  # see `Term.averages`
    _results: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        """Return what a function computes, which is computed once for all terms that name it."""
        if name not in self._results:
            self._results[name] = compute()
        return self._results[name]


@dataclass(frozen=True, kw_only=True)
class Term(Part):
    """One term of an objective; a subclass defines the methods that it needs.

    `needs` names outputs of the towers in addition to the L2-normalised embeddings `image` and
    `text`, [B, E], which every term has:

    - `caption_states`: the decoder's states, [B, l, D], which predict `DecoderConfig.labels`.
    - `image_tokens:LAYER`, `text_tokens:LAYER`: states after a block, [B, L, D]; negative layers
      count from the end.
    - `image:INPUT`, `text:INPUT`: embeddings of further images or texts of the batch, by the name
      of the input: several views, synthetic captions.
    """

    name: ClassVar[str] = "term"  # for its metrics and state; unique within an objective
    # Whether it reads the embeddings `image` and `text`. A step in which no term does, and none
    # needs another output of the text tower, leaves that tower out.
    uses_embeddings: ClassVar[bool] = True

    weight: float = 1.0  # Factor on this term in the objective. 0: it is not computed.

    @property
    def needs(self) -> tuple[str, ...]:
        """Outputs of the towers that the term needs, see above."""
        return ()

    def check(self, model: CLIPConfig) -> None:
        """Raise InputError unless the model has what the term needs."""

    def reads(self, model: CLIPConfig) -> dict[str, Input]:
        """Return what the input pipeline makes of each sample for this term, by name in the batch
        (`Context.inputs`)."""
        return {}

    def parameters(self, model: CLIPConfig) -> dict[str, Parameter]:
        """Return the trainable arrays of the term by their paths in `params[NAME]`, such as `map`
        or `head/kernel`. The last name decides about weight decay, as in a tower."""
        return {}

    def averages(self) -> dict[str, float]:
        """Return the decay in (0, 1) of the moving average that the term needs of a part of the
        parameters: of a tower, such as `visual`, or of its own by its name.

        `Context.average` has them. Terms that name the same part share one average. It begins as
        the parameters when the first of these terms does, and each step updates it once.
        """
        return {}

    def frozen(self) -> dict[str, Frozen]:
        """Return the frozen models that the term uses, by name.

        Their parameters are sharded like the model's, and passed to the step; they are never
        saved, decayed or counted as trained.
        """
        return {}

    def init(self, params: Params) -> Any:
        """Return the term's initial state, a tree of arrays that is saved in checkpoints.

        An array whose path ends in a parameter's path is sharded like it; others are replicated.
        """
        return {}

    def encode(self, x: Context) -> Outputs:
        """Compute outputs [B, ...] of one chunk by name. They are differentiated."""
        return {}

    def loss(self, x: Context) -> Result:
        """Compute the term's value for the global batch, not yet weighted, and its metrics."""
        raise NotImplementedError

    def update(self, x: Context) -> Any:
        """Return the term's state for the next step; the context has the updated parameters."""
        return x.carried

    def macs(self, model: CLIPConfig, batch_size: int, locked: Sequence[str]) -> int:
        """Count the multiply-adds of one step, forward and backward, without those of the towers
        and the decoder. `locked` towers take no gradient."""
        return 0

    def passes(self, model: CLIPConfig) -> dict[str, Pass]:
        """Return the passes of the image tower over each sample that `encode` makes itself, by
        name. Terms share those of one name (`Context.once`)."""
        return {}

    def chosen_form(self, model: CLIPConfig, batch_size: int, shards: int) -> str | None:
        """Return the form that is used on so many batch shards, if the term has several."""
        return None


Objective = tuple[Term, ...]


def check(objective: Objective, model: CLIPConfig) -> None:
    """Raise InputError unless the terms fit each other and the model."""
    names = [term.name for term in objective]
    if len(set(names)) < len(names) or not any(term.weight for term in objective):
        raise InputError(
            f"objective has the terms {', '.join(names) or 'none'} with the weights "
            f"{[term.weight for term in objective]}; it must have at least one weight above 0, and "
            "each term only once."
        )
    for term in objective:
        term.check(model)
    reads(objective, model)
    averages(objective)
    writes = any("caption_states" in term.needs for term in objective)
    if writes != (model.decoder is not None):
        wrong = "needs model.decoder" if writes else "does not train model.decoder"
        raise InputError(
            f"the objective ({', '.join(names)}) {wrong}; use a CaptionConfig and a model with a "
            "decoder, or neither."
        )


def fitting(objective: Objective, model: CLIPConfig) -> Objective:
    """Return the objective without terms for a decoder if the model has none."""
    writes = model.decoder is not None
    return tuple(term for term in objective if writes or "caption_states" not in term.needs)


def active(objective: Objective) -> Objective:
    """Return the terms with a weight; a step computes no others."""
    return tuple(term for term in objective if term.weight)


def needs(objective: Objective) -> tuple[str, ...]:
    """Return the outputs of the towers that the terms need besides the embeddings, each once.

    Their order is the same in every process, for each compiles the same program.
    """
    return tuple(dict.fromkeys(name for term in active(objective) for name in term.needs))


def needs_text(objective: Objective, model: CLIPConfig) -> bool:
    """Whether a step encodes texts: captions alone may be trained without the text tower, and an
    image tower may teach itself alone."""
    of_decoder = model.decoder is not None and model.decoder.extends_text
    of_text = any(output(name).tower == "text" for name in needs(objective))
    return of_decoder or of_text or _use_embeddings(objective)


def _use_embeddings(objective: Objective) -> bool:
    """Whether a term uses the embeddings; without any term, they are all that is computed."""
    terms = active(objective)
    return not terms or any(term.uses_embeddings for term in terms)


def idle(objective: Objective, model: CLIPConfig) -> tuple[str, ...]:
    """Return the paths of what no term trains, since the weight of all that would is 0."""
    paths = [term.name for term in objective if not term.weight]
    if model.decoder is not None and "caption_states" not in needs(objective):
        paths += model.decoder.own_paths
    captions_train_text = model.decoder is not None and model.decoder.trains_text
    if not needs_text(objective, model) and not captions_train_text:
        paths.append("text")
    return tuple(paths)


def encode(objective: Objective, x: Context) -> Outputs:
    """Return the outputs of a chunk to keep: embeddings, and the results of the terms.

    Embeddings that no term uses are left out, so that the compiler leaves out what they cost.
    """
    names = {"image", "text"} if _use_embeddings(objective) else set()
    names.update(name for name in needs(objective) if output(name).is_embedding)
    outputs = {name: x.outputs[name] for name in x.outputs if name in names}
    for term in active(objective):
        results = term.encode(_seen_by(term, x))
        outputs |= {f"{term.name}/{name}": y for name, y in results.items()}
    return outputs


def total(objective: Objective, x: Context) -> Result:
    """Return the weighted sum of the terms; of several, each with a weight adds `NAME_loss`.

    Other metrics have the names that their terms give them, or `NAME/METRIC` if several terms have
    the metric.
    """
    results = [(term, *term.loss(_seen_by(term, x))) for term in active(objective)]
    metrics = {}
    if len(objective) > 1:
        metrics = {f"{term.name}_loss": value for term, value, _ in results}
    of_terms = (name for _, _, measured in results for name in measured)
    names = Counter([*OF_STEP, *metrics, *of_terms])
    for term, _, measured in results:
        for name, y in measured.items():
            metrics[name if names[name] == 1 else f"{term.name}/{name}"] = y
    parts = [value if term.weight == 1 else term.weight * value for term, value, _ in results]
    return sum(parts[1:], start=parts[0]), metrics


def reads(objective: Objective, model: CLIPConfig) -> dict[str, Input]:
    """Return what the input pipeline makes of each sample for the terms, by name.

    Raises InputError if two terms mean different inputs by one name.
    """
    inputs: dict[str, Input] = {}
    for term in objective:
        for name, x in term.reads(model).items():
            if inputs.setdefault(name, x) != x:
                raise InputError(
                    f"the objective's term {term.name!r} and an earlier one read different inputs, "
                    f"both by the name {name!r}: {inputs[name]} and {x}. Set the same values in "
                    "both terms; in a term of your own, rename the input in `reads`."
                )
    return inputs


def draw(objective: Objective, model: CLIPConfig, key: Array) -> Params:
    """Draw the terms' own parameters, by the terms' names.

    Each term has a key of its name, so that no two draw equal numbers and none depends on others.
    """
    drawn: dict[str, Array] = {}
    for term in objective:
        term_key = jax.random.fold_in(key, zlib.crc32(term.name.encode()))
        for i, (name, fields) in enumerate(term.parameters(model).items()):
            x = Parameter(*fields)
            std = x.shape[0] ** -0.5 if x.std is None else x.std
            normal = jax.random.normal(jax.random.fold_in(term_key, i), x.shape)
            drawn[f"{term.name}/{name}"] = normal * std
    return unflatten_dict(drawn, sep="/")


def dimensions(objective: Objective, model: CLIPConfig) -> dict[str, str]:
    """Return path → dimension names of all parameters, the model's and the terms'."""
    of_terms = {path: x.dims for path, x in _parameters(objective, model).items()}
    return model.dimensions() | of_terms


def split_params(objective: Objective, model: CLIPConfig, params: Params) -> tuple[Params, Params]:
    """Split parameters into those that `encode` takes and those that `loss` takes: of no tower, or
    marked by their terms. `join_params` undoes it, also for gradients."""
    marked = {path for path, x in _parameters(objective, model).items() if x.in_loss}
    flat = flatten_dict(params, sep="/")
    of_loss = {path: x for path, x in flat.items() if "/" not in path or path in marked}
    others = {path: x for path, x in flat.items() if path not in of_loss}
    return unflatten_dict(others, sep="/"), unflatten_dict(of_loss, sep="/")


def join_params(of_encode: Params, of_loss: Params) -> Params:
    """Join two trees of parameters that have no path in common."""
    flat = flatten_dict(of_encode, sep="/") | flatten_dict(of_loss, sep="/")
    return unflatten_dict(flat, sep="/")


def _parameters(objective: Objective, model: CLIPConfig) -> dict[str, Parameter]:
    return {
        f"{term.name}/{name}": Parameter(*x)
        for term in objective
        for name, x in term.parameters(model).items()
    }


def averages(objective: Objective) -> dict[str, float]:
    """Return the decays of the moving averages that terms need, by the parts of the parameters.

    Raises InputError if two terms need different ones of the same part.
    """
    decays: dict[str, float] = {}
    for term in objective:
        for part, decay in term.averages().items():
            if decays.setdefault(part, decay) != decay:
                raise InputError(
                    f"the objective's term {term.name!r} needs a moving average of {part!r} with "
                    f"decay {decay:g}, and an earlier one with {decays[part]:g}; set the same one."
                )
    return decays


def init(objective: Objective, params: Params) -> dict[str, Any]:
    """Return what a state carries at first: the terms' own states by their names, and the moving
    averages of parameters as `AVERAGE`; without those that are empty."""
    carried = {term.name: term.init(params) for term in objective}
    carried[AVERAGE] = {part: jax.tree.map(jnp.copy, params[part]) for part in averages(objective)}
    return {name: tree for name, tree in carried.items() if tree}


def begin(
    objective: Objective, before: Objective, carried: dict[str, Any], params: Params
) -> dict[str, Any]:
    """Initialise again what belongs to terms that had no weight `before`, and to no others."""
    ran = {term.name for term in active(before)}
    begun = tuple(term for term in active(objective) if term.name not in ran)
    fresh = init(objective, params)
    own = {term.name: fresh[term.name] for term in begun if term.name in fresh}
    kept = averages(active(before))
    of_begun = {part: fresh[AVERAGE][part] for part in averages(begun) if part not in kept}
    if of_begun:
        own[AVERAGE] = carried[AVERAGE] | of_begun
    return carried | own


def update(objective: Objective, x: Context) -> dict[str, Any]:
    """Return what the next step's state carries, from the updated parameters."""
    carrying = [term for term in active(objective) if term.name in x.carried]
    updated = {term.name: term.update(_seen_by(term, x)) for term in carrying}
    decays = averages(active(objective))
    if decays:
        moved = {
            part: jax.tree.map(_moved(decay), x.carried[AVERAGE][part], x.params[part])
            for part, decay in decays.items()
        }
        updated[AVERAGE] = x.carried[AVERAGE] | moved
    return x.carried | updated


def _moved(decay: float) -> Callable[[Array, Array], Array]:
    return lambda average, x: decay * average + (1 - decay) * x


def _seen_by(term: Term, x: Context) -> Context:
    """Return the context with a term's own outputs, frozen parameters and state."""
    prefix = f"{term.name}/"
    outputs = {name.removeprefix(prefix): y for name, y in x.outputs.items()}
    frozen, carried = x.frozen.get(term.name, {}), x.carried.get(term.name)
    average = x.carried.get(AVERAGE, {})
    return replace(x, outputs=outputs, frozen=frozen, carried=carried, average=average)
