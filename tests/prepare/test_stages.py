"""Duplicates, scores, a shuffle: all pairs joined, the same shards however the work is shared."""

import csv
import hashlib
import json
from unittest import mock

import numpy as np
import pytest

from clip_jax.cli.commands import main
from clip_jax.engine import Here
from clip_jax.errors import InputError
from clip_jax.inference.loading import load
from clip_jax.prepare import stages
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.prepare.writer import describe, prepare
from tests.conftest import write_tiny_model
from tests.data.conftest import FORMATS
from tests.prepare.conftest import CHANGES, captions, digests, jpeg, records, scene

NUMBER = 29  # pairs, of which the last 8 are to be dropped


@pytest.fixture(scope="module")
def pairs():
    """Scenes; some of them twice, some changed, one broken."""
    images = [jpeg(scene(i)) for i in range(NUMBER - 8)]
    images += [images[3], images[20], images[3]]
    images += [jpeg(change(scene(5 + i))) for i, change in enumerate(CHANGES.values())]
    images += [b"broken"]
    return [(f"{i:02d}.jpg", image, f"text {i}") for i, image in enumerate(images)]


@pytest.fixture(scope="module")
def source(tmp_path_factory, pairs):
    return FORMATS["tar"](tmp_path_factory.mktemp("in"), pairs).path


def joined(source, folder, **fields):
    config = {"source": source, "destination": folder, "samples_per_shard": 8, "threads": 2}
    config |= {"drop_duplicates": True, "drop_near_duplicates": True, "shuffle": True}
    return PrepareConfig(**(config | fields))


@pytest.mark.parametrize("format", ["tar", "parquet", "table"])
def test_pairs_are_deduplicated_and_shuffled_by_their_keys(format, pairs, tmp_path):
    (tmp_path / "in").mkdir()
    source, out = FORMATS[format](tmp_path / "in", pairs).path, tmp_path / "out"
    report = prepare(joined(source, out, seed=3))
    assert report["counts"] == {
        "kept": NUMBER - 8,
        "near duplicate": 4,
        "duplicate image": 3,
        "not an image": 1,
    }
    assert "near duplicate of " in report["examples"]["near duplicate"]
    written = records(out)
    by_caption = {caption.encode(): image for _, image, caption in pairs[: NUMBER - 8]}
    assert {x["caption"][0]: x["image"][0] for x in written} == by_caption
    keys = [x["key"][0] for x in written]
    hashes = [hashlib.blake2b(x, digest_size=8, key=(3).to_bytes(8)).digest() for x in keys]
    assert hashes == sorted(hashes)
    assert keys != sorted(keys)
    shards = [json.loads(path.read_text()) for path in sorted(out.glob("pairs-*.json"))]
    assert [shard["counts"]["kept"] for shard in shards] == [8, 8, 5]
    assert report["shards"] == {"written": 3, "of": 3}
    assert not (out / "work").exists()
    assert "4  near duplicate" in describe(report)


def test_dropped_pairs_are_listed_with_the_reason(source, tmp_path):
    report = prepare(joined(source, tmp_path / "a", list_dropped=True))
    with (tmp_path / "a/dropped.csv").open(newline="") as file:
        rows = [(row["key"].rpartition(":")[2], row["reason"]) for row in csv.DictReader(file)]
    assert len(rows) == NUMBER - report["counts"]["kept"]
    assert rows[0][1].startswith("not an image")
    originals = [(int(key), int(reason.rpartition(":")[2])) for key, reason in rows[1:]]
    assert originals == [(21, 3), (22, 20), (23, 3), (24, 5), (25, 6), (26, 7), (27, 8)]
    copy = PrepareConfig(
        source=source, destination=tmp_path / "b", max_caption=6, list_dropped=True
    )
    prepare(copy)
    assert ":10,caption length: 7 characters" in (tmp_path / "b/dropped.csv").read_text()


def test_the_shards_do_not_depend_on_how_the_work_is_shared(source, tmp_path):
    first = prepare(joined(source, tmp_path / "a"))
    same = prepare(joined(source, tmp_path / "b", threads=4, samples_per_task=3))
    assert same == first
    assert digests(tmp_path / "b") == digests(tmp_path / "a") != {}
    for part in ("2/3", "1/3", "3/3"):
        last = prepare(joined(source, tmp_path / "c", samples_per_task=40, threads=1, worker=part))
    assert digests(tmp_path / "c") == digests(tmp_path / "a")
    assert last["counts"] == first["counts"]
    other = prepare(joined(source, tmp_path / "d", seed=1))
    assert other["counts"] == first["counts"]
    assert digests(tmp_path / "d").keys() == digests(tmp_path / "a").keys()
    assert digests(tmp_path / "d") != digests(tmp_path / "a")


@pytest.mark.parametrize("per_task", [3, 50])
def test_without_a_shuffle_the_order_is_the_source_s(per_task, source, tmp_path):
    prepare(joined(source, tmp_path / "out", shuffle=False, samples_per_task=per_task))
    assert captions(tmp_path / "out") == [[f"text {i}"] for i in range(NUMBER - 8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(path)
    return path


STAGES = {"read": 2, "find_same": 0, "find_alike": 7, "score": 2, "write": 2}  # tasks before a stop


def test_a_stop_in_any_stage_loses_nothing_and_does_nothing_twice(
    source, model, tmp_path, monkeypatch
):
    how = {"score_with": model, "top_share": 0.9, "samples_per_task": 7, "threads": 1}
    prepare(joined(source, tmp_path / "whole", **how))
    done: dict[str, list] = {name: [] for name in STAGES}
    stop_in = ""

    def watched(name, function):
        def work(*args):
            if name == stop_in and len(done[name]) == STAGES[name]:
                raise KeyboardInterrupt
            line = function(*args)
            done[name].append(str(args[-2]))
            return line

        return mock.create_autospec(function, side_effect=work)

    for name in STAGES:
        monkeypatch.setattr(stages, name, watched(name, getattr(stages, name)))
    out = tmp_path / "out"
    for stop_in in STAGES:  # each begins where the one before has stopped
        with pytest.raises(KeyboardInterrupt):
            prepare(joined(source, out, **how))
        assert len(done[stop_in]) == STAGES[stop_in]
        assert not (out / "_SUCCESS").exists()
    stop_in = ""
    prepare(joined(source, out, **how))
    assert digests(out) == digests(tmp_path / "whole") != {}
    for name, tasks in done.items():
        assert len(tasks) == len(set(tasks)) > 0, name
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    prepare(joined(source, out, **how))  # which finds the marker
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_each_stage_counts_its_samples(source, pairs, model, tmp_path):
    """By that the bar moves, and work ends where another thread has failed."""
    (tmp_path / "set").mkdir()
    test_set = FORMATS["tar"](tmp_path / "set", pairs[:3]).path
    counts: dict[str, list] = {}
    with_model = []

    def run(self, name, work, tasks, model=False):
        with_model.extend([name] * model)
        for task, size in tasks:
            done = []
            work(task, lambda indices: (done.append(index) or index for index in indices))  # noqa: B023
            counts.setdefault(name, []).append((len(done), size))

    how = {"score_with": model, "top_share": 0.9, "decontaminate": (test_set,)}
    with mock.patch.object(Here, "run", autospec=True, side_effect=run):
        prepare(joined(source, tmp_path / "out", **how))
        prepare(PrepareConfig(source=source, destination=tmp_path / "alone"))
    assert {*counts} == {"evaluation sets", "read", "compare", "hash", "score", "write", "prepare"}
    assert {*with_model} == {"score"}
    for name, tasks in counts.items():
        if name == "score":  # candidates alone
            assert 0 < sum(done for done, _ in tasks) < NUMBER
        else:
            assert all(done == size for done, size in tasks), name


@pytest.mark.parametrize("name", ["000001.pairs", "000001.rows", "alike-00003", "000001.scores"])
def test_a_stage_s_file_that_was_cut_is_named_and_made_again(name, source, model, tmp_path):
    """Else the pairs after the cut would be missing from the result."""
    how = {"score_with": model, "top_share": 0.9, "samples_per_task": 7}
    prepare(joined(source, tmp_path / "whole", **how))
    stop = mock.patch.object(stages, "write", autospec=True, side_effect=KeyboardInterrupt)
    with stop, pytest.raises(KeyboardInterrupt):
        prepare(joined(source, tmp_path / "out", **how))
    path = tmp_path / "out/work" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 8])
    with pytest.raises(InputError, match=f"{path} is damaged: .* Delete it and run the same"):
        prepare(joined(source, tmp_path / "out", **how))
    path.unlink()  # as the message says
    prepare(joined(source, tmp_path / "out", **how))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole") != {}


def test_scores_are_the_cosines_of_the_model(model, tmp_path):
    """Of several captions the mean; the top share is exact, and a bound holds before it."""
    loaded = load(model)
    lines, cosines = [], []
    for i in range(14):
        image = jpeg(scene(i))
        (tmp_path / f"{i}.jpg").write_bytes(image)
        texts = [f"text {i}", f"other {i}"] if i % 3 == 0 else [f"text {i}"]
        lines.append(json.dumps({"image": f"{i}.jpg", "caption": texts}))
        seen = np.asarray(loaded.encode_image(loaded.preprocess([image])), np.float64)[0]
        said = np.asarray(loaded.encode_text(loaded.tokenize(texts, truncate=True)), np.float64)
        each = said @ seen / np.linalg.norm(said, axis=1) / np.linalg.norm(seen)
        cosines.append(each.mean())
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    how = {"score_with": model, "min_score": float(np.sort(cosines)[4]) - 1e-6}
    how |= {"top_share": 0.3, "samples_per_shard": 10, "batch_size": 4}
    source = str(tmp_path / "pairs.jsonl")
    report = prepare(PrepareConfig(source=source, destination=tmp_path / "out", **how))
    best = sorted(np.argsort(cosines)[::-1][:3].tolist())  # 30% of the 10 above the bound
    assert [texts[0] for texts in captions(tmp_path / "out")] == [f"text {i}" for i in best]
    assert report["counts"] == {"score not in the top share": 7, "kept": 3, "score": 4}


def test_nothing_is_left(source, tmp_path):
    report = prepare(joined(source, tmp_path / "out", min_side=999))
    assert report["counts"] == {"image side": NUMBER - 1, "not an image": 1}
    assert report["shards"] == {"written": 0, "of": 0}
    assert (tmp_path / "out/_SUCCESS").exists()


def test_the_command_prints_its_report(source, tmp_path, capsys):
    args = ["prepare", source, str(tmp_path / "out"), "--drop-duplicates", "--shuffle", "--json"]
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["duplicate image"] == 3
