"""`prepare --index`: tars indexed in parts, before a run needs it."""

import json

import pytest

from clip_jax import files
from clip_jax.cli import main
from clip_jax.data.sources import tar_index
from clip_jax.data.sources.tar import TarConfig, TarSource
from tests.data.conftest import write_tar


def test_parts_make_the_index_that_a_run_opens(tmp_path, gs, capsys, monkeypatch):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.txt", b"one")])
    for number in range(3):
        files.write_whole(f"{gs.url}/{number}.tar", (tmp_path / "a.tar").read_bytes())
    command = ["prepare", f"{gs.url}/*.tar", "--index"]
    assert main([*command, "--part", "2/2"]) == 0
    assert "others are missing still" in capsys.readouterr().out
    assert main([*command, "--part", "1/2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shards": 3, "samples": 3}
    monkeypatch.setattr(tar_index, "index_shard", None)
    assert len(TarSource(TarConfig(path=f"{gs.url}/*.tar"))) == 3


@pytest.mark.parametrize("source", ["pairs.csv", "data"])
def test_what_has_no_index(source, capsys):
    assert main(["prepare", source, "--index"]) == 2
    assert "only tars" in capsys.readouterr().err
