"""The state of step 0, from a config and the weights that it names."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.checkpoints.checksums import digest_of
from clip_jax.config import Config
from clip_jax.convert.fitting import check_settings, check_shapes, starting_params
from clip_jax.convert.weight_files import WeightFiles
from clip_jax.convert.weights import Head, Weights, default_preprocess
from clip_jax.data import reinforced
from clip_jax.data.tokenizers import vocabulary
from clip_jax.inference.loading import Model, on_mesh, open_alike, prompt_head
from clip_jax.losses import ClassifierConfig, Frozen, Objective
from clip_jax.models.clip import CLIPConfig, Params
from clip_jax.models.inputs import StoredInput
from clip_jax.optim import Tower
from clip_jax.step import BASE, FrozenParams, Program, State, of_tower, without


def initial_params(config: Config, weight_files: WeightFiles, *, resumes: bool = False) -> Params:
    """Read the parameters of `init_from` with which a run begins, or that its adapters change.

    They are {} for a run that begins at random, or that resumes and does not need them. Those of a
    stored tower are left out.
    """
    resumes_alone = resumes and config.lora is None
    if not config.init_from or resumes_alone or {*config.init_towers} == {config.stored}:
        return {}
    params = starting_params(
        weight_files.open(config.init_from),
        config.model,
        config.init_towers,
        preprocess=default_preprocess(config.model, config.preprocess),
        allowed=("*",) if resumes else config.init_differences,  # the digest is checked
    )
    return without(config.stored, params)


class StoredTower(NamedTuple):
    """The tower whose embeddings a run reads from its data."""

    name: Tower
    config: CLIPConfig  # of the model
    params: Params  # NumPy arrays, float32
    digest: str

    @property
    def reads(self) -> StoredInput:
        """What the run reads of each sample: embeddings of this tower, and of no other."""
        origin = reinforced.origin(self.config, self.name, self.digest)
        return StoredInput(self.name, (self.config.embed_dim,), (*origin.items(),))

    def on_mesh(self, mesh: Mesh) -> Params:
        """Return the parameters, sharded as in training."""
        names = of_tower(self.name, self.config.dimensions())
        shardings = sharding.param_shardings(self.config, self.params, mesh, names)
        return jax.tree.map(
            lambda x, on: jax.make_array_from_callback(x.shape, on, lambda index: x[index]),
            self.params,
            shardings,
        )


def stored_tower(config: Config, weight_files: WeightFiles) -> StoredTower | None:
    """Read the tower of `init_from` whose embeddings are stored with the data; None: there is none.

    Raises InputError if the weights do not fit the model.
    """
    tower = config.stored
    if tower is None or not config.init_from:
        return None
    params = starting_params(
        weight_files.open(config.init_from),
        config.model,
        (tower,),
        preprocess=default_preprocess(config.model, config.preprocess),
        allowed=config.init_differences,
    )
    return StoredTower(tower, config.model, params, digest_of(params))


def initial_state(
    config: Config, program: Program, weight_files: WeightFiles, params: Params
) -> State:
    """Initialise the state at random, except for `initial_params`, by whose text tower a
    classifier begins. Locked towers are float32 (`Program.draw`)."""
    trained = {} if config.lora is not None else params
    for term in config.objective:
        if isinstance(term, ClassifierConfig) and config.init_from and "text" in params:
            head = weight_files.open(config.init_from).head
            trained = trained | {term.name: {"kernel": _head(config, term, params, head).kernel}}
    return program.draw(trained)


def _head(config: Config, term: ClassifierConfig, params: Params, head: Head | None) -> Head:
    """Return the weights' own classifier if it has the term's classes, else the zero-shot one."""
    if head is not None and head.classes == term.classes:
        return head
    model = Model(config.model, params, default_preprocess(config.model))
    return prompt_head(model, term.classes, term.templates)


def frozen_weights(
    config: Config, mesh: Mesh, weight_files: WeightFiles, params: Params
) -> tuple[FrozenParams, dict[str, str]]:
    """Return what a run never changes, and hashes of it: teachers, and the base of adapters."""
    frozen = frozen_params(config.objective, mesh, weight_files)
    hashes = {"teachers": digest_of(frozen)}
    if config.lora is not None:
        frozen, hashes = frozen | {BASE[0]: {BASE[1]: params}}, hashes | {"base": digest_of(params)}
    return frozen, hashes


def frozen_params(objective: Objective, mesh: Mesh, weight_files: WeightFiles) -> FrozenParams:
    """Load the weights of the objective's frozen models, sharded (see `losses.Term.frozen`).

    Raises InputError if a model has another architecture than its term says.
    """

    def load_one(frozen: Frozen) -> Params:
        model = on_mesh(open_alike(weight_files, frozen.weights), mesh)
        where = f"teachers.weights={frozen.weights!r}"
        advice = "correct the teacher's model, or set it to None to read it from the weights"
        check_shapes(model.params, frozen.config, where, advice)
        weights = Weights(config=model.config, params={}, preprocess=model.image_preprocess)
        check_settings(weights, frozen.config, where, advice)
        vocabulary.check_same(frozen.config.text.tokenizer, model.config.text.tokenizer, where)
        return model.params

    return {
        term.name: {name: load_one(model) for name, model in term.frozen().items()}
        for term in objective
        if term.frozen()
    }
