"""Training data from a bucket, and by processes: what is asked for, and what a fault does."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from clip_jax.data import pipeline
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.order.mixture import MemberConfig, MixtureConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources import BlockSource, StoredSource, array_record
from clip_jax.data.sources.any import PathConfig, open_single
from clip_jax.data.sources.tar import TarConfig, TarSource
from clip_jax.storage import files
from tests.conftest import ROOT
from tests.data.conftest import COLUMNS, FORMATS, assert_same, make_pairs, take, write_tar

RNG = np.random.default_rng(0)
PAIRS = [(f"{i:02d}.jpg", bytes([i]) * 3_000, f"text {i}") for i in range(20)]


def upload(bucket, config, folder):
    """The same set in a bucket."""
    place = os.path.commonpath([config.path, str(folder)])
    for path in files.walk(place):
        files.write_whole(f"{bucket.url}/set{path.removeprefix(place)}", files.read(path))
    return dataclasses.replace(config, path=config.path.replace(place, f"{bucket.url}/set"))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_from_a_bucket_and_a_block_by_one_request(format, gs, tmp_path):
    remote = upload(gs, FORMATS[format](tmp_path, PAIRS), tmp_path)
    expected = [(image, text) for _, image, text in PAIRS]
    source = open_single(PathConfig(path=remote.path, **COLUMNS.get(format, {})), 16)
    assert isinstance(source, StoredSource)
    assert [source.load(i, RNG) for i in range(len(source))] == expected
    assert source.record(9).captions() == ["text 9"]
    if isinstance(source, BlockSource):
        spans = list(itertools.pairwise([0, *np.cumsum(source.blocks()).tolist()]))
        source = open_single(remote, 16)  # another, which keeps no row groups
        assert isinstance(source, BlockSource)
        gs.server.requests()
        records = [record for span in spans for record in source.fetch(*span)]
        assert len(gs.server.requests()) == len(spans)
        assert [record.load(RNG) for record in records] == expected


def test_the_index_of_tars_is_built_by_small_ranges_and_read_whole(gs, tmp_path):
    members = [(f"{i}.{x}", bytes(50_000)) for i in range(3) for x in ("jpg", "txt")]
    write_tar(tmp_path / "x.tar", members)
    for number in range(9):
        files.write_whole(f"{gs.url}/{number}.tar", (tmp_path / "x.tar").read_bytes())
    config = TarConfig(path=f"{gs.url}/{{0..8}}.tar")
    gs.server.requests()
    assert len(TarSource(config)) == 27
    asked = [one for one in gs.server.requests() if ".tar" in one["path"] and one["bytes"]]
    assert sum(one["bytes"] for one in asked) < 9 * 50_000
    assert len(TarSource(config, (2, 4))) == 27
    assert len(gs.server.requests()) <= 3  # a listing, and the file of all shards


def test_faults_of_a_bucket_lose_and_double_nothing(gs, tmp_path):
    """What a run reads from a faulty bucket is what it reads from disk."""
    local = FORMATS["array_record"](tmp_path, make_pairs(60))
    remote = upload(gs, local, tmp_path)
    with mock.patch.object(array_record, "_BLOCK_BYTES", 20_000):  # a few records: many requests
        wanted = take(DataConfig(source=local, order="blocks"), 10)
        gs.server.behave(faults={"503": 0.1, "429": 0.1, "cut": 0.1, "reset": 0.1}, only="GET")
        found = take(DataConfig(source=remote, read_ahead_mib=8), 10)
    assert {one["status"] for one in gs.server.requests()} > {429, 503}
    for first, second in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(first.image, second.image)
        assert [Path(key).name for key in first.keys] == [Path(key).name for key in second.keys]
        assert not second.skipped


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_worker_processes_do_not_matter(order, tmp_path):
    """Of a mixture with a bad image, resumed: the same batches, and the same events. In blocks,
    two workers have nine streams, so that one of them has nothing to do for the tenth piece."""
    pairs = [*make_pairs(40), ("broken.jpg", b"not an image", "a caption")]
    sources = (FORMATS["tar"](tmp_path, pairs), DigitsConfig(samples=9))
    config = DataConfig(
        source=MixtureConfig(members=tuple(MemberConfig(source=one) for one in sources)),
        order=order,
        max_bad_share=1.0,
        crop_scale=(0.3, 1.0),
        augment=pipeline.AugmentConfig(flip=0.5, color_jitter=0.5, grayscale=0.5),
    )
    wanted = take(config, 10, batch_size=9)
    assert any(batch.skipped for batch in wanted[2:])
    config = dataclasses.replace(config, workers=2, threads=1)
    assert_same(wanted[2:], take(config, 8, start=2, batch_size=9))


PROGRAM = """
import sys
import numpy as np
import clip_jax.data.images
assert "PIL.TiffImagePlugin" not in sys.modules  # Pillow's readers are loaded at the first image
from clip_jax.data.batch_plan import constant
from clip_jax.data.pipeline import DataConfig, build
from clip_jax.models.images import Square
from clip_jax.data.sources.tfds import TfdsConfig, TfdsSource
from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer
assert TfdsSource(TfdsConfig(path=sys.argv[1])).load(0, np.random.default_rng(0))[1] == "text 0"
assert "tensorflow" not in sys.modules
pipeline = build(DataConfig(threads=2, prefetch=8), constant(64, Square(16)),
                 tokenizer=ClipTokenizer(1024), context_length=16)
batches = pipeline.batches(0)
next(batches)
print("read", flush=True)
raise RuntimeError("the end")
"""


def test_a_program_ends_with_batches_in_flight_and_loads_no_more_than_it_needs(tmp_path):
    config = FORMATS["tfds"](tmp_path, PAIRS[:4])
    command = [sys.executable, "-c", PROGRAM, config.path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "read\n", done.stderr
    assert done.returncode == 1
    assert "RuntimeError: the end" in done.stderr
