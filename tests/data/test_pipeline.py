import csv
import dataclasses
import subprocess
import sys
import threading
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import mixture, pieces, pipeline
from clip_jax.data.digits import DigitsConfig, DigitsSource
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.table import TableConfig
from tests.data.conftest import TOKENIZER, assert_same, digits, join, open_pipeline, table, take

ORDER_OF_TEN = [1, 2, 4, 5, 9, 7, 8, 6, 0, 3], [9, 6, 1, 8, 2, 0, 3, 5, 4, 7]


def test_a_batch_is_what_the_step_takes():
    (batch,) = take(digits(), 1)
    assert batch.image.shape == (12, 8, 8, 3)
    assert batch.image.dtype == np.uint8
    assert batch.text.shape == (12, 16)
    assert batch.text.dtype == np.int32
    assert batch.index.tolist() == list(range(12))
    assert (batch.text[:, 0] == TOKENIZER.start_of_text).all()
    assert batch.skipped == []


@pytest.mark.parametrize("process_count", [2, 3, 4])
@pytest.mark.parametrize("start", [0, 4])
def test_processes_hold_the_parts_of_the_same_batches(process_count, start):
    whole = take(digits(), 7)[start:]
    parts = [
        take(digits(), 7 - start, start=start, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    for batch, part in zip(whole, zip(*parts, strict=True), strict=True):
        assert_same(batch, join(part))


@pytest.mark.parametrize("start", [0, 2, 3])
def test_a_batch_that_doubles_is_those_of_the_first_size_joined(start):
    """In the order of the data, from any step on; each process has its rows of every one."""
    single, doubled_at = take(digits(), 2 + 2 + 4), (2, 3)
    wanted = [*single[:2], join(single[2:4]), join(single[4:8])][start:]
    count = len(wanted)
    for first, second in zip(wanted, take(digits(), count, start, doubled_at), strict=True):
        assert_same(first, second)
    parts = [
        take(digits(), count, start, doubled_at, process_index=p, process_count=2) for p in (0, 1)
    ]
    for batch, part in zip(wanted, zip(*parts, strict=True), strict=True):
        assert sorted(join(part).index.tolist()) == batch.index.tolist()


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_do_not_matter(threads, write_pairs, tmp_path):
    path = write_pairs(tmp_path, 20)
    wanted = take(table(path), 6, batch_size=8)
    found = take(table(path, threads=threads, prefetch=3), 6, batch_size=8)
    for first, second in zip(wanted, found, strict=True):
        assert_same(first, second)


@pytest.mark.long
def test_workers_do_not_matter(write_pairs, tmp_path):
    """Three processes, one of them resumed, with a bad file: same batches, same events."""
    path = write_pairs(tmp_path, 20)
    (tmp_path / "images/0003.png").write_bytes(b"not an image")
    source = {"path": path, "max_bad_share": 1.0, "crop_scale": (0.3, 1.0)}
    augment = pipeline.AugmentConfig(flip=0.5, color_jitter=0.5, grayscale=0.5)
    wanted = take(table(**source, augment=augment), 7, batch_size=8)
    for workers, start in ((1, 0), (3, 2)):
        config = table(**source, augment=augment, workers=workers, threads=1)
        found = take(config, 5, start=start, batch_size=8)
        for first, second in zip(wanted[start : start + 5], found, strict=True):
            assert_same(first, second)
    assert any(batch.skipped for batch in wanted)


@pytest.mark.long
def test_a_mixture_with_workers_is_the_mixture(write_pairs, tmp_path):
    path = write_pairs(tmp_path, 20)
    members = tuple(
        mixture.MemberConfig(source=source, weight=weight)
        for source, weight in ((TableConfig(path=str(path)), 1.0), (DigitsConfig(samples=9), 2.0))
    )
    config = DataConfig(source=mixture.MixtureConfig(members=members))
    wanted = take(config, 6)
    found = take(dataclasses.replace(config, workers=1, threads=0), 4, start=2)
    for first, second in zip(wanted[2:], found, strict=True):
        assert_same(first, second)
    assert {key[0] for key in wanted[0].keys} == {"0", "1"}


@pytest.mark.parametrize("start", [1, 4, 5, 123])
def test_resumed_at_a_step_the_stream_goes_on(start, write_pairs, tmp_path):
    path = write_pairs(tmp_path, 20)
    whole = take(table(path), start + 3, batch_size=4)
    resumed = take(table(path), 3, start=start, batch_size=4)
    for first, second in zip(whole[start:], resumed, strict=True):
        assert_same(first, second)


def assert_once_an_epoch(samples, batch_size, before, after, sizes, data):
    """Stopped at a random batch and resumed with other numbers of processes and workers."""
    steps = -(-3 * samples // batch_size)
    stop = data.draw(st.integers(0, steps))
    keys = []
    with mock.patch.object(pieces, "_PIECE", sizes):
        for start, end, (count, workers) in ((0, stop, before), (stop, steps, after)):
            parts = [
                take(
                    # No threads: beartype draws from `random` in them, which hypothesis minds.
                    digits(samples, threads=0, workers=workers),
                    end - start,
                    start=start,
                    batch_size=batch_size,
                    process_index=p,
                    process_count=count,
                )
                for p in range(count)
            ]
            keys += [key for part in zip(*parts, strict=True) for key in join(part).keys]
    for epoch in range(3):
        assert len(set(keys[epoch * samples : (epoch + 1) * samples])) == samples
    whole = take(digits(samples, threads=0), steps, batch_size=batch_size)
    assert keys == [key for batch in whole for key in batch.keys]


PIECES = st.sampled_from([(8, 64), (1, 3)])  # at least and at most so many samples


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 40),
    per_process=st.integers(1, 5),
    counts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sizes=PIECES,
    data=st.data(),
)
def test_every_sample_once_an_epoch(samples, per_process, counts, sizes, data):
    """Also where epochs end within a batch, and where a batch is made in pieces."""
    batch_size = per_process * np.lcm(*counts).item()
    before, after = ((count, 0) for count in counts)
    assert_once_an_epoch(samples, batch_size, before, after, sizes, data)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 40),
    per_process=st.integers(1, 5),
    before=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 3])),
    after=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 3])),
    sizes=PIECES,
    data=st.data(),
)
def test_every_sample_once_an_epoch_with_workers(samples, per_process, before, after, sizes, data):
    assert_once_an_epoch(samples, 4 * per_process, before, after, sizes, data)


def test_epochs_and_seeds_differ_in_order():
    first, second = (batch.keys for batch in take(digits(), 2, batch_size=60))
    assert sorted(first) == sorted(second)
    assert first != second
    (other,) = take(digits(seed=1), 1, batch_size=60)
    assert sorted(other.keys) == sorted(first)
    assert other.keys != first
    assert first != sorted(first)


def test_the_order_is_a_public_format():
    """A checkpoint only knows its step: another order would repeat and lose samples on resume."""
    for batch, order in zip(take(digits(10), 2, batch_size=10), ORDER_OF_TEN, strict=True):
        assert [int(key.removesuffix("/0")) for key in batch.keys] == order


def test_images_differ_between_epochs_and_seeds(write_pairs, tmp_path):
    path = write_pairs(tmp_path, 6)

    def by_key(batch):
        return dict(zip(batch.keys, batch.image, strict=True))

    first, second = map(by_key, take(table(path), 2, batch_size=6))
    (other,) = map(by_key, take(table(path, seed=1), 1, batch_size=6))
    assert any((first[key] != second[key]).any() for key in first)
    assert any((first[key] != other[key]).any() for key in first)
    centred = [by_key(batch) for batch in take(table(path, crop="center"), 2, batch_size=6)]
    for key, image in centred[0].items():
        np.testing.assert_array_equal(image, centred[1][key])


@pytest.fixture
def damaged(write_pairs, tmp_path):
    """20 pairs, of which the 4th, the 8th, the 9th and the 20th are bad."""
    path = write_pairs(tmp_path, 20)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    (tmp_path / rows[4][0]).write_bytes(b"not an image")
    rows[8][1] = "  "
    (tmp_path / rows[9][0]).unlink()
    image = tmp_path / rows[20][0]
    image.write_bytes(image.read_bytes()[:100])
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def row(key):
    return int(key.split(":")[0])


def test_bad_samples_are_replaced_by_the_next_good_one(damaged):
    config = table(damaged, max_bad_share=1.0)
    order = {}  # the rows that an undamaged table would give
    for batch in take(dataclasses.replace(config, source=DigitsConfig(samples=20)), 6, 0):
        order |= zip(batch.index.tolist(), batch.keys, strict=True)
    keys_of_digits = DigitsSource(DigitsConfig(samples=20), 8)
    rows = {keys_of_digits.key(i): i + 1 for i in range(20)}
    instead = {4: 5, 8: 10, 9: 10, 20: 1}
    for batch in take(config, 6):
        for position, key in zip(batch.index.tolist(), batch.keys, strict=True):
            wanted = rows[order[position]]
            assert row(key) == instead.get(wanted, wanted)
            events = [e for e in batch.skipped if e["position"] == position]
            failed = {8: [8, 9]}.get(wanted, [wanted] if wanted in instead else [])
            assert [row(e["key"]) for e in events] == failed
    (epoch,) = take(config, 1, batch_size=20)
    reasons = {row(e["key"]): e["reason"] for e in epoch.skipped}
    assert set(reasons) == {4, 8, 9, 20}
    assert reasons[8] == "caption is empty"
    assert reasons[9].startswith("image file: No such file")
    assert all(reasons.values())


def test_each_skip_is_reported_once_across_a_resume(damaged):
    config = table(damaged, max_bad_share=1.0)
    whole = [event for batch in take(config, 10) for event in batch.skipped]
    stopped = [event for batch in take(config, 3) for event in batch.skipped]
    resumed = [event for batch in take(config, 7, start=3) for event in batch.skipped]
    assert whole == stopped + resumed
    assert len({(event["position"], event["key"]) for event in whole}) == len(whole) > 0


def test_too_many_bad_samples_stop_the_run(damaged):
    with pytest.raises(ValueError, match=r"of the first \d+ samples could not be read") as raised:
        take(table(damaged), 100)
    message = str(raised.value)
    assert "data.max_bad_share=0.05" in message
    assert "caption is empty" in message
    assert message.count(": ") >= 3
    assert len(take(table(damaged, max_bad_share=0.2), 100)) == 100


def test_nothing_but_bad_samples(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("image,caption\n" + "gone.png,x\n" * 5)
    with pytest.raises(ValueError, match=r"5 samples in a row cannot be read, from '\d:gone\.png'"):
        take(table(path), 1)


@pytest.mark.parametrize("caption", ["", " \n", "\ud800 half a pair"])
def test_captions_that_are_no_text(caption, monkeypatch):
    image = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(DigitsSource, "load", lambda self, index, rng: (image, caption))
    with pytest.raises(ValueError, match=r"caption is (empty|not text)"):
        take(digits(), 1)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_in_a_thread_reaches_the_caller(threads, monkeypatch):
    def load(self, index, rng):
        raise RuntimeError("a bug in a source")

    monkeypatch.setattr(DigitsSource, "load", load)
    with pytest.raises(RuntimeError, match="a bug in a source"):
        take(digits(threads=threads), 1)


def test_closing_ends_the_threads_and_their_work(monkeypatch):
    loaded, closed = [], threading.Event()

    def load(self, index, rng):
        loaded.append(index)
        assert len(loaded) < 200 or closed.wait(60)
        return np.zeros((8, 8, 3), np.uint8), "a caption"

    monkeypatch.setattr(DigitsSource, "load", load)
    before = set(threading.enumerate())
    batches = open_pipeline(digits(threads=3, prefetch=100)).batches(0)
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    closed.set()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert len(loaded) < 300  # of the 101 batches that were asked for


@pytest.mark.long
@pytest.mark.parametrize("end", ["", "raise RuntimeError('stop')"])
def test_the_process_ends_with_batches_in_flight(end):
    code = f"""
from clip_jax.data.pipeline import DataConfig, build
from clip_jax.data.tokenizers.clip import ClipTokenizer
pipeline = build(DataConfig(threads=2, prefetch=8), tokenizer=ClipTokenizer(1024), image_size=16,
                 context_length=16, batch_size=64)
batches = pipeline.batches(0)
next(batches)
print("read", flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "read\n"
    assert done.returncode == (1 if end else 0), done.stderr
    assert ("RuntimeError: stop" in done.stderr) == bool(end)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, r"data\.seed=-1 must be from 0"),
        ({"workers": -1}, r"data\.workers=-1 must be at least 0"),
        ({"crop_scale": (1.0, 0.9)}, r"data\.crop_scale=\(1\.0, 0\.9\) must rise"),
        ({"threads": -1}, r"data\.threads=-1 must be at least 0"),
        ({"prefetch": 0}, r"data\.prefetch=0 must be at least 1"),
        ({"max_bad_share": 5.0}, r"data\.max_bad_share=5\.0 must be from 0 to 1"),
    ],
)
def test_wrong_config(wrong, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**wrong)


def test_a_batch_that_processes_cannot_split():
    with pytest.raises(ValueError, match="batch_size=12 must be a positive multiple of the 5 proc"):
        open_pipeline(digits(), process_count=5)
