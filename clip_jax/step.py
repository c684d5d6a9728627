"""The training state, its initialisation on a mesh, and the training step, a pure function.

`train`, `plan`, `bench` and the tests share them, so all of them compile the same program.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float

from clip_jax import processes, sharding
from clip_jax.data.order.batches import Batch
from clip_jax.errors import InputError
from clip_jax.losses import (
    Axes,
    Context,
    Objective,
    SoftmaxConfig,
    TermConfig,
    cached_value_and_grad,
)
from clip_jax.losses import objective as terms
from clip_jax.losses.accumulation import Gradients, split
from clip_jax.losses.objective import Inputs, Metrics, Outputs
from clip_jax.models import lora as adapters
from clip_jax.models.clip import (
    CLIP,
    CLIPConfig,
    Params,
    join_batch_stats,
    l2_normalize,
    split_batch_stats,
)
from clip_jax.models.initial_key import initial_key
from clip_jax.models.inputs import Input, StoredInput
from clip_jax.models.lora import LoRAConfig
from clip_jax.models.outputs import output
from clip_jax.models.text_lengths import SCOPE, TextLengths
from clip_jax.optim import Muon, OptimConfig, Tower, make_optimizer, schedule
from clip_jax.optim.wrappers import TOWERS, capped, skipped_updates, unless_skipped
from clip_jax.sharding import AnyMesh

FrozenParams = dict[str, dict[str, Params]]  # by the names of the term and of its model
BASE = "lora", "base"  # the names of the frozen weights that adapters change
CAPTIONS = 1  # folded into a pair's key, for its caption
LOCKED = "locked", "towers"  # the names of the locked towers' weights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All values that training carries from step to step; `step` is also the data position."""

    step: Any  # int32 scalar: updates done, and so the number of the next batch
    params: Any  # nested dict, float32: all that is trained
    opt_state: Any  # Optax state
    carried: Any = field(default_factory=dict)  # state of the objective's terms, by term name
    # FrozenParams of the objective's terms, of adapters' base and of locked towers. Checkpoints do
    # not have them; see `losses.Term.frozen`, and `manager.write_locked` for locked towers.
    frozen: Any = field(default_factory=dict)

    def saved(self) -> dict[str, Any]:
        """Return the parts that a checkpoint stores, by name."""
        trees = {"step": self.step, "params": self.params, "opt_state": self.opt_state}
        return trees | ({"carried": self.carried} if self.carried else {})


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Settings that determine an update, apart from the data and the mesh."""

    seed: int = 0  # Random seed of initial parameters and patch dropout; the data has data.seed.
    steps: int = 10_000  # Number of optimizer updates in the whole run.
    batch_size: int = 1_024  # Number of image-text pairs per step over all devices.
    accumulation: int = 1  # Chunks per batch (GradCache); the activations of one are in memory.
    model: CLIPConfig = field(default_factory=CLIPConfig)
    lora: LoRAConfig | None = None  # Low-rank adapters of init_from to train. None: all weights.
    # Tower of init_from whose embeddings are stored with the data (clip-jax prepare --reinforce),
    # so that it is neither trained nor computed. None: both towers are computed.
    stored: Tower | None = None
    # Groups of a batch's texts by length, so that short texts cost less; the results are the same.
    # None: all texts have model.text.context_length tokens, padding included.
    text_lengths: TextLengths | None = None
    objective: tuple[TermConfig, ...] = (SoftmaxConfig(),)  # Losses to minimise, as a weighted sum.
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True, kw_only=True)
class Recipe(StepConfig):
    """A step's settings that fit each other; the schedule of learning rates ends at `steps`."""

    def __post_init__(self) -> None:
        terms.check(self.objective, self.model)
        locked = {TOWERS[tower] for tower in self.optim.locked}
        if {path.split("/")[0] for path in self.dimensions() if "/" in path} <= locked:
            raise InputError(
                f"optim.locked={self.optim.locked} leaves nothing to train but the logit scale: "
                "lock fewer towers, add a ClassifierConfig, or choose other lora.targets."
            )
        if self.lora is not None and isinstance(self.optim.optimizer, Muon):
            raise InputError("Muon does not train adapters (lora): set another optim.optimizer.")
        if self.stored is not None:
            check_stored(self, self.stored)
        check_parts(self, locked)
        if self.text_lengths is not None:
            check_lengths(self, self.text_lengths)

    @property
    def locked(self) -> frozenset[str]:
        """The names in the parameter tree of what locked towers have and nothing trains.

        Adapters (`lora`) have no locked towers of this kind: the towers of their base are frozen. A
        stored tower is in no state.
        """
        locked = [tower for tower in self.optim.locked if tower != self.stored]
        names = {TOWERS[tower] for tower in locked if self.lora is None}
        return frozenset(names | ({"batch_stats"} if "visual" in names else set()))

    def dimensions(self) -> dict[str, str]:
        """Return path → dimension names of everything that is trained."""
        names = terms.dimensions(self.objective, self.model)
        if self.lora is None:
            names = without(self.stored, names)
            return {x: dims for x, dims in names.items() if x.split("/")[0] not in self.locked}
        shapes, model = adapters.shapes(self.model, self.lora), self.model.dimensions()
        of_adapters = {name: dims for name, (_, dims) in shapes.items()}
        return of_adapters | {name: dims for name, dims in names.items() if name not in model}

    def reads(self) -> dict[str, Input]:
        """Return what the input pipeline makes of each sample besides, or instead of, its image and
        text: the inputs of the objective's terms, and the embeddings of a stored tower."""
        inputs = terms.reads(terms.active(self.objective), self.model)
        if self.stored is not None:
            inputs[self.stored] = StoredInput(self.stored, (self.model.embed_dim,))
        return inputs

    @property
    def drops_patches(self) -> bool:
        """Whether the step drops patches, by a random key of each image."""
        return self.model.vision.patch_dropout > 0 and self.stored != "image"

    @property
    def predicts_in_parallel(self) -> bool:
        """Whether the step predicts some captions in parallel, by a random key of each pair."""
        decoder = self.model.decoder
        return decoder is not None and decoder.parallel > 0

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """Build the optimizer of everything that is trained."""
        return make_optimizer(self.optim, self.dimensions(), self.model.layers_from)

    def complete(self, state: "State", params: Params) -> Params:
        """Return the model's parameters, given those that are trained."""
        if self.lora is None:
            return params | locked_of(state)
        return adapters.join(base_of(state), params, self.model, self.lora)


class Program:
    """A recipe on a mesh: shardings, and compiled functions for initialisation and step.

    `state` and `batch` are shapes with shardings (see `shapes`). Nothing is computed or compiled
    before `init` or `step` is called.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        self.recipe, self.mesh = recipe, mesh
        self.model = CLIP(recipe.model)
        self.state, self.batch = shapes(recipe, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        self._learning_rate = schedule(recipe.optim, recipe.steps)
        optimizer = recipe.optimizer()
        self._init = jax.jit(
            functools.partial(init_state, recipe=recipe, optimizer=optimizer),
            out_shardings=replace(shardings, frozen=_only_locked(shardings.frozen)),
        )
        self.step: Any = jax.jit(
            functools.partial(train_step, recipe=recipe, mesh=mesh),
            in_shardings=(shardings, jax.tree.map(lambda x: x.sharding, self.batch)),
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
            compiler_options=processes.compiler_options(mesh.devices.flat[0].platform),
        )

    def init(self, params: Params | None = None, frozen: FrozenParams | None = None) -> State:
        """Initialise the sharded state at random, except for `params`, which are used as they are.

        `frozen` has the parameters of the objective's frozen models (see `losses.Term.frozen`).
        """
        state = self.draw(params)
        return self.with_frozen(state, (frozen or {}) | state.frozen)

    def draw(self, params: Params | None = None) -> State:
        """Initialise like `init`, without frozen models, and with locked towers in float32."""
        return self._init(initial_key(self.recipe.seed), params=params)

    @property
    def locked(self) -> Params:
        """The shapes and shardings of the locked towers' parameters in float32."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding),
            locked_of(self.state),
        )

    def resume(self, saved: dict[str, Any], frozen: FrozenParams | None = None) -> State:
        """Build the state from the content of a checkpoint (see `State.saved`)."""
        return self.with_frozen(State(**saved), frozen)

    def with_frozen(self, state: State, frozen: FrozenParams | None) -> State:
        """Put frozen parameters on the mesh, in their types. They have the shapes of `state`."""

        def put(want: jax.ShapeDtypeStruct, x: Any) -> Array:
            return jax.device_put(x.astype(want.dtype), want.sharding)

        if not frozen:  # there are none, or they follow
            return state
        return replace(state, frozen=jax.tree.map(put, self.state.frozen, frozen))

    def begin(self, state: State, before: Objective) -> State:
        """Initialise again, from the current parameters, what belongs to terms that begin now:
        that had no weight in the objective `before`."""
        trainable, _ = split_batch_stats(state.params)
        begin = functools.partial(terms.begin, self.recipe.objective, before)
        shardings = jax.tree.map(lambda x: x.sharding, self.state.carried)
        carried = jax.jit(begin, out_shardings=shardings)(state.carried, trainable)
        return replace(state, carried=carried)

    def compile(self) -> None:
        """Compile the step now; it then takes only states and batches that are on the mesh."""
        self.step = self.step.lower(self.state, self.batch).compile()

    def put(self, batch: Inputs | Batch, step: float = 0) -> Inputs:
        """Put this process's shard of a batch, or of its NumPy arrays by name, on the mesh.

        The learning rate after `step` steps of the schedule is added as an input: runs that differ
        only in their schedule share one compiled program. `row`, by default the pairs' order here,
        is the place of each pair in the global batch, on which patch dropout depends.
        """
        batch = batch.arrays if isinstance(batch, Batch) else batch
        rows = np.asarray(batch.get("row", np.arange(len(batch["text"]))), np.int32)
        rate = np.float32(self._learning_rate(step))
        values = {**batch, "row": rows, "learning_rate": rate}
        return jax.tree.map(
            lambda x, rows: jax.make_array_from_process_local_data(x.sharding, rows),
            self.batch,
            {name: values[name] for name in self.batch},
        )


def init_state(
    key: Array,
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
    params: Params | None = None,
) -> State:
    """Initialise the state of step 0 at random, except for `params`, which are used as they are.

    Of frozen parameters it has those of locked towers, in float32.
    """
    model, lora = CLIP(recipe.model), recipe.lora
    drawn = model.init(key) if lora is None else adapters.draw(recipe.model, lora, key)
    drawn = without(recipe.stored, drawn)
    params = drawn | terms.draw(recipe.objective, recipe.model, key) | (params or {})
    locked = {name: x for name, x in params.items() if name in recipe.locked}
    params = {name: x for name, x in params.items() if name not in locked}
    trainable, _ = split_batch_stats(params)
    carried = terms.init(recipe.objective, trainable)
    frozen = {LOCKED[0]: {LOCKED[1]: locked}} if locked else {}
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(trainable), carried, frozen)


def of_tower(tower: Tower | None, params: dict[str, Any]) -> dict[str, Any]:
    """Return those parameters, by name or by path, that a tower has; None has none."""
    names = ("visual", "batch_stats") if tower == "image" else (tower,)
    return {name: x for name, x in params.items() if name.split("/")[0] in names}


def without(tower: Tower | None, params: dict[str, Any]) -> dict[str, Any]:
    """Return parameters, by name or by path, without those of a tower."""
    left_out = of_tower(tower, params)
    return {name: x for name, x in params.items() if name not in left_out}


def check_parts(recipe: StepConfig, locked: set[str]) -> None:
    """Raise InputError unless a run trains the parts of the model that terms need to be trained."""
    passes = (x for term in recipe.objective for x in term.passes(recipe.model).values())
    needed = {*terms.averages(recipe.objective)}
    if any(x.is_trained for x in passes):
        needed.add(TOWERS["image"])
    if recipe.lora is None:
        stored = {TOWERS[recipe.stored]} if recipe.stored is not None else set()
        needed &= locked | stored
    if needed:
        raise InputError(
            f"the objective ({', '.join(term.name for term in recipe.objective)}) needs "
            f"{', '.join(map(repr, sorted(needed)))} to be trained, with all its weights: leave "
            "out optim.locked, stored and lora, or the term that needs it."
        )


def check_stored(recipe: StepConfig, tower: Tower) -> None:
    """Raise InputError if a run needs more of a tower than its stored embeddings."""
    objective = recipe.objective
    more = [x for x in terms.needs(objective) if output(x).tower in (tower, "caption")]
    for term in objective:
        stored = any(isinstance(x, StoredInput) for x in term.reads(recipe.model).values())
        if stored or term.frozen():
            more.append(f"{term.name}.teachers")
        if tower == "text" and getattr(term, "mask_same_caption", False):
            more.append(f"{term.name}.mask_same_caption")
    if tower == "image":  # whose tokens every part beside the towers takes
        parts = {path.split("/")[0] for path in recipe.model.dimensions() if "/" in path}
        more += sorted(parts - {"visual", "text", "batch_stats"})
    if recipe.lora is not None:
        more.append("lora")
    if more:
        raise InputError(
            f"stored={tower}: the run has only one stored embedding of each {tower}, and "
            f"{', '.join(more)} needs more. Leave that out, or compute the tower in each step by "
            f"--optim.locked {tower} instead."
        )


def check_lengths(recipe: StepConfig, lengths: TextLengths) -> None:
    """Raise InputError unless texts of these lengths have the embeddings, and all else that a run
    needs, of texts that are padded to the context length."""
    text, needs = recipe.model.text, terms.needs(recipe.objective)
    states = [x for x in needs if output(x).tower != "image" and not output(x).is_embedding]
    wrong, longest = "", lengths.tokens[-1]
    if text.sees_padding:
        wrong = (
            f"the embeddings of this text tower ({type(text).__name__} with text.pool={text.pool}) "
            "depend on the padding, as SigLIP's do, so that texts of another length would have "
            "others"
        )
    elif states:
        wrong = f"the objective needs the states of all tokens ({', '.join(states)})"
    elif recipe.stored == "text":
        wrong = "stored=text reads embeddings and no texts"
    elif longest > text.context_length:
        wrong = f"{longest} tokens are more than model.text.context_length={text.context_length}"
    if wrong:
        raise InputError(
            f"text_lengths.tokens={lengths.tokens} is not possible: {wrong}. Change it, or set "
            "text_lengths to None."
        )


def base_of(state: State) -> Params:
    """Return the frozen weights that adapters change; nothing without adapters."""
    return state.frozen.get(BASE[0], {}).get(BASE[1], {})


def locked_of(state: State) -> Params:
    """Return the parameters of locked towers; nothing if all are trained, or of adapters."""
    return state.frozen.get(LOCKED[0], {}).get(LOCKED[1], {})


def _only_locked(frozen: FrozenParams) -> FrozenParams:
    return {name: trees for name, trees in frozen.items() if name == LOCKED[0]}


def shapes(recipe: Recipe, mesh: AnyMesh) -> tuple[State, Inputs]:
    """Return the shapes of state and batch, with their shardings on the mesh.

    Raises InputError if the mesh cannot split the batch or a parameter evenly.
    """
    sharding.check_batch_size(recipe.batch_size, mesh)
    names = recipe.dimensions()
    optimizer = recipe.optimizer()
    state = jax.eval_shape(functools.partial(init_state, jax.random.key(0), recipe, optimizer))
    state = replace(state, frozen={})
    params = sharding.param_shardings(recipe.model, state.params, mesh, names)
    shardings = State(
        sharding.replicated(mesh),
        params,
        sharding.like_params(state.opt_state, params, mesh),
        sharding.like_params(state.carried, params, mesh, others=sharding.replicated(mesh)),
    )
    frozen = {
        term.name: {name: _frozen(x.config, mesh) for name, x in term.frozen().items()}
        for term in recipe.objective
        if term.frozen()
    }
    if recipe.lora is not None:
        frozen[BASE[0]] = {BASE[1]: _frozen(recipe.model, mesh, kernels_only=True)}
    if recipe.locked:
        every = _frozen(recipe.model, mesh, kernels_only=True)
        locked = {name: tree for name, tree in every.items() if name in recipe.locked}
        frozen[LOCKED[0]] = {LOCKED[1]: locked}
    rows = sharding.batch_sharding(mesh)
    length = recipe.model.text.context_length
    batch: Inputs = {
        "image": recipe.model.vision.image_spec.shapes(recipe.batch_size),
        "text": jax.ShapeDtypeStruct((recipe.batch_size, length), jnp.int32),
    }
    if recipe.drops_patches or recipe.predicts_in_parallel:
        batch["row"] = jax.ShapeDtypeStruct((recipe.batch_size,), jnp.int32)
    for name, x in recipe.reads().items():
        batch[name] = x.shapes(recipe.batch_size)
    batch = jax.tree.map(lambda x: _placed(x, rows), batch)
    batch["learning_rate"] = _placed(
        jax.ShapeDtypeStruct((), jnp.float32), sharding.replicated(mesh)
    )
    return replace(jax.tree.map(_placed, state, shardings), frozen=frozen), batch


def _placed(x: jax.ShapeDtypeStruct, on: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on)


def _frozen(config: CLIPConfig, mesh: AnyMesh, kernels_only: bool = False) -> Params:
    """Return the shapes of frozen parameters, in the type of the model's matmuls: of kernels alone,
    which matmuls round to it anyway, or of all but scalars and BatchNorm's statistics."""
    params = jax.eval_shape(CLIP(config).init, jax.random.key(0))

    def typed(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        keeps = path[0].key == "batch_stats" or not x.shape
        keeps |= kernels_only and path[-1].key != "kernel"
        return x if keeps else jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.dtype))

    places = sharding.param_shardings(config, params, mesh)
    return jax.tree.map(_placed, jax.tree_util.tree_map_with_path(typed, params), places)


def context(
    model: CLIP,
    mesh: sharding.AnyMesh,
    state: State,
    params: Params,
    inputs: Inputs,
    outputs: Outputs,
) -> Context:
    """Build the context of the objective's functions; parameters and outputs are differentiated."""
    axes = Axes(sharding.BATCH_AXES, sharding.DIMENSIONS["D"], sharding.DIMENSIONS["V"])
    model = replace(model, layout=sharding.layout(mesh, model.config.attention))
    return Context(model, params, inputs, outputs, mesh, axes, state.frozen, state.carried)


def encode(
    x: Context,
    objective: Objective,
    locked: tuple[Tower, ...] = (),
    key: Array | None = None,
    train: bool = True,
    stored: Tower | None = None,
    lengths: TextLengths | None = None,
) -> tuple[Outputs, Params]:
    """Encode a chunk; return the outputs that the objective keeps, with L2-normalised embeddings,
    and the new BatchNorm statistics.

    With `key`, patches are dropped and captions predicted in parallel. Which ones depends on a
    pair's `row` in the global batch, not on the mesh or the number of chunks. BatchNorm computes
    with the batch's statistics if `train`. The inputs of the `stored` tower are its embeddings.
    With `lengths`, texts are embedded by groups, which they must fit.
    """
    locked = tuple(tower for tower in locked if tower != stored)
    frozen = {TOWERS[tower]: jax.lax.stop_gradient(x.params[TOWERS[tower]]) for tower in locked}
    x = replace(x, params=x.params | frozen)
    constrain, inputs, needs = x.model.layout.constrain, x.inputs, terms.needs(objective)
    images = {
        name: x.model.normalize(inputs[name]) for name in embedded(objective, "image", stored)
    }
    texts = {name: inputs[name] for name in embedded(objective, "text", stored)}
    keys = caption_keys = None
    if key is not None:
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(constrain(inputs["row"]))
        decoder = x.model.config.decoder
        if decoder is not None and decoder.parallel > 0:
            caption_keys = jax.vmap(lambda key: jax.random.fold_in(key, CAPTIONS))(keys)
    # A locked tower runs as in inference: all patches, BatchNorm's running statistics.
    trains_image = train and "image" not in locked

    def by_length(tower: Callable[[Array], Array], tokens: Array) -> Array:
        if lengths is None:
            return tower(tokens)
        used = x.model.config.text.used_tokens(tokens)
        return lengths.embed(tower, tokens, used, sharding.batch_shards(x.mesh))

    outputs, batch_stats = x.model.outputs(
        x.params,
        images,
        texts,
        needs,
        None if "image" in locked else keys,
        trains_image,
        by_length,
        caption_keys,
    )
    if stored is not None:
        outputs[stored] = inputs[stored]
    outputs = {
        name: l2_normalize(y) if output(name).is_embedding else constrain(y)
        for name, y in outputs.items()
    }
    results = terms.encode(objective, replace(x, outputs=outputs))
    return {name: constrain(y) for name, y in results.items()}, batch_stats


def embedded(objective: Objective, tower: Tower, stored: Tower | None = None) -> list[str]:
    """Return the names of the inputs that a tower embeds; a stored tower embeds none."""
    outputs = map(output, (tower, *terms.needs(objective)))
    return [x.input for x in outputs if x.is_embedding and x.tower == tower != stored]


def texts_fit(recipe: Recipe, mesh: AnyMesh, inputs: Inputs) -> Bool[Array, ""]:
    """Return whether all texts of a batch fit their groups by length, on all devices."""
    names = embedded(recipe.objective, "text", recipe.stored)
    several = [x if x.ndim == 3 else x[:, None] for x in (inputs[name] for name in names)]
    used = recipe.model.text.used_tokens(jnp.concatenate(several, axis=1))
    chunks = split(used, recipe.accumulation, recipe.model.vision.batch_norm_group or 1)
    devices = rearrange(chunks, "N (S b) T -> N S (b T)", S=sharding.batch_shards(mesh))
    return cast(TextLengths, recipe.text_lengths).fit(devices)


def gradients(state: State, inputs: Inputs, *, recipe: Recipe, mesh: sharding.AnyMesh) -> Gradients:
    """Compute the objective of a batch and its gradients.

    The towers encode the batch in chunks (`accumulation`), which takes the memory of one chunk; the
    gradients are those of the full batch. Texts must fit their groups (`text_lengths`).
    """
    objective, vision, key = recipe.objective, recipe.model.vision, None
    trainable, batch_stats = split_batch_stats(state.params)
    of_encode, of_loss = terms.split_params(objective, recipe.model, trainable)
    scalars = scalars_of(state.params)
    if recipe.drops_patches or recipe.predicts_in_parallel:
        # Threefry, whatever the default: it gives the same keys under vmap.
        key = jax.random.fold_in(jax.random.key(recipe.seed, impl="threefry2x32"), state.step)
    context_of = functools.partial(context, CLIP(recipe.model), mesh, state)

    def encode_chunk(of_encode: Params, chunk: Inputs) -> tuple[Outputs, Params]:
        params = recipe.complete(state, join_batch_stats(scalars | of_encode, batch_stats))
        return encode(
            context_of(params, chunk, {}),
            objective,
            recipe.optim.locked,
            key,
            train=recipe.lora is None,
            stored=recipe.stored,
            lengths=recipe.text_lengths,
        )

    def compare(of_loss: Params, outputs: Outputs) -> tuple[Float[Array, ""], Metrics]:
        params = scalars_of(base_of(state)) | of_loss
        return terms.total(objective, context_of(params, inputs, outputs))

    group = vision.batch_norm_group
    return cached_value_and_grad(
        encode_chunk,
        compare,
        of_encode,
        of_loss,
        inputs,
        recipe.accumulation,
        group_size=group or 1,
    )


def gradients_by_length(
    state: State, inputs: Inputs, *, recipe: Recipe, mesh: sharding.AnyMesh
) -> tuple[Gradients, Metrics]:
    """Compute the same with texts in groups by length; with full padding if they do not fit.

    All devices choose alike, and no process waits for the choice. Full padding recomputes
    activations, so that it takes no more memory than the groups.
    """
    fit = texts_fit(recipe, mesh, inputs)
    model = replace(recipe.model, remat="full")
    padded = replace(recipe, model=model, text_lengths=None)
    branches = (
        functools.partial(gradients, state, inputs, recipe=x, mesh=mesh) for x in (recipe, padded)
    )
    with jax.named_scope(SCOPE):
        result = jax.lax.cond(fit, *branches)
    return result, {"full_padding": 1 - fit.astype(jnp.float32)}


def scalars_of(params: Params) -> Params:
    """Return the parameters of no tower, such as the logit scale."""
    return {name: x for name, x in params.items() if not isinstance(x, dict)}


def without_idle(updates: Params, paths: tuple[str, ...]) -> Params:
    """Set updates to 0 below some paths: without a gradient, weight decay would still move them."""

    def unless_idle(path: tuple[Any, ...], x: Array) -> Array:
        names = [each.key for each in path]
        is_idle = any(names[: len(idle)] == idle for idle in (each.split("/") for each in paths))
        return jnp.zeros_like(x) if is_idle else x

    return jax.tree_util.tree_map_with_path(unless_idle, updates) if paths else updates


def train_step(
    state: State, batch: Inputs, *, recipe: Recipe, mesh: sharding.AnyMesh
) -> tuple[State, Metrics]:
    """Take one training step: encode, compute the objective and its gradients, update."""
    objective, optim, metrics = recipe.objective, recipe.optim, {}
    trainable, batch_stats = split_batch_stats(state.params)
    inputs = {name: x for name, x in batch.items() if name != "learning_rate"}
    if recipe.text_lengths is None:
        result = gradients(state, inputs, recipe=recipe, mesh=mesh)
    else:
        result, metrics = gradients_by_length(state, inputs, recipe=recipe, mesh=mesh)
    grads = terms.join_params(result.params, result.others)
    updates, opt_state = recipe.optimizer().update(
        grads, state.opt_state, trainable, learning_rate=batch["learning_rate"]
    )
    updates = without_idle(cast(Params, updates), terms.idle(objective, recipe.model))
    trainable = cast(Params, optax.apply_updates(trainable, updates))
    trainable = capped(trainable, optim.max_logit_scale)
    carried = {}
    if state.carried:
        x = context(CLIP(recipe.model), mesh, state, trainable, inputs, result.outputs)
        carried = terms.update(objective, x)
    batch_stats, carried = unless_skipped(
        (state.opt_state, opt_state),
        new=(result.statistics if batch_stats else {}, carried),
        old=(batch_stats, state.carried),
    )
    metrics |= (
        result.aux
        | skipped_updates(opt_state)
        | {
            "loss": result.loss,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(trainable),
            "logit_scale": jnp.exp((scalars_of(base_of(state)) | trainable)["logit_scale"]),
            "learning_rate": batch["learning_rate"],
        }
    )
    params = join_batch_stats(trainable, batch_stats)
    return State(state.step + 1, params, opt_state, carried, state.frozen), metrics
