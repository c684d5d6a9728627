"""Duplicates, scores, a shuffle: all pairs joined, the same shards however the work is shared."""

import hashlib
import json

import numpy as np
import pytest

from clip_jax import files
from clip_jax.cli import main
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource, decode_example
from clip_jax.loading import load
from clip_jax.prepare import index, stages, writer
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.prepare.writer import describe, prepare
from clip_jax.refused import Refused
from tests.conftest import write_tiny_model
from tests.data.conftest import FORMATS
from tests.prepare.conftest import CHANGES, digests, jpeg, scene

NUMBER = 45


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


@pytest.fixture
def undrawn(monkeypatch):
    """Without pictures, which take most of the time of so few pairs."""
    monkeypatch.setattr(writer, "_draw", lambda *_: [])


def joined(source, folder, **fields):
    config = {"source": source, "destination": folder, "samples_per_shard": 8, "threads": 2}
    config |= {"drop_duplicates": True, "drop_near_duplicates": True, "shuffle": True}
    return PrepareConfig(**(config | fields))


def records(folder):
    source = ArrayRecordSource(ArrayRecordConfig(path=str(folder / "*.array_record")))
    return [decode_example(source._read(i, i + 1)[0]) for i in range(len(source))]


@pytest.mark.parametrize("format", ["tar", "parquet", "table"])
def test_pairs_are_deduplicated_and_shuffled_by_their_keys(format, pairs, tmp_path):
    (tmp_path / "in").mkdir()
    source = FORMATS[format](tmp_path / "in", pairs).path
    report = prepare(joined(source, tmp_path / "out", seed=3))
    assert report["counts"] == {
        "kept": NUMBER - 8, "near duplicate": 4, "duplicate image": 3, "not an image": 1,
    }  # fmt: skip
    assert " looks like " in report["examples"]["near duplicate"]
    found = records(tmp_path / "out")
    by_caption = {caption.encode(): image for _, image, caption in pairs[: NUMBER - 8]}
    assert {x["caption"][0]: x["image"][0] for x in found} == by_caption
    keys = [x["key"][0] for x in found]
    hashes = [hashlib.blake2b(x, digest_size=8, key=(3).to_bytes(8)).digest() for x in keys]
    assert hashes == sorted(hashes)
    assert keys != sorted(keys)
    assert [len(read_shard(path)) for path in shards(tmp_path / "out")] == [8, 8, 8, 8, 5]
    assert report["shards"] == {"written": 5, "of": 5}
    assert (tmp_path / "out/near_duplicates.png").exists()
    assert not (tmp_path / "out/work").exists()
    assert "4  near duplicate" in describe(report)


def shards(folder):
    return sorted(folder.glob("*.array_record"))


def read_shard(path):
    return ArrayRecordSource(ArrayRecordConfig(path=str(path)))


@pytest.mark.usefixtures("undrawn")
def test_the_shards_do_not_depend_on_how_the_work_is_shared(source, tmp_path):
    first = prepare(joined(source, tmp_path / "a"))
    for name, fields in {
        "b": {"threads": 1, "samples_per_task": 40},
        "c": {"threads": 4, "samples_per_task": 3},
    }.items():
        report = prepare(joined(source, tmp_path / name, **fields))
        assert digests(tmp_path / name) == digests(tmp_path / "a")
        assert report == first
    for part in ("2/3", "1/3", "3/3"):
        last = prepare(joined(source, tmp_path / "d", samples_per_task=4, part=part))
    assert digests(tmp_path / "d") == digests(tmp_path / "a")
    assert last["counts"] == first["counts"]
    assert digests(tmp_path / "a") != {}
    other = prepare(joined(source, tmp_path / "e", seed=1))
    assert other["counts"] == first["counts"]
    assert digests(tmp_path / "e").keys() == digests(tmp_path / "a").keys()
    assert digests(tmp_path / "e") != digests(tmp_path / "a")


@pytest.mark.usefixtures("undrawn")
def test_without_a_shuffle_the_order_is_the_source_s(source, tmp_path):
    for per_task in (3, 8, 50):
        config = joined(source, tmp_path / str(per_task), shuffle=False, samples_per_task=per_task)
        prepare(config)
        captions = [x["caption"][0].decode() for x in records(tmp_path / str(per_task))]
        assert captions == [f"text {i}" for i in range(NUMBER - 8)]


STAGES = {"read": 2, "find_same": 0, "find_alike": 7, "score": 2, "write": 2}  # tasks before a stop


@pytest.fixture(scope="module")
def whole(source, tiny, tmp_path_factory):
    """All stages, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    prepare(joined(source, folder, **with_scores(tiny)))
    return digests(folder)


def with_scores(tiny):
    return {"score_with": tiny, "top_share": 0.6, "samples_per_task": 9, "threads": 1}


@pytest.mark.long
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("stage", STAGES)
def test_a_stop_in_any_stage_loses_nothing_and_nothing_is_done_twice(
    stage, source, whole, tiny, tmp_path, monkeypatch
):
    how = with_scores(tiny)
    done: dict[str, list] = {name: [] for name in STAGES}
    fail = {stage}

    def watched(name, function):
        def work(*args):
            if name in fail and len(done[name]) == STAGES[name]:
                raise KeyboardInterrupt
            line = function(*args)
            done[name].append(str(args[-2]))
            return line

        return work

    for name in STAGES:
        monkeypatch.setattr(stages, name, watched(name, getattr(stages, name)))
    with pytest.raises(KeyboardInterrupt):
        prepare(joined(source, tmp_path / "out", **how))
    assert not (tmp_path / "out/_SUCCESS").exists()
    fail.clear()
    prepare(joined(source, tmp_path / "out", **how))
    assert digests(tmp_path / "out") == whole
    for name, tasks in done.items():
        assert len(tasks) == len(set(tasks)), name
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    prepare(joined(source, tmp_path / "out", **how))  # which finds the marker
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(folder)
    return folder


def test_scores_are_the_cosines_of_the_model(tiny, tmp_path):
    """Of several captions the mean; the top share is exact, and a bound holds before it."""
    (tmp_path / "in").mkdir()
    lines = []
    for i in range(30):
        (tmp_path / f"in/{i}.jpg").write_bytes(jpeg(scene(i)))
        captions = [f"text {i}", f"other {i}"] if i % 3 == 0 else f"text {i}"
        lines.append(json.dumps({"image": f"{i}.jpg", "caption": captions}))
    (tmp_path / "in/pairs.jsonl").write_text("\n".join(lines))
    model = load(tiny)
    cosines = []
    for line in lines:
        captions = json.loads(line)["caption"]
        captions = captions if isinstance(captions, list) else [captions]
        image = (tmp_path / "in" / json.loads(line)["image"]).read_bytes()
        seen = np.asarray(model.encode_image(model.preprocess([image])), np.float64)[0]
        said = np.asarray(model.encode_text(model.tokenize(captions, truncate=True)), np.float64)
        found = said @ seen / np.linalg.norm(said, axis=1) / np.linalg.norm(seen)
        cosines.append(found.mean())
    least = float(np.sort(cosines)[4]) - 1e-6
    config = PrepareConfig(
        source=str(tmp_path / "in/pairs.jsonl"),
        destination=tmp_path / "out",
        score_with=tiny,
        min_score=least,
        top_share=0.3,
        samples_per_shard=10,
        batch_size=4,
    )
    report = prepare(config)
    best = sorted(np.argsort(cosines)[::-1][:8].tolist())  # 30% of the 26 above the bound
    assert [x["caption"][0] for x in records(tmp_path / "out")] == [
        f"text {i}".encode() for i in best
    ]
    assert report["counts"] == {"score not in the top share": 18, "kept": 8, "score": 4}


def test_nothing_is_left(source, tmp_path):
    report = prepare(joined(source, tmp_path / "out", min_side=999))
    assert report["counts"] == {"image side": NUMBER - 1, "not an image": 1}
    assert report["shards"] == {"written": 0, "of": 0}
    assert (tmp_path / "out/_SUCCESS").exists()


@pytest.mark.usefixtures("undrawn")
def test_from_a_bucket_to_a_bucket(pairs, tmp_path, bucket):
    """By stretches, not a request a sample; the shards are those that a disk gets."""
    (tmp_path / "in").mkdir()
    FORMATS["tar"](tmp_path / "in", pairs)
    for path in (tmp_path / "in").glob("*.tar"):
        files.write_whole(f"{bucket.url}/in/{path.name}", path.read_bytes())
    out = files.place(f"{bucket.url}/out")
    source = f"{bucket.url}/in/*.tar"
    index.index(source, "1/1", "error")
    bucket.server.requests()
    report = prepare(joined(source, out, samples_per_task=15, drop_near_duplicates=False))
    asked = [x for x in bucket.server.requests() if "in/0000" in x.get("path", "")]
    assert len(asked) < NUMBER  # the headers are asked for as often as the tars are opened
    prepare(joined(source, tmp_path / "out", samples_per_task=15, drop_near_duplicates=False))
    here = digests(tmp_path / "out")
    assert report["counts"]["duplicate image"] == 3
    there = {x.name: hashlib.sha256(files.read(x)).hexdigest() for x in out.iterdir()
             if x.name.endswith(".array_record")}  # fmt: skip
    assert there == here
    assert (out / "_SUCCESS").exists()
    assert not list(files.walk(out / "work"))


@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_is_one_message_and_goes_on(source, tmp_path, monkeypatch):
    write, is_full = stages.buckets.write, [True]

    def full(path, parts):
        if is_full[0] and path.name == "000002.pairs":
            raise Refused(f"no space left for {path}: free some and go on.")
        write(path, parts)

    monkeypatch.setattr(stages.buckets, "write", full)
    with pytest.raises(ValueError, match=r"no space left for .*000002\.pairs"):
        prepare(joined(source, tmp_path / "out"))
    is_full[0] = False
    prepare(joined(source, tmp_path / "out"))
    prepare(joined(source, tmp_path / "other"))
    assert digests(tmp_path / "out") == digests(tmp_path / "other")


@pytest.mark.usefixtures("undrawn")
def test_the_command_says_what_it_did(source, tmp_path, capsys):
    args = ["prepare", source, str(tmp_path / "out"), "--drop-duplicates", "--shuffle", "--json"]
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["duplicate image"] == 3
    assert main([*args, "--seed", "1"]) == 2
    assert "begun with other settings" in capsys.readouterr().err
