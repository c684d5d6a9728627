"""The built site: nothing is missing, links lead somewhere, every command is two clicks away."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from clip_jax.cli import COMMANDS
from tests.conftest import ROOT


class Page(HTMLParser):
    """A page's links, pictures and anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.links, self.loads = path, [], []
        self.anchors = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors.add(values.get("id"))
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in ("img", "script") and values.get("src"):
            self.loads.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loads.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in folder.rglob("*.html")}


def target(page: Page, link: str, site: dict) -> tuple[Path, str] | None:
    """The file and the anchor that a link leads to; none if it leaves the site."""
    address, anchor = urldefrag(link)
    if urlsplit(link).scheme or link.startswith("//"):
        return None
    root = min(site, key=lambda path: len(path.parts)).parent
    if address.startswith("/"):  # of the page for what is not found
        path = root / unquote(address).lstrip("/")
    else:
        path = (page.path.parent / unquote(address)).resolve() if address else page.path
    return (path / "index.html" if path.is_dir() else path), unquote(anchor)


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    broken = []
    for page in site.values():
        for link in page.links + page.loads:
            place = target(page, link, site)
            if place is None:
                if link in page.loads:
                    broken.append(f"{page.path}: loads {link}")
                continue
            path, anchor = place
            if not path.exists():
                broken.append(f"{page.path}: {link}")
            elif anchor and path in site and anchor not in site[path].anchors | {"__top"}:
                broken.append(f"{page.path}: {link} (no such anchor)")
    assert not broken


def test_every_command_is_at_most_two_clicks_away(site):
    start = min(site, key=lambda path: len(path.parts)).parent / "index.html"
    reached = {(start, "")}
    for _ in range(2):
        pages = {path for path, _ in reached if path in site}
        found = (target(site[path], link, site) for path in pages for link in site[path].links)
        reached |= {place for place in found if place}
    anchors = {anchor for path, anchor in reached if path.parent.name == "commands"}
    assert {f"clip-jax-{name}" for name in COMMANDS} <= anchors


def test_every_module_that_says_what_it_is_stands_in_the_reference(site):
    anchors = set().union(*(page.anchors for page in site.values()))
    for name in ("clip_jax.load", "clip_jax.loading.Model", "clip_jax.train.train"):
        assert name in anchors
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "clip_jax").rglob("*.py")
        if not path.name.startswith("__")
    }
    unlisted = {
        f"clip_jax.{name}" for name in ("cli", "arguments", "refused", "serialize", "style")
    }
    assert modules - anchors == unlisted
