"""The built site. MkDocs itself, with `--strict`, checks that links and anchors lead somewhere."""

import os
import re
import subprocess
import sys

import pytest

from clip_jax.cli.commands import COMMANDS
from tests.conftest import ROOT

_NAMES = ("cli.arguments", "cli.commands", "display", "errors", "serialize")
UNLISTED = {f"clip_jax.{name}" for name in _NAMES}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages' texts by path."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.html")}


def anchors(text: str) -> set[str]:
    return set(re.findall(r'\sid="([^"]+)"', text))


def test_nothing_is_loaded_from_elsewhere(site):
    loads = r"<(?:img|script|link\s[^>]*rel=\"?(?:stylesheet|icon|preconnect))\b[^>]*>"
    for path, text in site.items():
        tags = re.findall(loads, text)
        assert tags
        assert not [tag for tag in tags if re.search(r'(src|href)="?(\w+:)?//', tag)], path


def test_every_command_is_one_click_away(site):
    """All are on one page, to which the start page links."""
    assert re.search(r'href="?reference/commands/', site["index.html"])
    commands = anchors(site["reference/commands/index.html"])
    assert {f"clip-jax-{name}" for name in COMMANDS} <= commands


def test_every_module_that_says_what_it_is_stands_in_the_reference(site):
    listed = set().union(*map(anchors, site.values()))
    assert {"clip_jax.load", "clip_jax.inference.loading.Model", "clip_jax.train.train"} <= listed
    paths = (ROOT / "clip_jax").rglob("[!_]*.py")
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    assert modules - listed == UNLISTED
