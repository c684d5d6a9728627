"""The built site. MkDocs itself, with `--strict`, checks that links and anchors lead somewhere."""

import contextlib
import dataclasses
import functools
import html
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import clip_jax
from clip_jax.cli import arguments, commands
from clip_jax.cli.commands import COMMANDS
from clip_jax.config_files import bundled_configs, load_config
from tests.conftest import ROOT, made_once

_NAMES = ("cli.arguments", "cli.commands", "cli.completion", "display", "errors", "serialize")
UNLISTED = {f"clip_jax.{name}" for name in _NAMES}
RUNS = sorted(name for name in bundled_configs() if not name.startswith("ladder_"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""

    def build(folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "site", build)


@pytest.fixture(scope="module")
def site(folder: Path) -> dict[str, str]:
    """The pages' texts by path."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.html")}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table of settings: the texts of its cells, and what the links are to."""

    type: str
    default: str
    meaning: str
    flags: list[str]
    links: set[str]


@pytest.fixture(scope="module")
def rows(site: dict[str, str]) -> dict[str, Row]:
    """The rows of all tables of settings, by config and field: `ViTConfig.depth`."""
    rows = {}
    for text in site.values():
        for section in re.split(r"(?=<h2)", text):
            prefixes = re.findall(r"<code>(--[\w.-]*\.)…</code>", section.partition("<table>")[0])
            for row in re.findall(r"<tr>(.*?)</tr>", section, re.S):
                if name := re.search(r'<a id="(\w+)\.(\w+)">', row):
                    cells = re.findall(r"<td>(.*?)</td>", row, re.S)
                    _, kind, default, meaning = map(plain, cells[:4])
                    flags = [plain(x) for x in cells[4].split("<br")]
                    if flags[0].startswith("--"):
                        flags += [prefix + name[2].replace("_", "-") for prefix in prefixes]
                    links = set(re.findall(r'href="[^"]*#([\w.]+)"', row))
                    rows[".".join(name.groups())] = Row(kind, default, meaning, flags, links)
    return rows


def plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>|^ ?/?>", "", text)).split())


def anchors(text: str) -> set[str]:
    return set(re.findall(r'\sid="([^"]+)"', text))


def test_the_benchmarks_are_a_page_to_which_all_pages_that_name_them_link(site):
    page = site["reference/benchmarks/index.html"]
    assert "how-fast-is-a-training-step" in anchors(page)
    assert 'href="../../explanation/performance/"' in page.partition("<article")[2]
    link = re.compile(r'<a href="[./]*(reference/)?benchmarks/"><code>BENCHMARKS.md</code></a>')
    named = {name for name, text in site.items() if link.search(text)}
    assert {"how-to/pods/index.html", "explanation/performance/index.html"} <= named
    code = "<code>BENCHMARKS.md</code>"
    assert not [name for name, text in site.items() if code in link.sub("", text)]


# ------------------------------------------------------------------ settings


def is_config(kind: Any) -> bool:
    is_ours = getattr(kind, "__module__", "").startswith("clip_jax")
    return isinstance(kind, type) and is_ours and dataclasses.is_dataclass(kind)


def below(hint: Any) -> Iterator[type]:
    """The dataclasses in a type."""
    if is_config(hint):
        yield hint
    elif not hasattr(hint, "__metadata__"):
        for part in typing.get_args(hint):
            yield from below(part)


@functools.cache
def config_classes() -> set[type]:
    """Every frozen dataclass of the package that is named as a config, and all that it holds."""
    names = [x.name for x in pkgutil.walk_packages(clip_jax.__path__, "clip_jax.")]
    modules = map(importlib.import_module, sorted({*names} - {"clip_jax.__main__"}))
    todo = [
        kind
        for module in modules
        for kind in vars(module).values()
        if is_config(kind) and kind.__name__.endswith(("Config", "Command", "Bench"))
    ]
    kinds: set[type] = set()
    while todo:
        kind = todo.pop()
        if kind not in kinds:
            kinds.add(kind)
            types = typing.get_type_hints(kind, include_extras=True)
            todo += [x for field in dataclasses.fields(kind) for x in below(types[field.name])]
    return kinds


def comment(kind: type, field: str) -> str:
    """What the code says of a field: at the end of its line, or in the lines above."""
    for owner in kind.__mro__:
        if field in vars(owner).get("__annotations__", {}):
            lines = inspect.getsource(owner).splitlines()
            start = next(i for i, x in enumerate(lines) if re.match(rf"\s+{field}: ", x))
            if beside := re.search(r"  # (.*)$", lines[start]):
                return beside[1]
            above = []
            while lines[(start := start - 1)].lstrip().startswith("#"):
                above.insert(0, lines[start].lstrip(" #"))
            return " ".join(above)
    raise AssertionError(f"{kind} has no {field}")


def fields() -> Iterator[tuple[type, str, Any]]:
    """The fields of all configs, each with its type."""
    for kind in config_classes():
        types = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            yield kind, field.name, types[field.name]


def row_of(rows: dict[str, Row], kind: type, field: str) -> Row:
    """The row of a field, in the table of its class or of one that inherits it as it is."""

    def source(x: type) -> type:
        return next(y for y in x.__mro__ if field in vars(y).get("__annotations__", {}))

    heirs = [x for x in config_classes() if kind in x.__mro__ and source(x) is source(kind)]
    kinds = [kind, *heirs, *kind.__mro__]
    names = [f"{x.__name__}.{field}" for x in kinds]
    assert set(names) & set(rows), f"no table has {kind.__name__}.{field}"
    return next(rows[name] for name in names if name in rows)


def test_every_field_of_every_config_stands_in_the_reference_with_its_meaning(rows):
    seen = 0
    for kind, field, hint in fields():
        row = row_of(rows, kind, field)
        said = comment(kind, field)
        held = [x.__doc__ or "" for x in below(hint)]
        expected = said or " ".join(held[0].split("\n\n")[0].split() if held else [])
        assert expected, f"{kind.__name__}.{field} has no comment"
        if said or len(held) == 1:
            assert row.meaning.startswith(expected.replace("`", "")), f"{kind.__name__}.{field}"
        assert row.type
        assert row.default
        assert row.flags[0]
        seen += 1
    assert seen > 250


def test_the_alternatives_of_a_choice_are_linked(rows):
    choices = {(kind, field): {*below(hint)} for kind, field, hint in fields()}
    for (kind, field), held in choices.items():
        assert {x.__name__ for x in held} <= row_of(rows, kind, field).links, (kind, field)
    assert max(len(held) for held in choices.values()) >= 9  # data sources


def components(value: Any) -> set[type]:
    """The dataclasses of which a config is made."""
    if isinstance(value, tuple):
        return set().union(*map(components, value))
    if not is_config(type(value)):
        return set()
    held = (components(getattr(value, x.name)) for x in dataclasses.fields(value))
    return {type(value)}.union(*held)


def test_the_tables_say_what_the_help_of_training_says(rows):
    """With the components of every bundled config: of each run that has one that no other had."""
    documented = {(flag, tight(row.meaning)) for row in rows.values() for flag in row.flags}
    pattern = r"^  (--[a-z].*(?:\n  \S.*)*)\n((?: {8}.*\n)+)"
    seen: set[type] = set()
    options: set[tuple[str, str]] = set()
    for name in RUNS:
        kinds = components(load_config(name))
        if kinds - seen:
            options |= {*re.findall(pattern, printed("train", name, "--help-all"), re.M)}
            seen |= kinds
    for names, text in options:
        flags = [re.sub(r"\.\d+\.", ".N.", flag) for flag in re.findall(r"--[\w.-]+", names)]
        flags = [flag.replace("--objective.N.teachers.N.model.", "--model.") for flag in flags]
        text = tight(re.sub(r"\((?:default|required)\b.*", "", text, flags=re.S))
        assert any((flag, text) in documented for flag in flags), f"{flags}: {text}"
    assert len(options) > 200


def tight(text: str) -> str:
    """A text without spaces, where the terminal's width broke its lines, and without backticks."""
    return re.sub(r"[\s`]", "", text)


def printed(*command: str) -> str:
    """What a command prints, such as its help."""
    text = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="100"),
        contextlib.redirect_stdout(text),
        contextlib.suppress(SystemExit),
    ):
        commands.main(command)
    return re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())


# ------------------------------------------------------------------ commands, API, notebooks


def pages_of_commands(site: dict[str, str]) -> dict[str, str]:
    """The pages of the commands, by `scale fit` and the like."""
    pattern = re.compile(r"reference/commands/([\w-]+)/index.html")
    found = {match[1]: text for path, text in site.items() if (match := pattern.fullmatch(path))}
    return {re.search(r"<h1[^>]*>clip-jax ([^<]+)", text)[1]: text for text in found.values()}


def test_every_command_has_a_page(site):
    """And the start page links to the list of them."""
    assert re.search(r'href="?reference/commands/', site["index.html"])
    pages = pages_of_commands(site)
    names = "ladder collect choose fit divide plan relate ranks report"
    verbs = {f"scale {name}" for name in names.split()}
    assert {*COMMANDS, *verbs, "bench input", "bench step"} == set(pages)
    listed = site["reference/commands/index.html"]
    for name, text in pages.items():
        assert f"usage: clip-jax {name}" in plain(text)
        assert f'href="{name.replace(" ", "-")}/"' in listed


def test_the_examples_of_the_commands_are_parsed(site, monkeypatch):
    def read(*args: Any) -> None:
        parse(*args)
        raise EOFError  # so far and no further

    parse = arguments.parse
    monkeypatch.chdir(ROOT)
    for name, text in pages_of_commands(site).items():
        example = re.search(r'<div class="[^"]*highlight">(.*?)</div>', text, re.S)
        if 'id="options"' not in text:  # of verbs, or none
            continue
        assert example, name
        tool, *words = shlex.split(plain(example[1]))
        assert tool == "clip-jax"
        assert " ".join(words).startswith(name)
        with (
            mock.patch.object(arguments, "parse", autospec=True, side_effect=read),
            pytest.raises(EOFError),
        ):
            commands._run(words)


def test_every_module_that_says_what_it_is_stands_in_the_reference(site):
    listed = set().union(*map(anchors, site.values()))
    assert {"clip_jax.inference.loading.load", "clip_jax.train.train"} <= listed
    paths = (ROOT / "clip_jax").rglob("[!_]*.py")
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    assert modules - listed == UNLISTED


def test_the_api_shows_what_dataclasses_hold(site):
    """Results in a table; configs by a link to theirs."""
    assert "memory of one device that a run may use" in site["reference/pods/index.html"].replace(
        "Memory", "memory"
    )
    assert re.search(r'href="[^"]*settings/model/#ViTConfig"', site["reference/models/index.html"])


def test_signatures_and_examples_of_the_api_are_laid_out(site):
    """Ruff breaks signatures, which without it are one line; examples are code, not quotations."""
    text = site["reference/library/index.html"]
    signatures = re.findall(r'<div class="[^"]*doc-signature[^"]*">(.*?)</div>', text, re.S)
    lines = [html.unescape(re.sub(r"<[^>]+>", "", x)).splitlines() for x in signatures]
    assert max(len(x) for x in lines) > 5
    assert max(len(line) for x in lines for line in x) <= 90
    assert re.search(r'<div class="[^"]*language-pycon[^"]*">', text)
    assert "<blockquote>" not in text


def test_outputs_with_tables_are_marked(site):
    """They scroll on a phone, where other outputs wrap."""
    outputs = re.findall(
        r'<div class="([^"]*\blanguage-text\b[^"]*)">(.*?)</div>',
        site["how-to/pods/index.html"],
        re.S,
    )
    assert {"columns" in kind.split() for kind, _ in outputs} == {True, False}
    for kind, output in outputs:
        assert ("columns" in kind.split()) == ("───" in output)


def test_building_the_site_waits_for_no_device():
    """Where libtpu is installed, JAX would wait for a TPU."""
    code = "import os, build; print(os.environ['JAX_PLATFORMS'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "docs",
        env={k: x for k, x in os.environ.items() if k != "JAX_PLATFORMS"}
        | {"PYTHONPATH": f"{ROOT}:{ROOT / 'docs'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "cpu\n"


def test_notebooks_are_pages_with_their_pictures(site):
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [x for x in json.loads(path.read_text())["cells"] if x["cell_type"] == "code"]
        pictures = sum("image/png" in x.get("data", {}) for cell in cells for x in cell["outputs"])
        text = site[f"notebooks/{path.stem}/index.html"]
        assert (
            len(re.findall(rf'<img [^>]*src="(?:../)?{path.stem}-\d+.png"', text)) == pictures > 0
        )


# ------------------------------------------------------------------ the site as a whole


def test_nothing_is_loaded_from_elsewhere(site):
    loads = r"<(?:img|script|link\s[^>]*rel=\"?(?:stylesheet|icon|preconnect))\b[^>]*>"
    for path, text in site.items():
        tags = re.findall(loads, text)
        assert tags
        assert not [tag for tag in tags if re.search(r'(src|href)="?(\w+:)?//', tag)], path
        assert 'data-md-component="source"' not in text  # a script would ask the repository's host


def test_pages_show_the_version_the_next_page_and_where_to_edit_them(site):
    text = site["how-to/train/index.html"]
    assert f"version {clip_jax.__version__}" in text
    assert 'rel="edit"' in text
    assert "/edit/main/docs/how-to/train.md" in text
    assert "md-footer__link--next" in text
    assert "md-footer__link--prev" in text
    assert 'rel="edit"' not in site["reference/settings/model/index.html"]  # it is generated
    assert "/edit/main/notebooks/scaling.ipynb" in site["notebooks/scaling/index.html"]


def test_each_drawing_has_a_version_for_dark_pages(folder, site):
    seen = 0
    for path, text in site.items():
        for name in re.findall(r'src="([^"]*)\.svg#only-light"', text):
            assert f'src="{name}-dark.svg#only-dark"' in text
            dark = (folder / path).parent / f"{name}-dark.svg"
            background = re.search(r'id="patch_1">\s*<path [^>]*>', dark.read_text())
            assert background is None or 'style="fill: none"' in background[0]
            seen += 1
    assert seen >= 4


# Words of earlier versions, which nobody finds in the text any more, and what they are now.
EARLIER = {
    "table of words": "token-embedding",
    "never-seen numbers": "unseen-classes",
    "what ships inside": "bundled-digits",
    "own cosine": "warmup-stable-decay",
    "trunk": "parent-run",
    "one by one ≤": "sequential-bound",
    "hard ≤": "overlapped-bound",
    "compiler ≈": "schedule-estimate",
    "slices ms": "network-between-slices",
    "features of unit length": "embedding",
    "lies whole": "replicated",
    "encoding in chunks": "gradient-accumulation",
    "tides": "interleave",
    "peers": "reference-implementations",
}


def test_earlier_words_lead_to_the_glossary(folder, site):
    """In the search index; the page itself does not show them."""
    index = json.loads((folder / "search/search_index.json").read_text())["docs"]
    page = "reference/glossary/"
    texts = {doc["location"]: html.unescape(doc["text"]) for doc in index}
    text = re.sub(r"<span hidden[^>]*>.*?</span>", "", site[f"{page}index.html"])
    text = re.sub(r"<code>peers</code>", "", text)
    for word, term in EARLIER.items():
        assert word in texts[f"{page}#{term}"]
        assert word not in plain(text)
