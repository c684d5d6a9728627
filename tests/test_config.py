"""A person's own file: what is wrong in it is said with its place, and never passes for success."""

from unittest import mock

import pytest

from clip_jax.cli.commands import main
from clip_jax.config import bundled_configs, load_config
from clip_jax.errors import InputError
from clip_jax.models import zoo
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import sys\nsys.exit(0)\n", ":2: SystemExit: 0"),
        ("import nowhere_at_all\n", ":1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("x = 1\ndef get_config(:\n", ":2: SyntaxError: invalid syntax"),
        ("x = '\x00'\n", ": "),
        ("x = 1\n", "must define get_config()"),
        ("get_config = 3\n", ": TypeError: 'int' object is not callable"),
        ("def get_config():\n    return 1\n", "must return a Config, not int"),
        ("from clip_jax.models import zoo\ndef get_config():\n    zoo.get('B')\n", ":3: no arch"),
    ],
)
def test_an_error_in_a_config_file_is_said_with_its_line(text, says, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith((f"clip-jax: {path}", f"clip-jax: get_config() in {path}"))
    assert says in line


def test_a_bug_of_ours_under_a_config_file_stays_a_bug(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from clip_jax.models import zoo\ndef get_config():\n    zoo.get('RN50')\n")
    with mock.patch.object(zoo, "ARCHITECTURES", None), pytest.raises(TypeError):
        load_config(path)


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe{}", b"[]", b'{"steps": "many"}', b'{"steps": 0}', b"[" * 100_000]
)
def test_a_damaged_config_json_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        load_config(path)


def test_a_config_that_ships_is_read_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without a folder configs/
    assert load_config("digits") == load_config(ROOT / "configs/digits.py")
    assert sorted(bundled_configs()) == sorted(x.stem for x in CONFIGS.glob("[!_]*.py"))
    for name in ("vit_b61", "digits.py"):
        with pytest.raises(
            InputError, match=rf"no config file at {name}; .* vit_b16, vit_b16_distilled, vit_b32"
        ):
            load_config(name)
    (tmp_path / "digits").write_text("")  # somebody's own file
    with pytest.raises(InputError, match="digits is not a Python file"):
        load_config("digits")
