"""Mutated files: no crash, no hang, and every bad sample has a place, a key and a reason."""

import io
import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.pipeline import DataConfig, build
from clip_jax.data.tokenizer import Tokenizer

from . import formats

TOKENIZER = Tokenizer(1024)
IMAGES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
CASES = ("tar", "table", "parquet", *IMAGES)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Change, cut out, repeat or cut off bytes."""
    content = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(len(content) or 1))
        match rng.integers(5):
            case 0:
                content[at : at + 1] = rng.bytes(1)
            case 1:
                content[at : at + 8] = b"\xff" * 8
            case 2:
                del content[at : at + int(rng.integers(1, 64))]
            case 3:
                content[at:at] = content[at : at + int(rng.integers(1, 64))]
            case _:
                if rng.random() < 0.2:
                    del content[at:]
    return bytes(content)


@pytest.fixture(scope="module")
def pairs(photographs):
    found = []
    for i, (name, image) in enumerate(photographs.items()):
        suffix = list(IMAGES)[i % 3]
        file = io.BytesIO()
        Image.fromarray(image[:32, :32]).save(file, IMAGES[suffix])
        found.append((f"{i}.{suffix}", file.getvalue(), f"a photo of {name}"))
    return found


def fuzz(case, count, pairs, folder):
    """Mutate a container, or images in a sound one, `count` times; how many did what."""
    folder.mkdir()
    format = formats.FORMATS["images_beside" if case in IMAGES else case]
    config = format(folder, pairs)
    suffix = {"table": "csv"}.get(case, case)
    victims = {path: path.read_bytes() for path in sorted(folder.glob(f"*.{suffix}"))}
    assert victims
    outcomes: Counter[str] = Counter()
    for number in range(count):
        rng = np.random.default_rng([CASES.index(case), number])
        path = list(victims)[number % len(victims)]
        path.write_bytes(mutate(victims[path], rng))
        try:
            pipeline = build(
                DataConfig(source=config, threads=0, max_bad_share=1.0),
                tokenizer=TOKENIZER,
                image_size=16,
                context_length=8,
                batch_size=len(pairs),
            )
            batches = pipeline.batches(0)
            (batch,) = itertools.islice(batches, 1)
            batches.close()
        except ValueError as error:  # the set as a whole; with its name
            named = str(folder) in str(error) or "samples in a row" in str(error)
            outcomes["refused" if named else str(error)] += 1
        else:
            assert all(event["key"] and event["reason"] for event in batch.skipped)
            assert batch.image.shape == (len(pairs), 16, 16, 3)
            outcomes["skipped" if batch.skipped else "fine"] += 1
        path.write_bytes(victims[path])
    return outcomes


@pytest.mark.parametrize("case", CASES)
def test_five_hundred_mutated_files(case, pairs, tmp_path):
    outcomes = fuzz(case, 84, pairs, tmp_path / "set")
    assert sum(outcomes.values()) == 84
    assert outcomes.keys() <= {"refused", "skipped", "fine"}
    assert outcomes["refused"] + outcomes["skipped"] > 8


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES)
def test_ten_thousand_mutated_files(case, pairs, tmp_path):
    assert fuzz(case, 1_670, pairs, tmp_path / "set").keys() <= {"refused", "skipped", "fine"}
