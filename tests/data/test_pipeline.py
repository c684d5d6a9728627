import contextlib
import dataclasses
import io
import json
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import grain
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data import digits as digits_module
from clip_jax.data.augment import Augmentation, AugmentConfig, replay
from clip_jax.data.digits import DigitsSource
from clip_jax.data.further import parts
from clip_jax.data.order import batches
from clip_jax.data.order.mixture import MemberConfig, MixtureConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.reinforced import Reinforcement, to_features, to_members
from clip_jax.data.sources import SampleError
from clip_jax.data.sources.array_record import ArrayRecordConfig, encode_example
from clip_jax.data.sources.image_folder import FolderConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.data.sources.text_table import TableConfig
from clip_jax.errors import InputError
from clip_jax.models.images import NaFlex, Square, concatenate
from clip_jax.models.inputs import (
    CountInput,
    FurtherTexts,
    ImageInput,
    LabelInput,
    MaskInput,
    StoredInput,
    TextInput,
    ViewInput,
)
from clip_jax.models.text import TextConfig
from tests.data import conftest as made
from tests.data.conftest import assert_same, digits, join, of_processes, open_pipeline, take

ORDER_OF_TEN = [[1, 2, 4, 5, 9, 7, 8, 6, 0, 3], [9, 6, 1, 8, 2, 0, 3, 5, 4, 7]]


def loading(load):
    """Digits are loaded by this function of index and generator."""

    class Fake(DigitsSource):
        def load(self, index, rng):
            return load(index, rng)

    return mock.patch.object(digits_module, "DigitsSource", Fake)


def blank(index, rng):
    return np.zeros((8, 8, 3), np.uint8), "a caption"


@pytest.mark.parametrize(("processes", "start"), [(2, 4), (3, 0), (4, 4)])
def test_processes_hold_the_parts_of_the_same_batches(processes, start):
    wanted = take(digits(), 6)[start:]
    assert_same(wanted, of_processes(digits(), 6 - start, processes, start=start))
    last = take(digits(), 1, process=(processes - 1, processes), start=start)[0]
    share = 12 // processes
    np.testing.assert_array_equal(last.arrays["row"], np.arange(12 - share, 12))


@pytest.mark.parametrize("start", [0, 3])
def test_a_batch_that_doubles_is_those_of_the_first_size_joined(start):
    """In the order of the data, from any step on, on any number of processes."""
    single, doubled_at = take(digits(), 2 + 2 + 4, batch_size=4), (2, 3)
    wanted = [*single[:2], join(single[2:4]), join(single[4:8])][start:]
    how = {"start": start, "doubled_at": doubled_at, "batch_size": 4}
    assert_same(wanted, take(digits(), len(wanted), **how))
    assert_same(wanted, of_processes(digits(), len(wanted), 2, **how))


def test_threads_and_the_step_of_a_resumption_do_not_matter(tmp_path):
    source = made.table(tmp_path, made.make_pairs(20))
    wanted = take(DataConfig(source=source, threads=0), 12, batch_size=4)
    for start, threads in ((0, 3), (1, 1), (4, 2), (5, 0), (9, 3)):
        config = DataConfig(source=source, threads=threads, prefetch=3)
        assert_same(wanted[start:], take(config, 12 - start, start=start, batch_size=4))


@given(
    samples=st.integers(1, 20),
    per_process=st.integers(1, 5),
    counts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sizes=st.sampled_from([(8, 64), (1, 3)]),  # of a piece, at least and at most
    doubled_at=st.sets(st.integers(1, 3)).map(sorted),
    data=st.data(),
)
def test_every_sample_once_an_epoch(samples, per_process, counts, sizes, doubled_at, data):
    """Also if a run is resumed with another number of processes, if an epoch ends within a batch,
    if a batch is made in pieces, and if its size doubles."""
    batch_size = per_process * np.lcm(*counts).item()
    steps = min(-(-3 * samples // batch_size), 12)
    stop = data.draw(st.integers(0, steps))
    # No threads: beartype uses `random` in them, which Hypothesis does not allow.
    config = digits(samples, threads=0)
    how: dict[str, Any] = {"batch_size": batch_size, "doubled_at": doubled_at}
    with (
        loading(blank),
        mock.patch.object(batches, "_PIECE", sizes),
        # grain's permutations of few numbers are slow.
        mock.patch.object(grain.MapDataset, "shuffle", lambda dataset: dataset),
    ):
        made = [
            *of_processes(config, stop, counts[0], **how),
            *of_processes(config, steps - stop, counts[1], start=stop, **how),
        ]
    keys = [key for batch in made for key in batch.keys]
    key = DigitsSource(config.source, 8).key
    assert keys == [key(at % samples) for at in range(len(keys))]
    doublings = [sum(at <= step for at in doubled_at) for step in range(steps)]
    assert [len(batch.keys) for batch in made] == [batch_size << count for count in doublings]


def test_the_order_is_a_public_format_and_another_for_each_seed():
    """A checkpoint only knows its step: another order would repeat and lose samples on resume."""
    with loading(blank):
        batches = [*take(digits(10), 2, batch_size=10), *take(digits(10, seed=1), 1, batch_size=10)]
    assert batches[1].index.tolist() == list(range(10, 20))
    assert batches[1].text.shape == (10, 16)
    *found, other = ([int(key.removesuffix("/0")) for key in batch.keys] for batch in batches)
    assert found == ORDER_OF_TEN
    assert sorted(other) == list(range(10))
    assert other not in (*ORDER_OF_TEN, sorted(other))


def test_images_differ_between_epochs_and_seeds(tmp_path):
    config = DataConfig(source=made.table(tmp_path, made.make_pairs(6)))

    def epochs(count, **fields):
        batches = take(dataclasses.replace(config, **fields), count, batch_size=6)
        return [dict(zip(batch.keys, batch.image, strict=True)) for batch in batches]

    (first, second), (other,) = epochs(2), epochs(1, seed=1)
    assert any((first[key] != second[key]).any() for key in first)
    assert any((first[key] != other[key]).any() for key in first)
    np.testing.assert_equal(*epochs(2, crop="center"))


def test_bad_samples_are_replaced_by_the_next_good_one_and_reported_once():
    """Also where a run is resumed."""

    def load(index, rng):
        if index in (3, 8, 19):
            raise SampleError("why")
        return blank(index, rng)[0], " \n" if index == 7 else "a caption"

    config = digits(20)
    with loading(blank):
        good = take(config, 5)
    with loading(load):
        found = take(config, 5)
        assert_same(found, [*take(config, 2), *take(config, 3, start=2)])
    keys = [DigitsSource(config.source, 8).key(i) for i in range(20)]
    instead, failed = {3: 4, 7: 9, 8: 9, 19: 0}, {3: [3], 7: [7, 8], 8: [8], 19: [19]}
    for wanted, batch in zip(good, found, strict=True):
        records = [keys.index(key) for key in wanted.keys]
        assert batch.keys == [keys[instead.get(i, i)] for i in records]
        assert batch.skipped == [
            {"position": at, "key": keys[x], "reason": "caption is empty" if x == 7 else "why"}
            for at, i in zip(batch.index.tolist(), records, strict=True)
            for x in failed.get(i, [])
        ]


@pytest.mark.parametrize(("samples", "bad"), [(255, 200), (256, 23), (256, 24)])
def test_a_share_of_bad_samples_is_too_large_by_three_deviations(samples, bad):
    """From 256 samples on. Of several tries for one position, only one counts."""

    def load(index, rng):
        if index < bad:
            raise SampleError("why")
        return blank(index, rng)

    message = r"24 of the first 256 samples .*_share=0\.05.*first: (\d+/\d: why[.;] ){3}Repair"
    stops = pytest.raises(ValueError, match=message)
    with loading(load), stops if (samples, bad) == (256, 24) else contextlib.nullcontext():
        take(digits(samples), 1, batch_size=samples)


def test_nothing_but_bad_samples():
    message = r"60 samples in a row cannot be read, from '\d+/0' on: caption is not text"
    with (
        loading(lambda index, rng: (np.zeros((8, 8, 3), np.uint8), "\ud800 half a pair")),
        pytest.raises(ValueError, match=message),
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


def test_a_crop_scale_that_falls_and_a_batch_that_processes_cannot_split():
    with pytest.raises(ValueError, match=r"data.crop_scale=\(1.0, 0.9\) must be in asc"):
        DataConfig(crop_scale=(1.0, 0.9))
    with pytest.raises(ValueError, match="batch_size=12 must be a positive multiple of the 5 proc"):
        open_pipeline(digits(), process=(0, 5))


# ------------------------------------------------------------------ further inputs

TEACHERS = {
    "same": ImageInput(Square(8)),
    "larger": ImageInput(Square(16)),
    "patches": ImageInput(NaFlex(16, 4)),
    "tokens": TextInput(TextConfig(context_length=12)),
}


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_a_teacher_sees_the_same_crop_flip_and_colours_at_its_own_size(order, tmp_path):
    augment = AugmentConfig(flip=0.5, color_jitter=0.5)
    source = made.tar(tmp_path, made.make_pairs(24))
    config = DataConfig(source=source, crop_scale=(0.3, 1.0), augment=augment, order=order)
    [alone], [batch] = take(config, 1), take(config, 1, inputs=TEACHERS)
    assert_same([alone], [dataclasses.replace(batch, inputs={})])
    assert batch.inputs.keys() == TEACHERS.keys()
    np.testing.assert_array_equal(batch.inputs["same"], batch.image)
    assert batch.inputs["larger"].shape == (12, 16, 16, 3)
    halves = batch.inputs["larger"].reshape(12, 8, 2, 8, 2, 3).mean((2, 4))
    other = np.roll(np.asarray(batch.image), 1, axis=0)
    own, other = (abs(halves - images).mean() for images in (batch.image, other))
    assert own < other / 3  # pictures of noise: any other crop differs as much as another picture
    assert batch.inputs["patches"].pixels.shape == (12, 16, 48)
    assert batch.inputs["tokens"].shape == (12, 12)
    parts = [take(config, 1, process=(i, 2), inputs=TEACHERS)[0] for i in (0, 1)]
    larger = np.concatenate([part.inputs["larger"] for part in parts])
    if order == "global":
        np.testing.assert_array_equal(larger, batch.inputs["larger"])


VIEWS = {
    "complete": ViewInput(Square(40), 1),
    "crops": ViewInput(Square(8), 3, (0.1, 0.4), flip=0.5, color_jitter=0.8, grayscale=0.2),
    "of_patches": ViewInput(NaFlex(12, 4), 1, (0.5, 1.0)),
    "masked": MaskInput("complete", 25, 0.5),
    "masked_of_patches": MaskInput("of_patches", 12, 0.5),
}


def test_views_have_crops_of_their_own_which_depend_on_seed_and_position_alone(tmp_path):
    source = made.tar(tmp_path, made.make_pairs(24))
    config = DataConfig(source=source, order="global")
    [alone, _], [batch, later] = take(config, 2), take(config, 2, inputs=VIEWS)
    assert_same([alone], [dataclasses.replace(batch, inputs={})])  # the image is as without views
    assert batch.inputs["complete"].shape == (12, 1, 40, 40, 3)
    crops = batch.inputs["crops"]
    assert crops.shape == (12, 3, 8, 8, 3)
    assert len(np.unique(crops.reshape(36, -1), axis=0)) == 36
    patches = batch.inputs["of_patches"]
    assert (patches.pixels.shape, patches.length.shape) == ((12, 1, 12, 48), (12, 1))
    assert take(config, 2, inputs=dict(reversed(VIEWS.items())))[1].inputs.keys() == VIEWS.keys()
    parts = [take(config, 1, process=(i, 2), inputs=VIEWS)[0].inputs for i in (0, 1)]
    jax.tree.map(np.testing.assert_array_equal, concatenate(parts), batch.inputs)
    [resumed] = take(config, 1, start=1, inputs={"crops": VIEWS["crops"]})
    np.testing.assert_array_equal(resumed.inputs["crops"], later.inputs["crops"])


def test_masks_have_their_share_of_the_patches_that_a_view_has(tmp_path):
    pairs = []
    for number, (name, image, text) in enumerate(made.make_pairs(12)):
        file = io.BytesIO()
        Image.open(io.BytesIO(image)).resize((20 + 5 * number, 20)).save(file, "PNG")
        pairs.append((Path(name).with_suffix(".png").name, file.getvalue(), text))
    [batch] = take(DataConfig(source=made.tar(tmp_path, tuple(pairs))), 1, inputs=VIEWS)
    masked = batch.inputs["masked"]
    assert masked.shape == (12, 12)
    assert (np.diff(masked) > 0).all()
    assert (masked.min(), masked.max()) == (0, 24)
    lengths = batch.inputs["of_patches"].length[:, 0]
    assert len({*lengths.tolist()}) > 1
    for row, length in zip(batch.inputs["masked_of_patches"], lengths, strict=True):
        count = round(length / 2)
        assert (row[:count] >= 0).all()
        assert (row[:count] < length).all()
        assert (row[count:] == -1).all()


def reinforced(folder, count=24):
    """Pairs with two captions, three synthetic ones and four augmentations; the embeddings of the
    n-th pair are its number, and the number of the caption or augmentation, both from 1."""
    records = []
    for n, (_, image, text) in enumerate(made.make_pairs(count)):
        rows = [np.float32(np.stack([np.full(k, n), np.arange(k)], 1) + 1) for k in (4, 2, 3)]
        boxes = [(4 * i, i, 40 - 4 * i, 30) for i in range(4)]
        more = Reinforcement(
            augmentations=tuple(Augmentation(box, i % 2 == 1, ()) for i, box in enumerate(boxes)),
            size=8,
            image=rows[0],
            text=rows[1],
            synthetic=tuple(f"synthetic {i} of {n}" for i in range(3)),
            synthetic_text=rows[2],
        )
        captions = [f"{text} {i} of {n}".encode() for i in range(2)]
        example = {"image": [image], "caption": captions, **to_features(more, "float16", [2])}
        records.append((image, more, encode_example(example)))
    path = folder / "pairs.array_record"
    made.write_records(path, "group_size:1", (record for _, _, record in records))
    return ArrayRecordConfig(path=str(path)), records


STORED = {f"stored_{of}": StoredInput(of, (2,)) for of in ("image", "text", "synthetic")}
TEXT = TextConfig(context_length=16, vocab_size=1024)
TOKENS = {"synthetic": TextInput(TEXT, synthetic=True)}


@pytest.mark.parametrize("order", ["global", "blocks"])
@pytest.mark.parametrize("in_mixture", [False, True])
def test_stored_embeddings_are_of_the_augmentation_and_caption_that_are_drawn(
    order, in_mixture, tmp_path
):
    source, records = reinforced(tmp_path)
    if in_mixture:
        source = MixtureConfig(members=(MemberConfig(source=source),))
    config = DataConfig(source=source, crop="stored", order=order)
    batches = take(config, 4, inputs={**STORED, **TOKENS, "larger": ImageInput(Square(16))})
    drawn = set()
    for batch in batches:
        of = {name: x.astype(int) - 1 for name, x in batch.inputs.items() if name in STORED}
        for row, (n, number) in enumerate(of["stored_image"]):
            image, more, _ = records[n]
            seen = replay(image, more.augmentations[number], [Square(8), Square(16)], 8)
            np.testing.assert_array_equal(batch.image[row], seen[0])
            np.testing.assert_array_equal(batch.inputs["larger"][row], seen[1])
            (m, i), (k, j) = of["stored_text"][row], of["stored_synthetic"][row]
            assert n == m == k
            tokens = made.TOKENIZER([f"{made.make_pairs(24)[n][2]} {i} of {n}"], 16, True)
            np.testing.assert_array_equal(batch.text[row], tokens[0][:16])
            tokens = made.TOKENIZER([f"synthetic {j} of {n}"], 16, True)
            np.testing.assert_array_equal(batch.inputs["synthetic"][row], tokens[0])
            drawn |= {("image", number), ("text", i), ("synthetic", j)}
    assert len(drawn) == 4 + 2 + 3


def test_a_synthetic_caption_replaces_the_true_one_by_a_ratio(tmp_path):
    source, _ = reinforced(tmp_path)
    for ratio, least, most in ((0.0, 0, 0), (0.5, 12, 36), (1.0, 48, 48)):
        config = DataConfig(source=source, crop="stored", synthetic_ratio=ratio)
        inputs = STORED if ratio else {"stored_text": STORED["stored_text"]}
        count = 0
        for batch in take(config, 4, inputs=inputs):
            is_synthetic = batch.text[:, 1] == made.TOKENIZER(["synthetic"], 16, True)[0, 1]
            if ratio:
                text, other = (batch.inputs[f"stored_{x}"] for x in ("text", "synthetic"))
                assert (text[is_synthetic] == other[is_synthetic]).all()
            count += is_synthetic.sum()
        assert least <= count <= most


def embedded(row):
    """What is stored with a pair that has one augmentation and one caption."""
    row = np.asarray([row], np.float32)
    return Reinforcement((Augmentation(),), 8, image=row, text=row)


ROW = np.arange(1, 25)  # by teachers of widths 16 and 8


def two_teachers(folder, first, layout="records"):
    """24 pairs with embeddings by two teachers, of which the first has these features."""
    members, records = [], []
    for number, (name, image, text) in enumerate(made.make_pairs(24)):
        key, more = name.partition(".")[0], embedded(ROW)
        features = to_features(more, "float16", (16, 8)) if number else first
        records.append(encode_example({"image": [image], "caption": [text.encode()], **features}))
        members += [(name, image), (f"{key}.txt", text.encode())]
        members += [(f"{key}.{suffix}", content) for suffix, content in to_members(more).items()]
    if layout == "tar":
        made.write_tar(folder / "pairs.tar", members)
        return TarConfig(path=str(folder / "pairs.tar"))
    made.write_records(folder / "pairs.array_record", "group_size:1", records)
    return ArrayRecordConfig(path=str(folder / "pairs.array_record"))


ABSENT = to_features(Reinforcement((Augmentation(),), 8), "float16", ())


@pytest.mark.parametrize(
    ("layout", "widths", "message"),
    [
        ("records", (16, 8), None),
        ("records", (8, 16), r"width \(16, 8\), but need \(8, 16\) \(sample '.*:1'\): set one"),
        ("records", (24,), r"image embeddings with width \(16, 8\), but need \(24,\)"),
        ("tar", (16, 8), None),
        ("tar", (8, 8), r"with width 24, but need \(8, 8\)"),
    ],
)
def test_widths_of_stored_embeddings_are_those_of_the_teachers_one_by_one(
    layout, widths, message, tmp_path
):
    """Only their sum was compared, so that a teacher's values were taken for another's."""
    source = two_teachers(tmp_path, ABSENT, layout)
    config = DataConfig(source=MixtureConfig(members=(MemberConfig(source=source),)), crop="stored")
    refused = message and pytest.raises(InputError, match=message)
    with refused or contextlib.nullcontext():
        open_pipeline(config, inputs={"stored_image": StoredInput("image", widths)})


@pytest.mark.parametrize("order", ["global", "blocks"])
@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (ABSENT, "the stored embedding of image is missing"),
        (
            to_features(embedded(ROW), "float16", (8, 16)),
            "stored embeddings have width (8, 16), but need (16, 8)",
        ),
        (
            to_features(embedded(ROW[:12]), "float16", (12,)),
            "stored embeddings have width (12,), but need (16, 8)",
        ),
        (
            to_features(embedded(ROW), "float16", (17, 8)),
            "embeddings of width 24 cannot be of (17, 8)",
        ),
        (
            to_features(embedded(ROW * (ROW > 16)), "float16", (16, 8)),
            "the stored embedding of image is zero",
        ),
    ],
    ids=["absent", "exchanged", "narrow", "damaged", "zero"],
)
def test_a_sample_whose_embeddings_do_not_fit_is_a_bad_one(first, reason, order, tmp_path):
    """It ended the run, with a traceback if it was the first and damaged, or it was trained on."""
    config = DataConfig(source=two_teachers(tmp_path, first), crop="stored", order=order)
    inputs = {f"stored_{of}": StoredInput(of, (16, 8)) for of in ("image", "text")}
    assert len(open_pipeline(config, inputs=inputs).fingerprints()) == 1
    read = take(config, 2, inputs=inputs)
    skipped = {(x["key"].rpartition(":")[2], x["reason"]) for one in read for x in one.skipped}
    assert skipped == {("0", reason)}
    for one in read:
        np.testing.assert_array_equal(one.inputs["stored_image"], np.tile(ROW, (12, 1)))


def several(tmp_path, captions):
    """A table with these lists of captions."""
    pairs = made.make_pairs(len(captions))
    made.table(tmp_path, pairs)
    rows = [{"image": x[0], "caption": y} for x, y in zip(pairs, captions, strict=True)]
    (tmp_path / "several.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return TableConfig(path=str(tmp_path / "several.jsonl"))


@pytest.mark.parametrize("sentences", [None, 2])
def test_further_texts_are_other_captions_of_the_image_or_parts_of_the_one_drawn(
    sentences, tmp_path
):
    """One to five captions of as many sentences, of which up to three are further texts. Images and
    captions are those of a run without further texts, on any number of processes."""
    captions = [
        [" ".join(f"{'abcde'[k]} {i} {j}." for k in range(1 + i % 5)) for j in range(1 + i % 5)]
        for i in range(20)
    ]
    config = DataConfig(source=several(tmp_path, captions))
    inputs = {"further": FurtherTexts(TEXT, 3, sentences), "further_count": CountInput()}
    batches_read = take(config, 4, inputs=inputs)
    halves = [take(config, 4, process=(i, 2), inputs=inputs) for i in (0, 1)]
    for batch, *read in zip(batches_read, *halves, strict=True):
        for name, x in batch.inputs.items():
            np.testing.assert_array_equal(x, np.concatenate([half.inputs[name] for half in read]))
    plain = take(config, 4)
    ids = {tuple(made.TOKENIZER([x], 16, True)[0]): x for rows in captions for x in rows}
    counts = set()
    for batch, alone in zip(batches_read, plain, strict=True):
        np.testing.assert_array_equal(batch.text, alone.text)
        np.testing.assert_array_equal(batch.image, alone.image)
        rows = batch.inputs["further"], batch.inputs["further_count"]
        assert rows[0].shape == (12, 3, 16)
        for key, text, texts, count in zip(batch.keys, batch.text, *rows, strict=True):
            caption = ids[tuple(text)]
            of_image = captions[int(key.rpartition(":")[2].partition(".")[0])]
            wanted = [x for x in of_image if x != caption]
            if sentences:
                wanted = parts(caption, sentences)
            assert count == min(3, len(wanted))
            allowed = {tuple(made.TOKENIZER([x], 16, True)[0]) for x in wanted}
            drawn = {tuple(x) for x in texts[:count]}
            assert drawn <= allowed
            assert len(drawn) == count
            np.testing.assert_array_equal(texts[count:], np.tile(text, (3 - count, 1)))
            counts.add(int(count))
    assert counts == {0, 1, 2, 3} if sentences is None else counts >= {0, 2, 3}


def test_synthetic_captions_are_further_texts_too(tmp_path):
    source, _ = reinforced(tmp_path)  # two captions, three synthetic ones
    inputs = {"further": FurtherTexts(TEXT, 9, None), "further_count": CountInput()}
    read = take(DataConfig(source=source), 1, inputs=inputs)[0]
    assert set(read.inputs["further_count"]) == {4}


def test_what_a_source_cannot_give_is_refused(tmp_path):
    source, _ = reinforced(tmp_path)
    inputs = {"further": FurtherTexts(TEXT, 9, None), "further_count": CountInput()}
    with pytest.raises(InputError, match="several texts of an image need a source whose captions"):
        take(digits(), 1, inputs=inputs)
    for config, inputs, message in (
        (digits(crop="stored"), {}, "need data that clip-jax prepare wrote"),
        (digits(synthetic_ratio=0.5), {}, "need data that clip-jax prepare wrote"),
        (DataConfig(source=source), STORED, "set --data.crop stored"),
    ):
        with pytest.raises(InputError, match=message):
            take(config, 1, inputs=inputs)
    plain = made.tar(tmp_path, made.make_pairs(24))
    for config, message in (
        (DataConfig(source=plain, crop="stored"), "stored augmentation is missing"),
        (DataConfig(source=plain, synthetic_ratio=0.5), "synthetic caption is missing"),
    ):
        with pytest.raises(InputError, match=message):
            take(config, 1)


def test_the_fingerprint_of_stored_embeddings_is_theirs(tmp_path):
    source, _ = reinforced(tmp_path)
    stored = open_pipeline(DataConfig(source=source, crop="stored"), inputs=STORED)
    (fingerprint,) = stored.fingerprints()
    (plain,) = open_pipeline(DataConfig(source=source)).fingerprints()
    assert fingerprint.startswith(f"{plain}-")


def test_labels_are_those_of_the_folders_after_a_resumption_and_in_workers(tmp_path):
    for name, image, _ in made.make_pairs(18):
        folder = tmp_path / ("tabby_cat", "ant", "dog")[int(name[:5]) % 3]
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(image)
    source = FolderConfig(path=str(tmp_path), templates=("a {}", "a photo of a {}"))
    classes = ("ant", "dog", "tabby cat")
    inputs = {"label": LabelInput(classes), "class": LabelInput()}
    batches = take(DataConfig(source=source, threads=0), 4, batch_size=6, inputs=inputs)
    for batch in batches:
        labels = batch.inputs["label"]
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, batch.inputs["class"])
        for label, key, tokens in zip(labels, batch.keys, batch.text, strict=True):
            assert key.split("/")[0].replace("_", " ") == classes[label]
            captions = [template.replace("{}", classes[label]) for template in source.templates]
            assert tokens.tolist() in made.TOKENIZER(captions, 16, True).tolist()
    assert np.bincount(np.concatenate([x.inputs["label"] for x in batches[:3]])).tolist() == [6] * 3
    resumed = take(DataConfig(source=source, threads=2), 2, start=2, batch_size=6, inputs=inputs)
    for first, second in zip(batches[2:], resumed, strict=True):
        np.testing.assert_array_equal(first.inputs["label"], second.inputs["label"])


def test_labels_need_the_classes_of_the_objective(tmp_path):
    for name in ("two/ant", "two/bee", "one/ant"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.png").write_bytes(made.make_pairs(2)[1][1])
        (tmp_path / name / "0.txt").write_text("a caption")
    source = FolderConfig(path=str(tmp_path / "two"), templates=("a {}",))
    plain = dataclasses.replace(source, templates=())
    mixed = MixtureConfig(members=(MemberConfig(source=source),))
    single = dataclasses.replace(source, path=str(tmp_path / "one"))
    for data, classes, message in (
        (source, ("ant", "bee", "cow"), "labels of ant, bee, cow, but data.source has ant, bee"),
        (source, ("bee", "ant"), "labels of bee, ant, but"),
        (plain, (), "labels of classes, but data.source has none"),
        (mixed, (), "has none: set it to class folders"),
        (single, (), "one class, ant, so that a loss of classes is constant"),
    ):
        with pytest.raises(InputError, match=message):
            take(DataConfig(source=data), 1, batch_size=2, inputs={"label": LabelInput(classes)})
