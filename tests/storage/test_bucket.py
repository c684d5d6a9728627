"""Which bytes are read from an object, and when a range is requested again."""

import asyncio
import contextlib
import io
import itertools
import statistics
from collections import deque
from unittest import mock

import obstore
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from obstore.store import MemoryStore

from clip_jax.storage import bucket
from tests.clock import HandClock

# ------------------------------------------------------------------ which bytes


@contextlib.contextmanager
def stored(content):
    """Make a bucket with one object, whose answers are never late, even on a busy machine."""
    store = MemoryStore()
    obstore.put(store, "x", content)
    with (
        mock.patch.object(bucket, "_bucket", autospec=True, return_value=store),
        mock.patch.object(bucket, "CLOCK", HandClock()),
    ):
        yield


@given(
    length=st.integers(1, 60),
    ranges=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 12)), min_size=1, max_size=8),
    near=st.integers(0, 6),
    failing=st.sets(st.integers(0, 7), max_size=1),
)
@example(length=9, ranges=[(1, 0)], near=0, failing=set())
@example(length=60, ranges=[(40, 2), (0, 12), (2, 3), (15, 4)], near=3, failing=set())
@example(length=60, ranges=[(0, 4), (8, 2)], near=3, failing=set())
@example(length=39, ranges=[(59, 3), (17, 1), (39, 2), (2, 1), (31, 7)], near=0, failing={1})
def test_ranges_are_those_of_the_object_or_an_error(length, ranges, near, failing):
    """Ranges may be in any order, overlap, or extend beyond the end of the object. Those near each
    other are read by one request, which reads nothing else."""
    content = bytes(range(length))
    plain, spans = obstore.get_range_async, []

    async def request(store, path, *, start, end):
        spans.append((start, end))
        if len(spans) - 1 in failing:
            raise OSError("reset")
        return await plain(store, path, start=start, end=end)

    with (
        stored(content),
        mock.patch.object(bucket, "NEAR", near),
        mock.patch.object(bucket, "_seconds", deque(maxlen=64)),
        mock.patch.object(obstore, "get_range_async", autospec=True, side_effect=request),
    ):
        bucket.requested()
        try:
            parts = bucket.read_ranges("gs://b/x", ranges)
        except OSError:
            assert any(number < len(spans) for number in failing)
            return
    assert parts == [content[at : at + size] for at, size in ranges]
    spans.sort()
    assert all(a[1] + near < b[0] for a, b in itertools.pairwise(spans))
    wanted = {byte for at, size in ranges for byte in range(at, at + size)}
    for start, end in spans:
        assert {start, end - 1} <= wanted
        gaps = itertools.groupby(range(start, end), wanted.__contains__)
        assert all(len([*gap]) <= near for is_wanted, gap in gaps if not is_wanted)
    sizes = [len(content[start:end]) for start, end in spans]
    assert bucket.requested() == (len(spans), sum(sizes))


SEEKS = st.tuples(st.just("seek"), st.integers(-40, 120), st.sampled_from([0, 1, 2]))
READS = st.tuples(st.just("read"), st.integers(-1, 60)) | st.sampled_from([("readline",)])


@given(
    content=st.text("a\n", max_size=100).map(str.encode),
    block=st.integers(1, 40),
    calls=st.lists(SEEKS | READS, max_size=10),
)
def test_an_open_object_reads_as_a_file_on_a_disk(content, block, calls):
    expected = io.BytesIO(content)
    with stored(content), mock.patch.object(bucket, "BUFFER", block):
        file = bucket.open_object("gs://b/x")
        for name, *arguments in calls:
            if name == "seek":
                at, whence = arguments
                if at + (0, expected.tell(), len(content))[whence] < 0:
                    continue
            assert getattr(file, name)(*arguments) == getattr(expected, name)(*arguments)
            assert file.tell() == expected.tell()
        assert file.read() == expected.read()


# ------------------------------------------------------------------ repeated requests


def late_after(usual):
    """Return the seconds after which an answer is late: four times the median, at least 1."""
    return max(1.0, 4 * statistics.median(usual)) if usual else 1.0


WAITS = st.floats(0.1, 20)
ANSWERS = st.tuples(st.integers(0, 3), st.booleans())  # (number among pending requests, success)


@given(
    usual=st.lists(st.floats(0.1, 30), max_size=3),
    events=st.lists(WAITS | ANSWERS, max_size=12),
)
@example(usual=[], events=[0.9, 0.1, 1.9, 0.1, 4.0, 1000.0, (2, True)])  # four at a time
@example(usual=[1.0, 2.0, 30.0], events=[7.9, 0.2, (0, True)])
@example(usual=[], events=[1.0, (0, False), (0, True)])
@example(usual=[], events=[1.0, (1, False), (0, False)])
def test_a_late_answer_is_requested_again_and_the_first_good_one_counts(usual, events):
    """Requests are repeated at intervals that double, while fewer than four are pending. An error
    counts if no other request is pending."""
    clock, seconds, requests = HandClock(), deque(usual, maxlen=64), []

    def request(store, path, *, start, end):
        assert (store, path, start, end) == ("store", "key", 3, 7)
        requests.append(asyncio.get_running_loop().create_future())
        return requests[-1]

    async def turns():
        for _ in range(10):  # more turns of the event loop than the code needs
            await asyncio.sleep(0)

    async def main():
        task = asyncio.ensure_future(bucket._range("store", "key", 3, 7))
        late = late_after(usual)
        begun = clock.now()
        pending, expected, due = [0], 1, begun + late
        await turns()
        for event in [*events, (0, True)]:
            if isinstance(event, float):
                clock.advance(event)
                if len(pending) < 4 and clock.now() >= due:
                    late *= 2
                    pending.append(expected)
                    expected += 1
                    due = clock.now() + late
            else:
                number = pending.pop(event[0] % len(pending))
                if event[1]:
                    requests[number].set_result(b"%d" % number)
                else:
                    requests[number].set_exception(OSError(f"cut {number}"))
                    due = clock.now() + late
            await turns()
            assert len(requests) == expected
            assert task.done() == (isinstance(event, tuple) and (event[1] or not pending))
            if task.done():
                break
        if event[1]:
            assert task.result() == b"%d" % number
        else:
            with pytest.raises(OSError, match=f"cut {number}"):
                task.result()
        assert [*seconds] == [*usual, pytest.approx(clock.now() - begun)]
        assert all(request.cancelled() for i, request in enumerate(requests) if i in pending)

    with (
        mock.patch.object(obstore, "get_range_async", autospec=True, side_effect=request),
        mock.patch.object(bucket, "CLOCK", clock),
        mock.patch.object(bucket, "_seconds", seconds),
    ):
        asyncio.run(main())
