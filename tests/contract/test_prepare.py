"""`prepare` from a bucket to a bucket, from an index that parts have made, and to a disk."""

import json
from unittest import mock

from clip_jax.cli.commands import main
from clip_jax.data.sources import tar_index
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.prepare.writer import prepare
from clip_jax.storage import files
from tests.data.conftest import FORMATS
from tests.prepare.conftest import digests, encoded


def test_shards_in_a_bucket_are_those_on_disk(tmp_path, gs, capsys):
    """Samples are read several at a time, with fewer requests than samples."""
    images = [encoded(20 + i % 27, 20) for i in range(30)]
    pairs = [(f"{i:02d}.png", image, f"text {i}") for i, image in enumerate(images)]
    (tmp_path / "in").mkdir()
    FORMATS["tar"](tmp_path / "in", pairs)
    for path in (tmp_path / "in").glob("*.tar"):
        files.write_whole(f"{gs.url}/in/{path.name}", path.read_bytes())
    out, source = files.as_path(f"{gs.url}/out"), f"{gs.url}/in/*.tar"
    command = ["prepare", source, "--index"]
    assert main([*command, "--worker", "2/2"]) == 0
    assert "others are still missing" in capsys.readouterr().out
    assert main([*command, "--worker", "1/2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shards": 3, "samples": 30}
    how = {"source": source, "samples_per_shard": 8, "samples_per_task": 10, "threads": 2}
    how |= {"drop_duplicates": True, "shuffle": True}
    gs.server.requests()
    again = AssertionError("a shard is indexed again")
    with mock.patch.object(tar_index, "index_shard", autospec=True, side_effect=again):
        report = prepare(PrepareConfig(destination=out, **how))
    reads = [x for x in gs.server.requests() if "in/0000" in x.get("path", "")]
    assert len(reads) < len(pairs)
    assert report["counts"] == {"kept": 27, "duplicate image": 3}
    prepare(PrepareConfig(destination=tmp_path / "out", **how))
    with files.local(out) as copied:
        assert digests(copied) == digests(tmp_path / "out")
    assert (out / "_SUCCESS").exists()
    assert not list(files.walk(out / "work"))
    left = tmp_path / "copied/.0.partial.pairs-00000-of-00004.array_record"
    left.parent.mkdir()
    left.touch()  # of a process that was killed
    prepare(PrepareConfig(source=source, destination=left.parent, samples_per_shard=8))
    assert not left.exists()
