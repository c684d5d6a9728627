"""Parse the arguments of a command into the dataclass that the command takes."""

import contextlib
import dataclasses
import inspect
import io
import itertools
import os
import re
import shutil
import textwrap
import traceback
import typing
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from types import FunctionType, NoneType
from typing import Annotated, Any, Literal

from clip_jax import parts
from clip_jax.display import say
from clip_jax.errors import InputError, former_fields, former_name

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
    ("pretrained-image", "--init-from, with --init-towers image"),
    ("resume", "the same command again: a run resumes by itself"),
    ("output-dir logs name remote-sync", "--workdir"),
    (
        "dataset-type train-num-samples",
        "nothing: the path tells the format, and shards are counted",
    ),
    ("csv-img-key", "--data.source.image-column"),
    ("csv-caption-key", "--data.source.caption-column"),
    ("aug-cfg", "--data.crop-scale and --data.augment"),
    ("lock-image", "--optim.locked image"),
    ("lock-text", "--optim.locked text"),
    ("grad-checkpointing", "--model.remat hidden, or residual, attention, full"),
    ("precision", "--model.dtype bfloat16 or float32"),
    ("opt", "optimizer of OptimConfig in a config file"),
    ("lr-scheduler", "schedule of OptimConfig in a config file"),
    ("beta1", "--optim.b1"),
    ("beta2", "--optim.b2"),
    ("eps", "--optim.eps"),
    ("grad-clip-norm", "--optim.clip-norm"),
    ("force-patch-dropout", "--model.vision.patch-dropout"),
    ("force-image-size", "--model.vision.image-size"),
    ("force-context-length", "--model.text.context-length"),
    ("siglip", "objective=(SigmoidConfig(),) in a config file"),
    ("local-loss gather-with-grad", "nothing: the loss is always that of the global batch"),
    ("distill-model distill-pretrained", "DistillationConfig in a config file"),
    ("save-frequency", "--checkpoint.every-steps"),
    ("delete-previous-checkpoint", "--checkpoint.keep"),
    ("imagenet-val val-data zeroshot-frequency val-frequency", "evals in a config file"),
    ("log-every-n-steps", "--report-every"),
    ("report-to wandb-project-name", "--wandb-project"),
    (
        "evals no-evals",
        "evals=() in a config file, or --evals.0.every-steps above --steps for the last step only",
    ),
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
        "tokens", "dim", "beside", "mesh.fsdp",
    ),
    "average": ("weights", "base", "greedy", "curve", "dataset", "metric", "ema", "overwrite"),
    "prepare": (
        "inspect", "min-side", "max-caption", "resize", "drop-duplicates", "drop-near-duplicates",
        "languages", "score-column", "min-score", "shuffle", "captions", "reinforce", "worker",
        "on",
    ),
}  # fmt: skip

_HELP = frozenset({"-h", "--help", "--help-all"})
_METAVARS = {"models": "MODEL", "names": "NAME", "paths": "RUN"}  # others: the field's name
# Arguments before the first flag that are no fields, and --json, as the help describes them.
_CONFIG = (
    "Config file (mine.py), name of a bundled config (`clip-jax configs` lists them), or the "
    "config.json of a run."
)
_JSON = "Print JSON on standard output, all else on standard error. (default: False)"
# Without CONFIG, the help shows the options of this one: its data have a path.
_EXAMPLE = "pairs"

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
    """Parse a command's config, its first fields by position; also say if --json was passed.

    The last of the fields takes all values that are left if it is a tuple; if another one is, that
    takes all but one for each field after it.
    """
    rest = [arg for arg in args if arg != "--json"] if takes_json else list(args)
    values = [] if is_help(rest) else leading(rest)
    flags, count = _as_flags(kind, positional, values)
    verb = " ".join([verb or command.__name__, *_in_usage(kind, positional)])
    config = parse(kind, [*flags, *rest[count:]], verb, command, None, "", positional, takes_json)
    return config, len(rest) < len(args)


def is_help(args: Sequence[str]) -> bool:
    """Say whether the arguments ask for help."""
    return not _HELP.isdisjoint(args)


def metavar(name: str) -> str:
    """Return how help calls a field that is read by position."""
    return _METAVARS.get(name, name.upper())


def _in_usage(kind: Any, positional: Sequence[str]) -> Iterator[str]:
    """Yield the fields that are read by position as usage shows them."""
    hints = typing.get_type_hints(kind)
    optional = {x.name for x in dataclasses.fields(kind) if x.default is not dataclasses.MISSING}
    for name in positional:
        is_many = typing.get_origin(hints[name]) is tuple
        shown = metavar(name) + " ..." * is_many
        yield f"[{shown}]" if name in optional else shown


def _as_flags(
    kind: type, positional: Sequence[str], values: Sequence[str]
) -> tuple[list[str], int]:
    """Return values by position as flags, and the number of values that this took."""
    hints = typing.get_type_hints(kind)
    flags: list[str] = []
    left = list(values)
    for index, name in enumerate(positional):
        after = len(positional) - index - 1
        is_many = typing.get_origin(hints[name]) is tuple
        taken = left[: max(len(left) - after, 0) if is_many else 1]
        flags += [f"--{name}", *taken] if taken else []
        left = left[len(taken) :]
    return flags, len(values) - len(left)


def read_run(kind: Any, args: Sequence[str], command: Callable, verb: str, **defaults: Any) -> Any:
    """Load a config file, override it by flags, and return it as `kind`, a subclass of Config."""
    from clip_jax.config import Config
    from clip_jax.config_files import load_config

    of_command, of_run = (
        {field.name for field in dataclasses.fields(fields_of)} for fields_of in (kind, Config)
    )
    _check_elsewhere(args, of_command - of_run)
    path = leading(args)[0] if leading(args) else None
    rest = list(args[1:] if path else args)
    if path is None and not is_help(rest):
        raise InputError(f"{verb} needs a config file, as in: clip-jax {verb} configs/digits.py")
    default = load_config(path or _EXAMPLE)
    about = "\n  ".join((_COMPONENTS, *_choices(Config)))
    values = kind(**{name: getattr(default, name) for name in of_run}, **defaults)
    takes_json = "--json" not in args and verb != "train"
    config = _CONFIG if path else f"{_CONFIG} Defaults below: those of the config {_EXAMPLE}."
    return parse(kind, rest, f"{verb} CONFIG", command, values, about, (), takes_json, config)


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
    positional: Sequence[str] = (),
    takes_json: bool = False,
    config: str = "",
) -> Any:
    """Parse flags into a dataclass with tyro, which prints its own errors and exits with 2.

    The complete help begins with `about`. Fields in `positional` that no flag sets are called
    arguments in help and errors. `config` describes the argument CONFIG, if there is one.
    """
    import tyro

    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_path_rule)
    names = () if "--help-all" in args else _MOST_USED.get(verb.split()[0], ())
    about = f"\n\n{about}" if "--help-all" in args else ""
    args = _with_present_names(args, kind if default is None else default)
    unset = [name for name in positional if f"--{name}" not in args]
    try:
        readable = _readable(names, verb, takes_json, config)
        shown = readable if is_help(args) else contextlib.nullcontext()
        with shown, parts.fields_opened(kind), _as_arguments(kind, unset):
            return tyro.cli(
                kind,
                registry=registry,
                prog=f"clip-jax {verb}",
                description=inspect.cleandoc(command.__doc__ or "") + about,
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


def _with_present_names(args: Sequence[str], config: Any) -> list[str]:
    """Return arguments with the present names of options, with a warning for each former one.

    `config` is the dataclass that the options are fields of, or an instance.
    """
    result: list[str] = []
    for arg in args:
        option, equals, value = arg.partition("=")
        *path, name = option.removeprefix("--").replace("-", "_").split(".")
        owner = config if option.startswith("--") else None
        for step in path:
            is_entry = isinstance(owner, tuple) and step.isdecimal() and int(step) < len(owner)
            owner = owner[int(step)] if is_entry else getattr(owner, step, None)
        row = former_fields(owner if isinstance(owner, type) else type(owner)).get(name)
        if row:
            present, until = row
            present = "--" + ".".join([*path, present]).replace("_", "-")
            say(former_name(option, present, until))
            option = present
        result.append(f"{option}{equals}{value}")
    return result


@contextlib.contextmanager
def _as_arguments(kind: type, names: Sequence[str]) -> Generator[None]:
    """Let tyro read these fields of a dataclass by position, within the context."""
    import tyro

    with contextlib.ExitStack() as restored:
        for name in names:
            base = next(x for x in kind.__mro__ if name in inspect.get_annotations(x))
            annotations = inspect.get_annotations(base)
            hint: Any = annotations[name]
            values = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            choices = f" {{{','.join(values)}}}" if values else ""
            shown = tyro.conf.arg(metavar=metavar(name) + choices)
            hint = Annotated[hint, tyro.conf.Positional, shown]
            restored.callback(setattr, base, "__annotations__", annotations)
            base.__annotations__ = annotations | {name: hint}
        yield


@contextlib.contextmanager
def _readable(names: Sequence[str], verb: str, takes_json: bool, config: str) -> Generator[None]:
    """Print the help that tyro prints inside as plain text, arguments before options.

    With `names`, of the options only these, in this order.
    """
    printed = io.StringIO()
    # On a wide terminal, tyro sets groups side by side.
    os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, 100))
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        if text := printed.getvalue():
            print(_laid_out(text, names, verb, takes_json, config))


def _laid_out(text: str, names: Sequence[str], verb: str, takes_json: bool, config: str) -> str:
    """Lay out help that tyro has printed; see `_readable`."""
    text = re.sub(r" +$", "", text, flags=re.M)
    text = re.sub(r"\n  -{20,}$", "", text, flags=re.M)  # below what a group's class says
    text = re.sub(r"^ (\w.*)\n -{20,}$", r"\1:", text, flags=re.M)
    text = re.sub(r"\(default:(\s+)\)", r"(default:\1empty)", text)
    _, _, text = text.partition("\n\n")  # its usage, which takes arguments for the last
    intro, _, text = text.partition("\noptions:\n")
    intro = intro.replace("positional arguments:", "arguments:")
    if config:
        about, *lines = textwrap.wrap(config, 90)
        intro = f"{intro.rstrip()}\n\narguments:\n  CONFIG  {about}\n"
        intro += "".join(f"          {line}\n" for line in lines)
    line = re.match(r"  -h, --help(\s+)show .*\n", text)
    indent, text = (line[1], text[line.end() :]) if line else ("  ", text)
    wide = indent if "\n" in indent else indent + " " * (len("-h, --help") - len("--json"))
    rows = [f"  -h, --help{indent}Show this help."]
    if takes_json:
        rows.append(f"  --json{wide}{_JSON}")
    head = f"usage: clip-jax {verb} [OPTIONS]\n\n{intro.rstrip()}\n\n"
    if not names:
        return f"{head}options:\n" + "\n".join(rows) + f"\n{text.rstrip()}"
    blocks = re.findall(r"^  (--([a-z][\w.-]*).*\n(?: {6}.*\n)*)", text + "\n", re.M)
    options = {name: block.rstrip() for block, name in blocks}
    shown = [f"  {options[name]}" for name in names if name in options] + rows[1:]
    return "\n".join(
        [
            f"{head}most used options:",
            *shown,
            "",
            f"All {len(options) + takes_json} options: clip-jax {verb} --help-all",
        ]
    )


def _check_elsewhere(args: Sequence[str], options: Collection[str]) -> None:
    """Raise InputError for flags of other tools, naming for each what to use.

    `options` are those of the command that a training run lacks.
    """
    counterparts = {name: instead for names, instead in _ELSEWHERE for name in names.split()}
    flags = (arg.partition("=")[0] for arg in args if arg.startswith("--"))
    foreign = [
        f"there is no option {flag}; use {instead}."
        for flag in dict.fromkeys(flags)
        if flag[2:] not in options and (instead := counterparts.get(flag[2:].replace("_", "-")))
    ]
    if foreign:
        raise InputError("\n".join(foreign))


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
