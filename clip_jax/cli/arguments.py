"""Parse the arguments of a command into the dataclass that the command takes."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import shutil
import traceback
import typing
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from types import FunctionType, NoneType
from typing import Any

from clip_jax import parts
from clip_jax.errors import InputError

# Training options of open_clip, transformers and others, and their counterparts here.
_ELSEWHERE = (
    ("lr optim.lr learning-rate", "--optim.learning-rate"),
    ("wd optim.wd weight-decay", "--optim.weight-decay"),
    ("warmup warmup-steps", "--optim.warmup-steps"),
    ("epochs num-train-epochs max-steps", "--steps, each with --batch-size pairs"),
    ("accum-freq gradient-accumulation-steps", "--accumulation"),
    ("train-data", "--data.source.path, with configs/pairs.py for example"),
    ("workers", "--data.workers"),
    ("model", "a config file with another model, or --model.vision.depth and the like"),
    ("pretrained", "--init-from"),
    ("output-dir logs", "--workdir"),
)

# Options that `--help` shows; `--help-all` shows all. Commands that are not listed have few.
_RUN = (
    "workdir",
    "data.source.path",
    "steps",
    "batch-size",
    "optim.learning-rate",
    "optim.warmup-steps",
    "init-from",
    "accumulation",
    "mesh.fsdp",
    "seed",
)
_PLAN = ("topology", "chip-hour-price", "fit", "compare", "mfu", "schedules", "model.remat")
_MOST_USED: dict[str, tuple[str, ...]] = {
    "train": _RUN,
    "plan": (*_PLAN, "batch-size", "accumulation", "mesh.fsdp", "mesh.tensor"),
    "bench": (
        "seconds", "warmup", "rounds", "calls", "against-plan", "data.source.path", "data.workers",
        "data.threads", "batch-size", "accumulation", "model.remat", "mesh.fsdp",
    ),
    "evaluate": (
        "dataset", "suite", "data-dir", "tasks", "templates", "languages", "output", "watch",
        "tokens", "beside", "mesh.fsdp",
    ),
    "average": ("weights", "base", "greedy", "curve", "dataset", "metric", "ema", "overwrite"),
    "prepare": (
        "inspect", "min-side", "max-caption", "resize", "drop-duplicates", "drop-near-duplicates",
        "languages", "score-column", "min-score", "shuffle", "captions", "reinforce", "worker",
        "on",
    ),
}  # fmt: skip

_COMPONENTS = """\
The options are the fields of the components that CONFIG chooses. To choose others, edit a config
(clip-jax configs NAME > mine.py); docs/reference/settings lists the fields of each:"""


def without_imports(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split off each `--import MODULE`; return the modules and the other arguments."""
    modules: list[str] = []
    others: list[str] = []
    values = iter(args)
    for arg in values:
        flag, equals, value = arg.partition("=")
        if flag != "--import":
            others.append(arg)
            continue
        value = value if equals else next(values, "")
        if not value or value.startswith("-"):
            raise InputError(
                f"--import {value}: it needs a module; pass its name or the path of a .py file."
            )
        modules.append(value)
    return modules, others


def leading(args: Sequence[str]) -> list[str]:
    """Return the arguments before the first flag."""
    return list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))


def read(
    kind: Any,
    args: Sequence[str],
    positional: Sequence[str],
    command: FunctionType,
    verb: str = "",
    takes_json: bool = True,
) -> tuple[Any, bool]:
    """Parse a command's config, its first fields by position; also say if --json was passed."""
    rest = [arg for arg in args if arg != "--json"] if takes_json else list(args)
    values = leading(rest)[: len(positional)]
    names = positional[: len(values)]
    flags = [part for pair in zip(names, values, strict=True) for part in (f"--{pair[0]}", pair[1])]
    verb = " ".join([verb or command.__name__, *(name.upper() for name in positional)])
    verb += " [--json]" if takes_json else ""
    config = parse(kind, [*flags, *rest[len(values) :]], verb, command)
    return config, len(rest) < len(args)


def read_run(
    kind: Any, args: Sequence[str], command: FunctionType, verb: str, **defaults: Any
) -> Any:
    """Load a config file, override it by flags, and return it as `kind`, a subclass of Config."""
    from clip_jax.config import Config
    from clip_jax.config_files import load_config

    of_command, of_run = (
        {field.name for field in dataclasses.fields(fields_of)} for fields_of in (kind, Config)
    )
    _check_elsewhere(args, of_command - of_run)
    path = leading(args)[0] if leading(args) else None
    rest = list(args[1:] if path else args)
    if path is None and not {"-h", "--help", "--help-all"} & set(rest):
        raise InputError(f"{verb} needs a config file, as in: clip-jax {verb} configs/digits.py")
    default = load_config(path) if path else Config()
    about = "\n  ".join((_COMPONENTS, *_choices(Config)))
    return parse(kind, rest, f"{verb} CONFIG", command, kind(**vars(default), **defaults), about)


def _choices(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield the fields, nested ones included, that take one of several dataclasses."""
    for name, hint in typing.get_type_hints(kind).items():
        hint = parts.opened(hint)
        while typing.get_origin(hint) is tuple:
            hint = typing.get_args(hint)[0]
        kinds = [x for x in typing.get_args(hint) or (hint,) if dataclasses.is_dataclass(x)]
        if len(kinds) > 1:
            yield f"{prefix}{name}: {' | '.join(x.__name__ for x in kinds)}"
        elif kinds:
            yield from _choices(kinds[0], f"{prefix}{name}.")


def parse(
    kind: Any,
    args: Sequence[str],
    verb: str,
    command: Callable,
    default: Any = None,
    about: str = "",
) -> Any:
    """Parse flags into a dataclass with tyro, which prints its own errors and exits with 2.

    The complete help begins with `about`.
    """
    import tyro

    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_path_rule)
    names = () if "--help-all" in args else _MOST_USED.get(verb.split()[0], ())
    is_help = bool({"-h", "--help"} & set(args))
    about = f"\n\n{about}" if "--help-all" in args else ""
    try:
        shown = _shortened(names, verb) if names and is_help else contextlib.nullcontext()
        with shown, parts.fields_opened(kind):
            return tyro.cli(
                kind,
                registry=registry,
                prog=f"clip-jax {verb}",
                description=(command.__doc__ or "").strip() + about,
                args=["--help" if arg == "--help-all" else arg for arg in args],
                config=(tyro.conf.AvoidSubcommands,),
                **({} if default is None else {"default": default}),
            )
    except SystemExit as stopped:  # at any ValueError of a dataclass, even if it is a bug
        error: BaseException | None = stopped
        while error := error.__context__:
            is_bug = isinstance(error, ValueError) and not isinstance(error, InputError)
            if is_bug and _is_ours(error):
                raise error from None
        raise


@contextlib.contextmanager
def _shortened(names: Sequence[str], verb: str) -> Generator[None]:
    """Reduce the help that is printed inside to these options, in this order."""
    printed = io.StringIO()
    # On a wide terminal, tyro sets groups side by side.
    os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, 100))
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        intro, _, rest = printed.getvalue().partition("\n options")
        blocks = re.findall(r"^  (--([a-z][\w.-]*).*\n(?: {6}.*\n)*)", rest, re.M)
        options = {name: re.sub(r"^ *\n| +$", "", block, flags=re.M) for block, name in blocks}
        print(f"{intro.rstrip()}\n\nmost used options:")
        print("".join(f"  {options[name].rstrip()}\n" for name in names if name in options))
        print(f"All {len(options)} options: clip-jax {verb.replace(' [--json]', '')} --help-all")


def _check_elsewhere(args: Sequence[str], options: Collection[str]) -> None:
    """Raise InputError for a flag of another tool, naming the one to use.

    `options` are those of the command that a training run lacks.
    """
    for flag in (arg.partition("=")[0] for arg in args if arg.startswith("--")):
        for names, instead in _ELSEWHERE:
            if flag[2:] not in options and flag[2:].replace("_", "-") in names.split():
                raise InputError(f"there is no option {flag}; use {instead}.")


def _is_ours(error: BaseException) -> bool:
    """Say whether an exception came through this package's code."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(__file__).parents[1] in Path(frame.filename).parents for frame in frames)


def _path_rule(info: Any) -> Any:
    """Return tyro's rule for parsing a path or URL, None for other types."""
    from tyro.constructors import PrimitiveConstructorSpec

    from clip_jax.storage.files import AnyPath, as_path

    kinds = set(typing.get_args(info.type)) or {info.type}
    if kinds - {NoneType} != set(typing.get_args(AnyPath)):
        return None
    optional = NoneType in kinds
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{None}|PATH" if optional else "PATH",
        instance_from_str=lambda args: None if optional and args == ["None"] else as_path(args[0]),
        is_instance=lambda x: isinstance(x, tuple(kinds)),
        str_from_instance=lambda x: [str(x)],
    )
