"""The same pairs in every format are the same batches."""

import io
import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.pipeline import DataConfig, build
from clip_jax.data.tokenizer import Tokenizer

from . import formats

TOKENIZER = Tokenizer(1024)


def make_pairs(photographs, count):
    pairs = []
    for i in range(count):
        name = list(photographs)[i % len(photographs)]
        file = io.BytesIO()
        suffix, how = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))[i % 3]
        Image.fromarray(np.roll(photographs[name], i, axis=1)).save(file, how)
        pairs.append((f"{i:05d}.{suffix}", file.getvalue(), f'{name}, "{i}"\nzwölf'))
    return pairs


def read(config, steps, batch_size):
    pipeline = build(
        DataConfig(source=config),
        tokenizer=TOKENIZER,
        image_size=16,
        context_length=16,
        batch_size=batch_size,
    )
    batches = pipeline.batches(0)
    taken = list(itertools.islice(batches, steps))
    batches.close()
    return pipeline.num_samples, taken


@pytest.fixture(scope="module")
def reference(photographs, tmp_path_factory):
    pairs = make_pairs(photographs, 200)
    config = formats.table(tmp_path_factory.mktemp("table"), pairs)
    return pairs, read(config, 5, 100)


def assert_same(format, pairs, expected, folder, steps, batch_size):
    folder.mkdir()
    config = formats.FORMATS[format](folder, pairs)
    count, batches = read(config, steps, batch_size)
    assert count == len(pairs) == expected[0]
    for wanted, found in zip(expected[1], batches, strict=True):
        for name in ("image", "text", "index"):
            assert getattr(wanted, name).tobytes() == getattr(found, name).tobytes(), name
        assert found.skipped == []
        seen = set(zip(found.index // count, found.keys, strict=True))
        assert len(seen) == len(found.keys)  # once an epoch


@pytest.mark.parametrize("format", formats.FORMATS)
def test_two_hundred_pairs_are_the_same_batches_in_every_format(format, reference, tmp_path):
    assert_same(format, *reference, tmp_path / "set", 5, 100)


@pytest.mark.slow
def test_two_thousand_pairs_are_the_same_batches_in_every_format(photographs, tmp_path):
    pairs = make_pairs(photographs, 2000)
    (tmp_path / "reference").mkdir()
    expected = read(
        formats.table(tmp_path / "reference", pairs), 17, 256
    )  # some batches lie in two epochs
    for format in formats.FORMATS:
        assert_same(format, pairs, expected, tmp_path / format, 17, 256)


def test_tfds_is_read_without_tensorflow(reference, tmp_path):
    config = formats.tfds(tmp_path, reference[0][:4])
    code = f"""
import sys, numpy
from clip_jax.data.sources.tfds import TfdsConfig, TfdsSource
source = TfdsSource(TfdsConfig(path={config.path!r}))
print(len(source), repr(source.load(0, numpy.random.default_rng(0))[1]))
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"4 {reference[0][0][2]!r}\n", done.stderr
