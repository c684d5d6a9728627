"""Config files: read them, and complete a config by what it leaves to other files.

A config file is Python with `get_config() -> Config`, or the `config.json` of a run.
"""

import ast
import contextlib
import difflib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from clip_jax import parts
from clip_jax.checkpoints.run_config import VERSION, read_run_config, upgrade
from clip_jax.config import Config
from clip_jax.convert.weight_files import WeightFiles
from clip_jax.convert.weights import Weights, whole_model, with_context
from clip_jax.data.pipeline import classes_of, open_source
from clip_jax.errors import InputError, naming
from clip_jax.losses import ClassifierConfig, DistillationConfig
from clip_jax.losses.contrastive import Contrastive
from clip_jax.optim import Tower
from clip_jax.serialize import from_dict, to_dict
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import check_version, content_of

AnyConfig = TypeVar("AnyConfig", bound=Config)
# Fields of a model that weights of one tower alone determine.
_OF_TOWER: dict[Tower, tuple[str, ...]] = {
    "image": ("embed_dim", "vision", "image_mean", "image_std"),
    "text": ("embed_dim", "text"),
}
# Fields of a text tower that record how its positions were stretched.
_STRETCH = ("kept_positions", "stretched_from")


def load_config(path: str | Path) -> Config:
    """Load a config from a Python file's `get_config()` or from a run's `config.json`.

    A name such as `vit_b16` selects the bundled config of that name. Raises InputError that says
    what is wrong with the file.

        >>> import clip_jax
        >>> config = clip_jax.load_config("vit_b16")
        >>> config.model.vision.patch_size, config.batch_size
        (16, 32768)
    """
    path = Path(path)
    if path.suffix != ".json":
        config = run_file(path, "get_config", Config)
        return from_dict(Config, to_dict(config), f"{path}: config")  # checks the types
    if not path.is_file():
        raise InputError(f"no config at {path}; a run saves its own in its run directory.")
    try:
        content = json.loads(content_of(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}. Correct it, or restore a copy.") from error
    with naming(path):  # the check of a value's range does not know the file
        return of_run(content, f"{path}: config")


def of_run(content: Any, where: str = "config") -> Config:
    """Read the content of a run's `config.json`, which an older version may have written."""
    parts.check(content, where)
    if isinstance(content, dict):
        check_version(content, VERSION, where)
        content = upgrade(content)
    return from_dict(Config, content, where)


def complete(run: dict[str, Any]) -> dict[str, Any]:
    """Return the dict of a run's config with defaults for the fields that an older version lacked.

    Defaults of new fields keep the older version's behaviour.
    """
    with contextlib.suppress(InputError):
        return to_dict(from_dict(Config, run)) if run else {}
    return run


def as_begun(config: Config, workdir: AnyPath) -> Config:
    """Replace what a run settles when it begins by what the run in `workdir`, if any, settled:
    `data.order=auto`, and the record of stretched text positions."""
    before: dict[str, Any] = {}
    with contextlib.suppress(InputError):  # damaged: a resuming run says so
        before = read_run_config(workdir)
    order, text = config.data.order, config.model.text
    if order == "auto":
        order = before.get("data", {}).get("order") or order
    stretch = before.get("model", {}).get("text", {})
    stretch = {name: stretch[name] for name in _STRETCH if name in stretch}
    model = replace(config.model, text=replace(text, **stretch))
    return replace(config, model=model, data=replace(config.data, order=order))


def with_stretch(config: AnyConfig, weight_files: WeightFiles) -> AnyConfig:
    """Record in a new run's config how the text positions of `init_from` are stretched, or were
    when its weights were made; see `TextTowerConfig.with_context_length`."""
    text, record = config.model.text, {"stretched_from": None}
    if config.init_from and "text" in config.init_towers:
        kept, length = text.kept_positions, text.context_length
        weights = with_context(weight_files.open(config.init_from), length, kept)
        record = {name: getattr(weights.config.text, name) for name in _STRETCH}
    return replace(config, model=replace(config.model, text=replace(text, **record)))


def with_weights(config: AnyConfig, weight_files: WeightFiles | None = None) -> AnyConfig:
    """Return the config with what it leaves to files: classes, and architectures of teachers and,
    with `init_architecture`, of the model, without a bias if all losses are softmax.

    No values of weights are read. Without `weight_files`, they are opened for this alone.
    """
    if weight_files is None:
        with WeightFiles() as weight_files:
            return with_weights(config, weight_files)

    def read(weights: str, setting: str, tower: Tower | None = None) -> Weights:
        with naming(f"{setting}={weights!r}"):
            file = weight_files.open(weights)
            file = file if tower and file.only_tower == tower else whole_model(file)
        how = file.preprocess
        return replace(file, config=replace(file.config, image_mean=how.mean, image_std=how.std))

    def with_model(teacher: Any) -> Any:
        if getattr(teacher, "model", teacher) is not None:
            return teacher
        return replace(teacher, model=read(teacher.weights, "teachers.weights").config)

    def complete(term: Any) -> Any:
        if isinstance(term, ClassifierConfig) and not term.classes:
            source = open_source(config.data.source, config.model.vision.image_spec.side)
            return replace(term, classes=classes_of(source))
        distils = isinstance(term, DistillationConfig)
        return replace(term, teachers=tuple(map(with_model, term.teachers))) if distils else term

    model, preprocess = config.model, config.preprocess
    if config.init_architecture and config.init_from:
        names = ("dtype", "remat", "unroll", "attention")  # how to compute, not what
        tower = config.init_towers[0] if len(set(config.init_towers)) == 1 else None
        file = read(config.init_from, "init_from", tower)
        initial = file.config
        if file.only_tower is not None:  # the other tower is that of the run's config
            taken = [*_OF_TOWER[file.only_tower]]
            if model.image_head is not None:  # which makes embeddings of another width
                taken.remove("embed_dim")
            initial = replace(model, **{name: getattr(initial, name) for name in taken})
        preprocess = preprocess if file.only_tower == "text" else file.preprocess
        model = replace(initial, **{name: getattr(model, name) for name in names})
        dropout = config.model.vision.patch_dropout
        model = replace(model, vision=model.vision.with_patch_dropout(dropout))
        if {x.needs_bias for x in config.objective if isinstance(x, Contrastive)} == {False}:
            model = replace(model, init_logit_bias=None)
    objective = tuple(map(complete, config.objective))
    return replace(config, model=model, preprocess=preprocess, objective=objective)


def bundled_configs() -> dict[str, Path]:
    """Return the config files that ship with the package, by name.

    A wheel has them as `clip_jax.configs`; a checkout beside the package, in `configs/`.
    """
    package = Path(__file__).parent
    folders = (package / "configs", package.parent / "configs")
    folder = next((x for x in folders if x.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def lab_note(path: Path) -> dict[str, str]:
    """Return what a config file's docstring says: `about`, its first line, and, if it has these
    paragraphs, `Hardware` and `Expected`."""
    note = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraphs = re.findall(
        r"^(Hardware|Expected): (.*?)(?=^[A-Z]\w+: |\n\n|\Z)", note, re.M | re.S
    )
    return {"about": note.partition("\n")[0]} | {
        label: " ".join(x.split()) for label, x in paragraphs
    }


def run_file(path: Path, function: str, kind: type) -> Any:
    """Run a Python file and return the result of one of its functions, which must be a `kind`.

    The path may be the name of a bundled config. Errors in the file become InputErrors that name
    the line.
    """
    if not path.is_file():
        bundled = bundled_configs()
        if str(path) not in bundled:
            near = difflib.get_close_matches(str(path), bundled, 1)
            guess = f"; did you mean {near[0]}? Bundled" if near else "; bundled"
            raise InputError(f"no config file at {path}{guess} are {', '.join(bundled)}.")
        path = bundled[str(path)]
    module = parts.run_file(path)
    with parts.blamed_on(path):
        if function not in vars(module):
            raise InputError(
                f"the file must define {function}() -> {kind.__name__}; see configs/ for examples."
            )
        made = vars(module)[function]()
    if not isinstance(made, kind):
        raise InputError(
            f"{function}() in {path} must return a {kind.__name__}, not {type(made).__name__}."
        )
    return made
