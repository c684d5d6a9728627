"""The parts of the site that come from elsewhere: reference, benchmarks, notebooks, drawings.

MkDocs calls this file as a hook; `python docs/build.py` writes the same files without MkDocs.
"""

import os
import re
from pathlib import Path
from typing import Any

# Nothing here needs a device. Where libtpu is installed, JAX would wait for a TPU for minutes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from builder import api, commands, drawings, notebooks, settings
from builder.search import ALIASES

DOCS = Path(__file__).parent
NOTEBOOKS = {
    "quickstart": "Quickstart",
    "zero_shot": "Zero-shot and features",
    "convert": "Convert to Hugging Face",
    "scaling": "Scaling laws",
    "free_tpu": "Free TPUs",
}
# The beginning of an output that has a table, whose heading is ruled off.
TABLE_OUTPUT = re.compile(r"^```text\n(?=(?:(?!```).*\n)*? *───)", re.M)


def write(path: Path, data: str | bytes) -> None:
    """Write what has changed: `mkdocs serve` watches the folder."""
    data = data.encode() if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != data:
        path.write_bytes(data)


def on_config(config: Any) -> Any:
    """Show the version, and list the commands, settings and notebooks in the navigation."""
    from clip_jax import __version__

    config.extra["version_shown"] = __version__
    config.copyright = f"clip_jax {__version__}"
    pages = {
        "Commands": [
            {"All commands": "reference/commands/index.md"},
            *({x.name: f"reference/commands/{x.page}"} for x in commands.all_commands()),
        ],
        "Settings": [
            {"All settings": "reference/settings/index.md"},
            *({x[0]: f"reference/settings/{name}.md"} for name, x in settings.PAGES.items()),
        ],
        "Python API": [
            {"Public API": "reference/library.md"},
            *({title: f"reference/{name}.md"} for name, (title, _) in api.PAGES.items()),
        ],
        "Notebooks": [{title: f"notebooks/{name}.md"} for name, title in NOTEBOOKS.items()],
    }
    fill(config.nav, pages)
    return config


def fill(nav: list[Any], pages: dict[str, list[dict[str, str]]]) -> None:
    """Fill the empty lists of the navigation by their titles."""
    for item in nav:
        for title, below in item.items() if isinstance(item, dict) else ():
            if below == []:
                item[title] = pages[title]
            elif isinstance(below, list):
                fill(below, pages)


def on_pre_build(config: Any = None) -> None:
    """Write everything."""
    listed = commands.all_commands()
    uses = settings.uses({x.name: x.kind for x in listed if x.kind})
    reference = DOCS / "reference"
    links = {kind: f"../settings/{settings.page_of(kind)}.md#{kind.__name__}" for kind in uses}
    write(reference / "settings/index.md", settings.index(uses))
    for name, text in settings.pages(uses).items():
        write(reference / f"settings/{name}.md", text)
    for name, text in commands.pages(listed, links).items():
        write(reference / f"commands/{name}", text)
    for name, text in api.pages().items():
        write(reference / name, text)
    measured = (DOCS.parent / "BENCHMARKS.md").read_text()
    write(reference / "benchmarks.md", re.sub(r"`docs/([\w/-]+\.md)`", r"[`\1`](../\1)", measured))
    for name, svg in drawings.pictures():
        write(DOCS / "explanation" / name, svg)
    for name in NOTEBOOKS:
        text, pictures = notebooks.page(name)
        write(DOCS / f"notebooks/{name}.md", text)
        for file, data in pictures.items():
            write(DOCS / f"notebooks/{file}", data)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Show each drawing in the colours of the page; mark outputs that are tables; link to the
    benchmarks; add search terms to the glossary."""
    to_reference = "../" * page.file.src_uri.count("/") + "reference/benchmarks.md"
    markdown = markdown.replace("`BENCHMARKS.md`", f"[`BENCHMARKS.md`]({to_reference})")
    if page.file.src_uri == "reference/glossary.md":
        for term, words in ALIASES.items():
            heading = re.search(rf"^## {re.escape(term)}\n", markdown, re.M)
            assert heading, f"the glossary has no term {term!r}, which {ALIASES[term]} lead to"
            span = f"\n<span hidden>{', '.join(words)}</span>\n"
            markdown = markdown[: heading.end()] + span + markdown[heading.end() :]
    folder = Path(page.file.abs_src_path or "").parent

    def both(match: re.Match[str]) -> str:
        text, name = match.groups()
        if not (folder / f"{name}-dark.svg").exists():
            return match[0]
        return f"![{text}]({name}.svg#only-light)![{text}]({name}-dark.svg#only-dark)"

    markdown = TABLE_OUTPUT.sub("```{.text .columns}\n", markdown)
    return re.sub(r"!\[([^\]]*)\]\(([\w/.-]+)\.svg\)", both, markdown)


def on_page_context(context: Any, page: Any, **_: Any) -> Any:
    """Let generated pages link to what they come from, or to nothing."""
    source = page.file.src_uri
    if source.startswith("notebooks/"):
        page.edit_url = page.edit_url.replace("/docs/notebooks/", "/notebooks/")[:-2] + "ipynb"
    elif source.startswith("reference/") and source != "reference/glossary.md":
        page.edit_url = None
    return context


if __name__ == "__main__":
    on_pre_build()
