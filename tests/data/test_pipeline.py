import contextlib
import csv
import dataclasses
import re
import threading
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import pieces, pipeline
from clip_jax.data.digits import DigitsConfig, DigitsSource
from clip_jax.data.pieces import Batch
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources import any as any_source
from tests.data import conftest as made
from tests.data.conftest import assert_same, digits, join, of_processes, open_pipeline, take

ORDER_OF_TEN = [[1, 2, 4, 5, 9, 7, 8, 6, 0, 3], [9, 6, 1, 8, 2, 0, 3, 5, 4, 7]]


def loading(load):
    """Digits are loaded by this function of index and generator."""

    class Fake(DigitsSource):
        def load(self, index, rng):
            return load(index, rng)

    return mock.patch.object(any_source, "DigitsSource", Fake)


def blank(index, rng):
    return np.zeros((8, 8, 3), np.uint8), "a caption"


def test_a_batch_is_what_the_step_takes():
    (batch,) = take(digits(), 1)
    assert batch.image.shape == (12, 8, 8, 3)
    assert batch.image.dtype == np.uint8
    assert batch.text.shape == (12, 16)
    assert batch.text.dtype == np.int32
    assert batch.index.tolist() == list(range(12))
    assert (batch.text[:, 0] == made.TOKENIZER.start_of_text).all()
    assert batch.skipped == []


@pytest.mark.parametrize(("processes", "start"), [(2, 4), (3, 0), (4, 4)])
def test_processes_hold_the_parts_of_the_same_batches(processes, start):
    wanted = take(digits(), 6)[start:]
    assert_same(wanted, of_processes(digits(), 6 - start, processes, start=start))


@pytest.mark.parametrize("start", [0, 3])
def test_a_batch_that_doubles_is_those_of_the_first_size_joined(start):
    """In the order of the data, from any step on; each process has its rows of every one."""
    single, doubled_at = take(digits(), 2 + 2 + 4, batch_size=4), (2, 3)
    wanted = [*single[:2], join(single[2:4]), join(single[4:8])][start:]
    how = {"start": start, "doubled_at": doubled_at, "batch_size": 4}
    assert_same(wanted, take(digits(), len(wanted), **how))
    for batch, joined in zip(wanted, of_processes(digits(), len(wanted), 2, **how), strict=True):
        assert sorted(joined.index.tolist()) == batch.index.tolist()


def test_threads_and_the_step_of_a_resumption_do_not_matter(tmp_path):
    path = made.write_pairs(tmp_path, 20)
    wanted = take(made.tabular(path, threads=0), 12, batch_size=4)
    for start, threads in ((0, 3), (1, 1), (4, 2), (5, 0), (9, 3)):
        config = made.tabular(path, threads=threads, prefetch=3)
        assert_same(wanted[start:], take(config, 12 - start, start=start, batch_size=4))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 20),
    per_process=st.integers(1, 5),
    counts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sizes=st.sampled_from([(8, 64), (1, 3)]),  # of a piece, at least and at most
    data=st.data(),
)
def test_every_sample_once_an_epoch(samples, per_process, counts, sizes, data):
    """Stopped at a random batch and resumed with another number of processes; also where epochs end
    within a batch, and where a batch is made in pieces."""
    batch_size = per_process * np.lcm(*counts).item()
    steps = -(-3 * samples // batch_size)
    stop = data.draw(st.integers(0, steps))
    # No threads: beartype draws from `random` in them, which hypothesis minds.
    config = digits(samples, threads=0)
    with loading(blank):
        with mock.patch.object(pieces, "_PIECE", sizes):
            first, second = (
                of_processes(config, count, processes, start=start, batch_size=batch_size)
                for start, count, processes in zip(
                    (0, stop), (stop, steps - stop), counts, strict=True
                )
            )
        whole = take(config, steps, batch_size=batch_size)
    keys = [key for batch in (*first, *second) for key in batch.keys]
    for epoch in range(3):
        assert len(set(keys[epoch * samples : (epoch + 1) * samples])) == samples
    assert keys == [key for batch in whole for key in batch.keys]


def test_the_order_is_a_public_format_and_another_for_each_seed():
    """A checkpoint only knows its step: another order would repeat and lose samples on resume."""
    with loading(blank):
        batches = [*take(digits(10), 2, batch_size=10), *take(digits(10, seed=1), 1, batch_size=10)]
    *found, other = ([int(key.removesuffix("/0")) for key in batch.keys] for batch in batches)
    assert found == ORDER_OF_TEN
    assert sorted(other) == list(range(10))
    assert other not in (*ORDER_OF_TEN, sorted(other))


def test_images_differ_between_epochs_and_seeds(tmp_path):
    path = made.write_pairs(tmp_path, 6)

    def by_key(batch):
        return dict(zip(batch.keys, batch.image, strict=True))

    first, second = map(by_key, take(made.tabular(path), 2, batch_size=6))
    (other,) = map(by_key, take(made.tabular(path, seed=1), 1, batch_size=6))
    assert any((first[key] != second[key]).any() for key in first)
    assert any((first[key] != other[key]).any() for key in first)
    centred = [by_key(batch) for batch in take(made.tabular(path, crop="center"), 2, batch_size=6)]
    for key, image in centred[0].items():
        np.testing.assert_array_equal(image, centred[1][key])


@pytest.fixture
def damaged(tmp_path):
    """20 pairs, of which the 4th, the 8th, the 9th and the 20th are bad."""
    path = made.write_pairs(tmp_path, 20)
    rows = list(csv.reader(path.read_text().splitlines(keepends=True)))
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
    config = made.tabular(damaged, max_bad_share=1.0)
    order = {}  # the rows that an undamaged table would give
    with loading(blank):
        for batch in take(dataclasses.replace(config, source=DigitsConfig(samples=20)), 4):
            order |= zip(batch.index.tolist(), batch.keys, strict=True)
    keys_of_digits = DigitsSource(DigitsConfig(samples=20), 8)
    rows = {keys_of_digits.key(i): i + 1 for i in range(20)}
    instead = {4: 5, 8: 10, 9: 10, 20: 1}
    reasons = {}
    for batch in take(config, 4):
        for position, key in zip(batch.index.tolist(), batch.keys, strict=True):
            wanted = rows[order[position]]
            assert row(key) == instead.get(wanted, wanted)
            events = [e for e in batch.skipped if e["position"] == position]
            failed = {8: [8, 9]}.get(wanted, [wanted] if wanted in instead else [])
            assert [row(e["key"]) for e in events] == failed
        reasons |= {row(e["key"]): e["reason"] for e in batch.skipped}
    assert set(reasons) == {4, 8, 9, 20}
    assert reasons[8] == "caption is empty"
    assert reasons[9].startswith("image file: No such file")
    assert all(reasons.values())


def test_each_skip_is_reported_once_across_a_resume(damaged):
    config = made.tabular(damaged, max_bad_share=1.0)
    whole, stopped, resumed = (
        [event for batch in take(config, count, start) for event in batch.skipped]
        for count, start in ((5, 0), (2, 0), (3, 2))
    )
    assert whole == stopped + resumed
    assert len({(event["position"], event["key"]) for event in whole}) == len(whole) > 0


def test_too_many_bad_samples_stop_the_run(damaged):
    with (
        mock.patch.object(pipeline, "_MIN_JUDGED", 40),
        pytest.raises(ValueError, match=r"of the first \d+ samples could not be read") as raised,
    ):
        take(made.tabular(damaged), 10)
    message = str(raised.value)
    assert "data.max_bad_share=0.05" in message
    assert "caption is empty" in message
    assert message.count(": ") >= 3


@pytest.mark.parametrize(("samples", "bad"), [(255, 255), (256, 23), (256, 24)])
def test_a_share_of_bad_samples_is_too_large_by_three_deviations(samples, bad):
    """From 256 samples on. Of several tries for one position, only one counts."""
    events = [{"position": i, "key": f"{i}", "reason": "why"} for i in range(bad)] * 2
    images, texts = np.zeros((samples, 1, 1, 3), np.uint8), np.zeros((samples, 0), np.int32)
    batch = Batch(images, texts, np.arange(samples), ["x"] * samples, events)
    with contextlib.ExitStack() as stack:
        if (samples, bad) == (256, 24):
            stack.enter_context(pytest.raises(ValueError, match="24 of the first 256 samples"))
        pipeline._BadShare(0.05).judge(batch)


def test_nothing_but_bad_samples(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("image,caption\n" + "gone.png,x\n" * 5)
    with pytest.raises(ValueError, match=r"5 samples in a row cannot be read, from '\d:gone\.png'"):
        take(made.tabular(path), 1)


@pytest.mark.parametrize("caption", ["", " \n", "\ud800 half a pair"])
def test_captions_that_are_no_text(caption):
    image = np.zeros((8, 8, 3), np.uint8)
    with (
        loading(lambda index, rng: (image, caption)),
        pytest.raises(ValueError, match=r"caption is (empty|not text)"),
    ):
        take(digits(), 1)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_in_a_thread_reaches_the_caller(threads):
    with loading(lambda index, rng: 1 / 0), pytest.raises(ZeroDivisionError):
        take(digits(threads=threads), 1)


def test_closing_ends_the_threads_and_their_work():
    loaded, closed = [], threading.Event()

    def load(index, rng):
        loaded.append(index)
        assert len(loaded) < 200 or closed.wait(60)
        return blank(index, rng)

    before = set(threading.enumerate())
    with loading(load):
        batches = open_pipeline(digits(threads=3, prefetch=100)).batches(0)
        next(batches)
        started = set(threading.enumerate()) - before
        assert started
        batches.close()
        closed.set()
        for thread in started:
            thread.join(timeout=60)
            assert not thread.is_alive()
    assert len(loaded) < 300  # of the 101 batches that were asked for


@pytest.mark.parametrize(
    "wrong",
    [
        *({"seed": -1}, {"workers": -1}, {"threads": -1}, {"prefetch": 0}),
        *({"crop_scale": (1.0, 0.9)}, {"max_bad_share": 5.0}),
    ],
)
def test_wrong_config(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"data.{name}={value} must")):
        DataConfig(**wrong)


def test_a_batch_that_processes_cannot_split():
    with pytest.raises(ValueError, match="batch_size=12 must be a positive multiple of the 5 proc"):
        open_pipeline(digits(), process_count=5)
