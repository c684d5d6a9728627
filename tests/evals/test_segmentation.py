"""Segmentation: masks on disk, windows, scores. tests/reference/test_segmentation.py has the proofs
against published code; tests/mesh/evals/test_segmentation.py runs a model."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.sources import SampleError
from clip_jax.errors import InputError
from clip_jax.evals import masks, segmentation
from clip_jax.evals.datasets import IGNORED, Missing, Segmented
from clip_jax.evals.pasted_icons import NAMES, open_pasted_icons
from clip_jax.evals.results import draw
from clip_jax.evals.segmentation import Classes, SegmentationConfig, Windows
from clip_jax.models.clip import CLIP
from tests.conftest import RESNET
from tests.evals.conftest import encoder_on, mesh_of, png

RNG = np.random.default_rng(0)


def write(folder, *names, mask=None):
    """Write images with these names, all with the same mask."""
    mask = np.zeros((4, 5), np.uint8) if mask is None else mask
    for kind, pixels in (("images", None), ("masks", mask)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / kind / f"{name}.png").write_bytes(png(pixels))


@pytest.fixture
def path(tmp_path):
    (tmp_path / "classnames.txt").write_text("sky\nsea\n")
    return tmp_path


def test_a_folder_without_splits_is_the_test_split(path):
    write(path, "b", "a", mask=np.array([[0, 1], [255, 1]], np.uint8))
    data = masks.open_masks(path, "test")
    image, mask = data.load(0)
    assert (data.count, data.key(0)) == (2, str(path / "images/a.png"))
    assert mask.tolist() == [[0, 1], [255, 1]]
    with Image.open(image) as picture:
        assert picture.size == (5, 6)
    with pytest.raises(Missing, match="no train split"):
        masks.open_masks(path, "train")


def test_splits_have_folders_or_are_folders(path):
    write(path / "train", "a", "b")
    write(path / "val", "c")
    assert [masks.open_masks(path, split).count for split in ("train", "test")] == [2, 1]
    with pytest.raises(Missing):  # the validation images are the test split
        masks.open_masks(path, "validation")
    write(path / "test", "d", "e", "f")
    counts = [masks.open_masks(path, split).count for split in ("train", "validation", "test")]
    assert counts == [2, 1, 3]


def test_the_layout_of_ade20k(path):
    for split, name in (("training", "a"), ("validation", "b")):
        for kind, suffix in (("images", "jpg"), ("annotations", "png")):
            (path / kind / split).mkdir(parents=True)
            image = Image.new("L", (3, 2), 7)
            image.save(path / kind / split / f"{name}.{suffix}")
    assert masks.open_masks(path, "train").load(0)[1].tolist() == [[7, 7, 7], [7, 7, 7]]
    assert masks.open_masks(path, "test").key(0).endswith("b.jpg")


@pytest.mark.parametrize(
    ("image", "values"),
    [
        (Image.fromarray(np.array([[0, 300]], np.uint16)), [[0, 300]]),
        (Image.fromarray(np.array([[0, 3]], np.uint8)).convert("P"), [[0, 3]]),
        (Image.fromarray(np.array([[False, True]])), [[0, 1]]),
    ],
    ids=lambda x: getattr(x, "mode", ""),
)
def test_masks_of_other_kinds(tmp_path, image, values):
    image.save(tmp_path / "mask.png")
    assert masks.read_mask(tmp_path / "mask.png").tolist() == values


def test_wrong_masks_are_named(path):
    with pytest.raises(InputError, match=r"no images with masks .* PATH/images and PATH/masks"):
        masks.open_masks(path, "test")
    write(path, "a", "b")
    (path / "masks/b.png").unlink()
    with pytest.raises(InputError, match=r"1 of 2 images .*b\.png"):
        masks.open_masks(path, "test")
    (path / "masks/b.png").write_bytes(png())
    with pytest.raises(SampleError, match=r"3 channels \(RGB\)"):
        masks.open_masks(path, "test").load(1)
    (path / "masks/b.png").write_bytes(b"no image")
    with pytest.raises(SampleError, match=r"the mask .*b\.png: not an image"):
        masks.open_masks(path, "test").load(1)
    (path / "classnames.txt").unlink()
    with pytest.raises(InputError, match=r"no .*classnames\.txt"):
        masks.open_masks(path, "test")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"side": 32, "window": 32, "stride": 32}, None),
        ({"side": 32}, "side=32, window=384"),
        ({"window": 100}, "stride=192"),
        ({"protocol": "values", "side": 448, "window": 224, "stride": 112}, None),
    ],
)
def test_windows_fit_and_leave_no_gap(options, says):
    with pytest.raises(InputError, match=says) if says else contextlib.nullcontext():
        SegmentationConfig(**options)


def data_of(*names):
    return Segmented(0, lambda i: None, names)


MASK = np.array([[0, 1, 2], [255, 1, 0]])


@pytest.mark.parametrize(
    ("options", "names", "truth"),
    [
        ({}, ["background", "sky", "sea"], [[0, 1, 2], [-1, 1, 0]]),
        ({"background": "ignored"}, ["sky", "sea"], [[-1, 0, 1], [-1, 0, -1]]),
        ({"first_class": 1}, ["background", "sky", "sea"], [[-1, 0, 1], [-1, 0, -1]]),
        ({"ignored": 1}, ["background", "sky", "sea", *"x" * 253], [[0, -1, 2], [255, -1, 0]]),
    ],
)
def test_what_pixels_of_masks_mean(options, names, truth):
    listed = ["background", *names] if options.get("background") else names
    classes = Classes(data_of(*listed), SegmentationConfig(**options))
    assert classes.names == names
    assert classes.truth(MASK).tolist() == truth


def test_unknown_classes_are_refused():
    with pytest.raises(SampleError, match=r"value 2; .* 2 classes allow up to 1, and 255"):
        Classes(data_of("sky", "sea"), SegmentationConfig()).truth(MASK)
    with pytest.raises(InputError, match=r"needs a class called background .* sky, sea"):
        Classes(data_of("sky", "sea"), SegmentationConfig(background="ignored"))


def test_scores_are_those_of_all_pixels():
    truth, predicted = RNG.integers(0, 4, (2, 30, 20))
    truth[:5] = IGNORED
    truth[truth == 3] = 0  # class 3 is predicted only, class 4 is nowhere
    confusion = segmentation.confusion_matrix(truth, predicted, 5)
    counts = truth != IGNORED
    of_class = []
    for i in range(4):
        both = counts & (truth == i) & (predicted == i)
        either = counts & ((truth == i) | (predicted == i))
        of_class.append(both.sum() / either.sum())
    got = segmentation.class_scores(confusion)
    np.testing.assert_allclose(got[:4], of_class)
    assert np.isnan(got[4])
    assert segmentation.scores(confusion) == pytest.approx(
        {"miou": np.mean(of_class), "pixel_accuracy": (truth == predicted)[counts].mean()}
    )


def windows_of(side, window, stride):
    config = SegmentationConfig(side=side, window=window, stride=stride)
    return Windows(encoder_on(mesh_of(1)), config)


def test_windows_cover_an_image_and_end_with_it():
    windows = windows_of(20, 16, 8)
    assert windows.starts(20, 33) == [(y, x) for y in (0, 4) for x in (0, 8, 16, 17)]
    assert windows.starts(20, 16) == [(0, 0), (4, 0)]
    pixels = RNG.integers(0, 256, (20, 33, 3), np.uint8)
    cut = windows.of(pixels)
    assert cut.shape == (8, 16, 16, 3)
    assert np.array_equal(cut[-1], pixels[4:, 17:])


def test_pixels_have_the_class_of_their_patches():
    """Two patches a side; the image has a class in each quarter, the mask has twice the pixels."""
    windows = windows_of(16, 16, 16)
    scores = np.zeros((1, 2, 2, 4), np.float32)
    scores[0, [0, 0, 1, 1], [0, 1, 0, 1], [2, 0, 3, 1]] = 1
    truth = np.zeros((32, 32), np.int64)
    image = segmentation._Image(0, np.zeros((16, 16, 3), np.uint8), truth)
    expected = np.kron([[2, 0], [3, 1]], np.ones((16, 16), int))
    assert np.array_equal(windows.predict(scores, image), expected)


def test_patches_have_the_class_of_most_of_their_pixels():
    truth = np.full((16, 16), 1)
    truth[:8, :8] = 0
    truth[0, :8] = IGNORED
    truth[8:, 8:] = IGNORED
    image = segmentation._Image(0, np.zeros((16, 16, 3), np.uint8), truth)
    assert windows_of(16, 16, 16).classes_of_patches(image, 2).tolist() == [0, 1, 1, IGNORED]


def test_a_model_without_patches_is_refused():
    encoder = replace(encoder_on(mesh_of(1)), model=CLIP(RESNET))
    with pytest.raises(InputError, match="vision transformer"):
        Windows(encoder, SegmentationConfig())


def test_the_first_process_predicts_what_it_draws_and_all_share_the_rest():
    owners = [segmentation._process_of(i, {1, 2}, 3) for i in range(6)]
    assert owners == [0, 0, 0, 0, 1, 2]


def test_pasted_icons_are_the_same_each_time_and_differ_between_splits():
    train, test = open_pasted_icons("train"), open_pasted_icons("test")
    pixels, mask = train.load(3)
    assert (pixels.shape, mask.shape) == ((96, 96, 3), (96, 96))
    assert not np.array_equal(pixels, test.load(3)[0])
    seen = np.unique(np.concatenate([np.unique(train.load(i)[1]) for i in range(train.count)]))
    assert seen.tolist() == list(range(1 + len(NAMES)))
    assert 0.5 < np.mean([(test.load(i)[1] == 0).mean() for i in range(test.count)]) < 0.95


def test_a_picture_shows_image_prediction_and_truth(tmp_path):
    confusion = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    truth = np.array([[0, 1], [1, IGNORED]])
    picture = ("images/x.jpg", np.zeros((2, 2, 3), np.uint8), np.array([[0, 1], [0, 0]]), truth)
    segments = segmentation.Segments(confusion, [picture])
    names = ["sky", "sea", "sand"]
    outcome = segmentation.Outcome("zeroshot_segmentation", {}, names=names, segments=segments)
    draw(tmp_path, data_of(*names), outcome)
    lines = (tmp_path / "classes.csv").read_text().splitlines()
    assert lines == ["class,iou,accuracy", f"sea,{2 / 3},1.0", "sky,0.75,0.75"]
    with Image.open(tmp_path / "segments/000_x.png") as drawn:
        assert drawn.size[0] == 900
