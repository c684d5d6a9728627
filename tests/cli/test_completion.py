"""The scripts for shells list what the commands take."""

import re
from collections.abc import Sequence

import pytest

from clip_jax.cli.commands import BENCH, embed, export
from clip_jax.cli.completion import script
from clip_jax.config_files import bundled_configs
from tests.conftest import ROOT


def bench(args: Sequence[str]) -> int:
    """Print help as `clip-jax bench` does, whose real one takes seconds."""
    assert args in (("--help",), ("input", "pairs", "--help-all"), ("step", "pairs", "--help-all"))
    verbs = "\n".join(f"  {verb}  About it." for verb in BENCH)
    print(verbs if len(args) == 1 else f"  --{args[0]} INT  A number. (default: 1)")
    return 0


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The words of each case of the script for bash; of two with a name, the later ones."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "220")
    text = script("bash", {"bench": bench, "embed": embed, "export": export})
    return {name: row.split() for name, row in re.findall(r'"(.*)"\) words="(.*)" ;;', text)}


def test_commands_verbs_and_configs_are_completed(words):
    assert words[""] == ["bench", "embed", "export"]
    assert words["completion"] == ["bash", "zsh"]
    assert words["bench"] == ["input", "step"]
    assert words["bench step"] == words["bench input"] == [*bundled_configs()]


def test_options_and_their_values_are_those_of_the_help(words):
    assert words["export --format"] == ["stablehlo", "onnx"]
    assert {"--help", "--json", "--format", "--verify", "--overwrite"} <= {*words["export"]}
    assert words["embed --dtype"] == ["float32", "bfloat16"]
    assert "--model" not in words["export"]  # an argument
    assert "embed --on" in words


def test_zsh_reads_the_script_of_bash():
    assert script("zsh", {}).endswith(script("bash", {}).partition("\n")[2])
