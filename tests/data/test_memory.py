"""Memory stays flat, whatever is read and however long."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

from . import formats
from .test_formats import make_pairs


def grown(seconds, rate, photographs, folder):
    """By which part memory grew, from the second tenth of the time to the last one.

    Six formats at once, with a worker process and threads, and with images that cannot be read.
    """
    pairs = [*make_pairs(photographs, 500), ("broken.jpg", b"no image", "a caption")]
    folders = []
    for name in ("tar", "table", "parquet", "array_record", "saved_dataset", "tfds"):
        (folder / name).mkdir()
        config = formats.FORMATS[name](folder / name, pairs)
        folders.append(config.path)
    command = [sys.executable, str(Path(__file__).with_name("leak.py")), str(seconds), str(rate)]
    command += folders
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    held = found["bytes"]
    assert len(held) > 40
    tenth = len(held) // 10
    before, after = (statistics.median(part) for part in (held[tenth : 2 * tenth], held[-tenth:]))
    growth = after / before - 1
    print(f"{found['samples']:,} samples, {before / 2**20:.1f} MiB, grown by {growth:.2%}")
    return growth, found["samples"]


def test_a_minute_of_reading(photographs, tmp_path):
    """At a rate that leaves most of the machine to other tests: what leaks does so by sample."""
    growth, samples = grown(60, 300, photographs, tmp_path)
    assert growth < 0.02
    assert samples > 10_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_minutes_of_reading(photographs, tmp_path):
    growth, samples = grown(600, "inf", photographs, tmp_path)
    assert growth < 0.02
    assert samples > 300_000
