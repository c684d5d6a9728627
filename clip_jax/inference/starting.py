"""The state of step 0, from a config and the weights that it names."""

from jax.sharding import Mesh

from clip_jax.checkpoints.manager import digest_of
from clip_jax.config import Config
from clip_jax.convert.fitting import check_settings, check_shapes, starting_params
from clip_jax.convert.weight_files import WeightFiles
from clip_jax.convert.weights import Head, Weights, default_preprocess
from clip_jax.data.tokenizers import vocabulary
from clip_jax.inference.loading import Model, on_mesh, open_alike, prompt_head
from clip_jax.losses import ClassifierConfig, Frozen, Objective
from clip_jax.models.clip import Params
from clip_jax.step import BASE, FrozenParams, Program, State


def initial_params(config: Config, weight_files: WeightFiles, *, resumes: bool = False) -> Params:
    """Read the parameters of `init_from` with which a run begins, or that its adapters change.

    They are {} for a run that begins at random, or that resumes and does not need them.
    """
    if not config.init_from or (resumes and config.lora is None):
        return {}
    return starting_params(
        weight_files.open(config.init_from),
        config.model,
        config.init_towers,
        preprocess=default_preprocess(config.model, config.preprocess),
        allowed=("*",) if resumes else config.init_differences,  # the digest is checked
    )


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
