"""Tables of all settings: each config dataclass with its fields, defaults, meanings and flags."""

import ast
import dataclasses
import functools
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

# The pages: name of the file, title, introduction, modules of the configs.
PAGES = {
    "run": (
        "Run",
        "A run is a `Config`, which a config file returns from `get_config()`, and its parts.",
        ("config", "checkpoints", "sharding", "processes"),
    ),
    "model": (
        "Model",
        "The architecture of both towers, of the tokenizer and of an optional head or decoder.",
        (
            *("models.clip", "models.vit", "models.conv_stem", "models.rotary", "models.tips"),
            *("models.dino", "models.convnext", "models.resnet", "models.text", "models.tower"),
            *("models.bert", "models.image_head", "models.decoder", "models.cappa"),
        ),
    ),
    "data": (
        "Data",
        "The input pipeline, sequence lengths, and the sources of image-text pairs. "
        "[Read pairs](../../how-to/data.md) says which source suits which files.",
        (
            *("data.pipeline", "data.batch_plan", "data.augment", "data.sources", "data.digits"),
            *("data.order", "models.text_lengths"),
        ),
    ),
    "objective": (
        "Objective and optimizer",
        "The losses that a run minimises, low-rank adapters, the optimizer and the learning-rate "
        "schedule.",
        ("losses", "models.lora", "optim"),
    ),
    "evaluation": (
        "Evaluation",
        "Evaluators that run during training; [evaluate](../commands/evaluate.md) runs the same "
        "ones on saved weights.",
        ("evals", "models.generation"),
    ),
    "scaling": (
        "Scaling",
        "A ladder of runs, which a spec file returns from `get_ladder()` for "
        "[`clip-jax scale ladder`](../commands/scale-ladder.md). These fields have no flags.",
        ("scaling",),
    ),
    "inference": (
        "Inference",
        "Preprocessing that a model folder stores with its weights. These fields have no flags.",
        ("data.images",),
    ),
}

HIDE = "---\nhide: [toc]\n---\n"  # the tables are wide
INDEX = """\
# Settings

A run has one `Config`, composed of smaller dataclasses. A config file is a Python file whose
`get_config()` returns a `Config`. On the command line, a flag overrides each field by its path:

```py
def get_config() -> Config:
    return Config(
        model=CLIPConfig(vision=ViTConfig(depth=6)),
        optim=OptimConfig(learning_rate=1e-3, optimizer=LAMB()),
    )
```

```shell
clip-jax train my_config.py --optim.learning-rate 3e-4 --model.vision.depth 8
```

How to read the tables:

- **config file** in the column *Flag*: the field holds one of several types, which only a config
  file can choose. The fields of the chosen type then have flags.
- **N** in a flag is a position in a tuple: `--objective.0.weight` is the weight of the first loss.
- A model's fields have flags in two places: `--model.vision.depth` is the trained model's, and
  `--objective.N.teachers.N.model.vision.depth` a live teacher's.
- A field of type `bool` has two flags, `--data.scaled-decode` and `--data.no-scaled-decode`. The
  table shows the one that changes the default.
- Values of a tuple follow the flag, separated by spaces: `--init-towers image text`.
- Defaults are those of the dataclass. A bundled config may set others, which
  `clip-jax train CONFIG --help-all` shows.
"""


@dataclasses.dataclass(frozen=True)
class Use:
    """One way to reach a config from a command or a config file."""

    command: str  # "" if the config is only written in a file
    prefix: str = ""  # such as `optim.optimizer.`, of its flags
    chosen: str = ""  # the nearest field above that holds it by choice, such as `optim.optimizer`

    def below(self, name: str, by_choice: bool) -> "Use":
        path = f"{self.prefix}{name}"
        return Use(self.command, f"{path}.", path if by_choice else self.chosen)

    def flag(self, field: str) -> str:
        return "--" + f"{self.prefix}{field}".replace("_", "-")


# ------------------------------------------------------------------ what the code says


def comments_in(source: str) -> dict[str, str]:
    """Return what the comments in a class's source say of its fields, by the rule of `--help`.

    A comment at the end of the field's first line, else the lines of comments directly above it.
    """
    source = textwrap.dedent(source)
    beside: dict[int, str] = {}  # comments by line: after code, and alone
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines = beside if token.line[: token.start[1]].strip() else alone
            lines[token.start[0]] = token.string.lstrip("#").strip()
    meanings = {}
    for node in ast.parse(source).body[0].body:  # ty: ignore[unresolved-attribute]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            above = " ".join(alone[line] for line in range(first, node.lineno))
            meanings[node.target.id] = beside.get(node.lineno, above)
    return meanings


@functools.cache
def comments(kind: type) -> dict[str, str]:
    """Return the same of a class."""
    try:
        return comments_in(inspect.getsource(kind))
    except (OSError, TypeError):  # builtins
        return {}


def meaning(kind: type, field: str) -> str:
    """Return the comment of a field, which may be inherited."""
    own = (comments(base)[field] for base in kind.__mro__ if field in comments(base))
    return next(own, "")


def summary(kind: type) -> str:
    """Return the first paragraph of a class's docstring as one line."""
    return " ".join((kind.__doc__ or "").strip().split("\n\n")[0].split())


def parts(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union; the type itself otherwise."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def configs(hint: Any) -> list[type]:
    """Return the dataclasses that a field of this type may hold."""
    if dataclasses.is_dataclass(hint):
        return [hint]  # ty: ignore[invalid-return-type]
    if hasattr(hint, "__metadata__"):  # Annotated: read from a text
        return []
    return [kind for part in typing.get_args(hint) for kind in configs(part)]


def hints(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    types_ = typing.get_type_hints(kind, include_extras=True)
    return {field.name: types_[field.name] for field in dataclasses.fields(kind)}


def is_choice(hint: Any) -> bool:
    """Say whether a config file chooses which config, or how many, a field holds."""
    return hint not in configs(hint)


def walk(kind: type, use: Use) -> Iterator[tuple[type, Use]]:
    """Yield a config and all configs below it, with their uses."""
    yield kind, use
    for name, hint in hints(kind).items():
        is_tuple = typing.get_origin(hint) is tuple
        for part in configs(hint):
            deeper = use.below(f"{name}.N" if is_tuple else name, is_choice(hint))
            yield from walk(part, deeper)


# ------------------------------------------------------------------ how a page shows it


def code(text: str) -> str:
    return f"`{text}`"


def type_of(hint: Any, links: Mapping[type, str]) -> str:
    """Write a type for readers, with a link for each config."""
    from clip_jax.storage.files import AnyPath

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hasattr(hint, "__metadata__"):
        return "text"
    if hint in links:
        return f"[{hint.__name__}]({links[hint]})"
    if origin is Literal:
        return ", ".join(code(str(x)) for x in args)
    if set(typing.get_args(AnyPath)) <= set(parts(hint)):
        rest = set(parts(hint)) - set(typing.get_args(AnyPath))
        return "path or URL" + (" or `None`" if rest else "")
    if len(parts(hint)) > 1:
        return " or ".join(type_of(part, links) for part in parts(hint))
    if origin is tuple and args[-1] is Ellipsis:
        return f"tuple of {type_of(args[0], links)}"
    if origin is tuple:
        return f"{len(args)} × {type_of(args[0], links)}"
    if origin is not None and issubclass(origin, Mapping):
        return f"dict of name to {type_of(args[1], links)}"
    if hint is type(None):
        return "`None`"
    return "path" if hint is Path else code(hint.__name__)


def text_of(value: Any) -> str:
    """Write a default value as in a config file, without what is a default itself."""
    if dataclasses.is_dataclass(value):
        fields = ((f.name, getattr(value, f.name), default(f)) for f in dataclasses.fields(value))
        changed = (f"{name}={text_of(x)}" for name, x, usual in fields if x != usual)
        name = type(value).__name__
        return str(value) if name == "Topology" else f"{name}({', '.join(changed)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(text_of, value))}{',' * (len(value) == 1)})"
    if isinstance(value, float):
        return f"{value:.6g}" if len(repr(value)) > 8 else repr(value)
    return repr(value) if isinstance(value, str | int | None) else repr(str(value))


def default(field: dataclasses.Field) -> Any:
    """Return the default of a field, MISSING if it must be set."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def flags_of(field: str, hint: Any, value: Any, uses: Iterable[Use]) -> str:
    """Write a field's flags; one that holds a config by choice has none."""
    flags = []
    for use in uses:
        flag = use.flag(field)
        if not use.command or (configs(hint) and is_choice(hint)):
            flag = ""
        elif configs(hint):
            flag += ".…"
        elif hint is bool and value is True:  # the form that changes the default
            flag = use.flag(f"no-{field}")
        flags.append(code(flag) if flag else "config file")
    return "<br>".join(dict.fromkeys(flags))


def anchor(name: str) -> str:
    return f'<a id="{name}"></a>'


def escape(text: str) -> str:
    """Escape what Markdown would read in a plain text, apart from code in backticks."""
    halves = text.split("`")
    plain = (re.sub(r"([*_\[\]>])", r"\\\1", part) for part in halves[::2])
    halves[::2] = (part.replace("<", "&lt;") for part in plain)  # has no escape by a backslash
    return "`".join(halves)


def cell(text: str) -> str:
    return text.replace("|", "&#124;").replace("\n", " ")


def choices(hint: Any, links: Mapping[type, str]) -> str:
    """List the configs among which a field chooses, with what each is."""
    items = []
    for kind in configs(hint):
        link, name = type_of(kind, links), kind.__name__
        says = escape(summary(kind))
        items.append(link + says.removeprefix(name) if says.startswith(name) else f"{link}: {says}")
    return "".join(f"<br>{item}" for item in items)


def table(
    kind: type,
    uses: Iterable[Use],
    links: Mapping[type, str],
    without: Iterable[str] = (),
    positional: Iterable[str] = (),
) -> str:
    """Write the table of a config's fields, but for some that another table has."""
    from clip_jax.cli import arguments

    lines = ['<div class="settings" markdown>\n']
    lines += ["| Field | Type | Default | Meaning | Flag |", "|---|---|---|---|---|"]
    fields = [field for field in dataclasses.fields(kind) if field.name not in without]
    for field in sorted(fields, key=lambda field: field.name not in positional):
        hint, value = hints(kind)[field.name], default(field)
        below = configs(hint)
        said = meaning(kind, field.name) or (summary(below[0]) if len(below) == 1 else "One of:")
        said = escape(said)
        cells = (
            anchor(f"{kind.__name__}.{field.name}") + code(field.name),
            type_of(hint, links),
            "required" if value is dataclasses.MISSING else code(text_of(value)),
            said + (choices(hint, links) if len(below) > 1 else ""),
            code(arguments.metavar(field.name)) if field.name in positional
            else flags_of(field.name, hint, value, uses),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    return "\n".join([*lines, "\n</div>\n"])


# ------------------------------------------------------------------ pages


def page_of(kind: type) -> str:
    """Return the name of the page with a config's table."""
    module = kind.__module__.removeprefix("clip_jax.")
    for name, (_, _, modules) in PAGES.items():
        if any(module == x or module.startswith(f"{x}.") for x in modules):
            return name
    raise ValueError(f"{kind}: name its module in PAGES of {__file__}")


shown: set[str] = set()  # dotted names of the configs that have a table


def path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def uses(roots: Mapping[str, type]) -> dict[type, list[Use]]:
    """Return the configs that have a table on a page of settings, and the uses of each.

    `roots` are the commands' own configs, by command; their tables are on the commands' pages.
    """
    from clip_jax.config import Config
    from clip_jax.data.images import Preprocess
    from clip_jax.scaling.ladder import LadderConfig

    reached: dict[type, list[Use]] = {}
    others = {name: kind for name, kind in roots.items() if not issubclass(kind, Config)}
    for command, root in {"train": Config, **others}.items():
        for kind, use in walk(root, Use(command)):
            if kind not in others.values():
                reached.setdefault(kind, []).append(use)
    for root in (LadderConfig, Preprocess):  # read from files alone
        for kind, use in walk(root, Use("")):
            reached.setdefault(kind, [use])
    bases = (base for kind in roots.values() for base in kind.__mro__)
    shown.update(path_of(kind) for kind in (*reached, *bases) if dataclasses.is_dataclass(kind))
    return reached


def nearest(uses: Iterable[Use]) -> list[Use]:
    """Choose for each command the use with the shortest flags."""
    shortest = sorted(uses, key=lambda use: use.prefix.count("."))
    return list({use.command: use for use in reversed(shortest)}.values())[::-1]


def where(kind: type, uses: Sequence[Use]) -> str:
    """Say which flags set the fields of a config, and when they exist."""
    lines = []
    for use in uses:
        if not use.command or not use.prefix or use.chosen.count(".N") > 1:
            continue
        flags = f"`{use.flag('')}…`"
        lines.append(f"{flags} if `{use.chosen}` is of this type" if use.chosen else flags)
    return "Flags: " + "; ".join(dict.fromkeys(lines)) + ".\n" if lines else ""


def section(kind: type, uses: Sequence[Use], links: Mapping[type, str]) -> str:
    """Write a config's heading, docstring, import, flags and table."""
    name = kind.__name__
    lines = [
        f"## {name} {{#{name}}}\n",
        inspect.cleandoc(kind.__doc__ or "") + "\n",
        f"`from {kind.__module__} import {name}`\n",
    ]
    if dataclasses.fields(kind):
        lines += [where(kind, uses), table(kind, nearest(uses), links)]
    else:
        lines.append("No fields.\n")
    return "\n".join(lines)


def pages(uses: Mapping[type, Sequence[Use]]) -> dict[str, str]:
    """Write the pages of settings, by name."""
    links = {kind: f"{page_of(kind)}.md#{kind.__name__}" for kind in uses}
    texts = {}
    for name, (title, introduction, _) in PAGES.items():
        kinds = [kind for kind in uses if page_of(kind) == name]
        listed = " · ".join(f"[{kind.__name__}](#{kind.__name__})" for kind in kinds)
        sections = (section(kind, uses[kind], links) for kind in kinds)
        texts[name] = "\n".join(
            [HIDE, f"# {title}\n", introduction + "\n", listed + "\n", *sections]
        )
    return texts


def index(uses: Mapping[type, Sequence[Use]]) -> str:
    """List all configs, by page."""
    lines = [INDEX]
    for name, (title, _, _) in PAGES.items():
        lines += [f"## [{title}]({name}.md)\n", "| Config | Sets |", "|---|---|"]
        lines += [
            f"| [{kind.__name__}]({name}.md#{kind.__name__}) | {cell(escape(summary(kind)))} |"
            for kind in uses
            if page_of(kind) == name
        ]
        lines.append("")
    return "\n".join(lines)
