"""`prepare --index`: what it prints and refuses; its parts are tested in tests/contract."""

import json

import pytest

from clip_jax.cli import main
from tests.data.conftest import write_tar


def test_tars_on_disk_are_counted(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("1.jpg", b"x"), ("1.txt", b"one")])
    assert main(["prepare", f"{tmp_path}/*.tar", "--index", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shards": 1, "samples": 1}


@pytest.mark.parametrize("source", ["pairs.csv", "data"])
def test_what_has_no_index(source, capsys):
    assert main(["prepare", source, "--index"]) == 2
    assert "only tars" in capsys.readouterr().err
