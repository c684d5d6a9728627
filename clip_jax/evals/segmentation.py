"""Segment images without training, by the similarity of patches to the names of classes, and by a
linear probe on patches. Scores depend much on the protocol, so results name it.

`windows` is dino.txt's protocol (arXiv:2412.16334; in a notebook of DINOv3). `values` is that of
TIPSv2 (arXiv:2604.12012), by the values of the last block as in MaskCLIP (arXiv:2112.01071). Both
cut an image, resized to a shorter side, into overlapping square windows. The cosines of a window's
patches are resized to its pixels (bilinear), their softmax over classes is averaged over windows,
and the mean is resized to the mask.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Shaped, UInt8

from clip_jax import processes, sharding
from clip_jax.data.images import RESAMPLING, ImageError, decode, read_ahead
from clip_jax.data.sources import SampleError
from clip_jax.display import Display
from clip_jax.errors import InputError, check_ranges
from clip_jax.evals import linear_probe, prompts
from clip_jax.evals.datasets import IGNORED, Missing, Segmented, Split
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.ranks import check_finite
from clip_jax.evals.reader import Outcome, Segments, Splits
from clip_jax.models.clip import CLIP, Params, l2_normalize
from clip_jax.models.dino import bicubic_weights
from clip_jax.models.images import Images

Protocol = Literal["windows", "values"]
_IMAGES = 8  # in a batch, whose windows are embedded together
_WINDOWS = 64  # in a batch of the model, over all devices
_ROWS = 64  # of a mask that are predicted at once, since each pixel has a number for each class
# Templates of Cha et al., "TCL" (arXiv:2212.00785), by which TIPSv2 was evaluated.
_TCL = (
    "itap of a {c}.",
    "a bad photo of a {c}.",
    "a origami {c}.",
    "a photo of the large {c}.",
    "a {c} in a video game.",
    "art of the {c}.",
    "a photo of the small {c}.",
    "a photo of many {c}.",
    "a photo of {c}s.",
)


class _Published(NamedTuple):
    side: int  # pixels of the shorter side of a resized image
    window: int  # pixels of the side of a window
    stride: int  # pixels between windows
    templates: tuple[str, ...]


_PUBLISHED: dict[Protocol, _Published] = {
    "windows": _Published(512, 384, 192, tuple(prompts.templates("imagenet1k"))),
    "values": _Published(448, 448, 336, _TCL),
}


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """How images are segmented."""

    # How patches are compared with texts. windows: dino.txt's protocol, by the last block's states;
    # values: TIPSv2's and MaskCLIP's, by its values.
    protocol: Protocol = "windows"
    # Shorter side of an image after resizing, in pixels. None: as published (512; values: 448).
    side: int | None = None
    # Side of the square windows, in pixels. None: as published (384; values: 448).
    window: int | None = None
    # Distance of the windows, in pixels. None: as published (192; values: 336).
    stride: int | None = None
    # What is done with the class called "background". class: it is one of the classes, found by its
    # name; ignored: its pixels are not counted, and never predicted.
    background: Literal["class", "ignored"] = "class"
    first_class: int = 0  # Value of the first class in masks; lower ones are ignored (ADE20K: 1).
    ignored: int = 255  # Value of pixels that are not counted.
    patches: int = 100_000  # Maximum number of patches to which a linear probe is fitted.
    pictures: int = 32  # Maximum number of images of which a picture is written.

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "segmentation.",
            side="[1, inf)",
            window="[1, inf)",
            stride="[1, inf)",
            first_class="[0, inf)",
            ignored="[0, inf)",
            patches="[2, inf)",
            pictures="[0, inf)",
        )
        side, window, stride = self.sizes
        if side < window or stride > window:
            raise InputError(
                f"segmentation.side={side}, window={window}, stride={stride}: windows must "
                "fit the shorter side and leave no gap; set side >= window >= stride."
            )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Side, window and stride, in pixels."""
        published = _PUBLISHED[self.protocol]
        return (
            self.side or published.side,
            self.window or published.window,
            self.stride or published.stride,
        )


# ------------------------------------------------------------------ tasks


def zero_shot(splits: Splits, config: SegmentationConfig) -> Outcome:
    """Segment the test images of masked data by the names of its classes.

    A class is the mean of its prompts' unit embeddings, from the protocol's templates or the data's
    own. Raises InputError for a model without patches, and as `Splits.compute` does.
    """
    data, encoder = _masked(splits, "test"), splits.encoder
    classes = Classes(data, config)
    windows = Windows(encoder, config)
    templates = data.templates or _PUBLISHED[config.protocol].templates
    texts = encoder.classes(templates, classes.names)
    halves = encoder.model.for_patches(texts.reshape(-1, texts.shape[-1]))
    of_class = prompts.ensemble(l2_normalize(halves).reshape(*texts.shape[:2], -1))
    check_finite(of_class, "class embeddings")

    def score(patches: Float[np.ndarray, "N g g e"]) -> Float[np.ndarray, "N g g C"]:
        return l2_normalize(patches) @ of_class.T

    embed = functools.partial(windows.compute, embed_patches, values=config.protocol == "values")
    return _measure("zeroshot_segmentation", splits, classes, windows, embed, score)


def probe(splits: Splits, config: SegmentationConfig, seed: int = 0) -> Outcome:
    """Fit logistic regression to patches of training images, and segment the test images by it.

    Features are the states of the last block, normed. A patch has the class that covers most of it.
    λ is chosen on patches of the validation split or, without one, of a fifth of the training
    images, which `seed` selects with the patches. Raises Missing without a training split.
    """
    train, test = _masked(splits, "train"), _masked(splits, "test")
    if list(train.names) != list(test.names):
        raise InputError(f"{splits.name}: the training and the test split have other classes.")
    classes, windows = Classes(test, config), Windows(splits.encoder, config)
    embed = functools.partial(windows.compute, embed_states)
    order = np.random.default_rng(seed).permutation(train.count).tolist()
    held_out = order[: max(train.count // 5, 1)]
    patches = functools.partial(_patches, splits, classes, windows, embed, config.patches, seed)
    try:
        validation = patches("validation", range(_masked(splits, "validation").count))
        fitted_to = patches("train", order)
    except Missing:
        validation = patches("train", held_out)
        fitted_to = patches("train", order[len(held_out) :])
    mesh, count = splits.encoder.mesh, len(classes.names)
    strength = linear_probe.search(fitted_to, validation, mesh, classes=count)
    every = [np.concatenate(both) for both in zip(fitted_to, validation, strict=True)]
    fitted = linear_probe.Problem(every[0], every[1], mesh, classes=count).fit(strength)

    def score(states: Float[np.ndarray, "N g g D"]) -> Float[np.ndarray, "N g g C"]:
        logits = fitted.logits(states.reshape(-1, states.shape[-1]))
        return logits.reshape(*states.shape[:-1], count)

    outcome = _measure("segmentation_probe", splits, classes, windows, embed, score)
    prefix = "linear_probe"
    values = {f"{prefix}/{name}": x for name, x in (*outcome.values.items(), ("lambda", strength))}
    return replace(outcome, values=values)


def _masked(splits: Splits, split: Split) -> Segmented:
    data = splits.open(split)
    if not isinstance(data, Segmented):
        raise Missing("segmentation needs images with masks: use segments:PATH.")
    return data


def _measure(
    task: str,
    splits: Splits,
    classes: "Classes",
    windows: "Windows",
    embed: Callable[..., np.ndarray],
    score: Callable[[np.ndarray], np.ndarray],
) -> Outcome:
    """Segment all test images. Processes embed windows together, and share the rest by images."""
    data, config = _masked(splits, "test"), classes.config
    mine, count = jax.process_index(), jax.process_count()
    confusion = np.zeros((len(classes.names),) * 2, np.int64)
    shown = {i * data.count // config.pictures for i in range(config.pictures)}
    skipped: list[str] = []
    pictures = []
    for batch in _read(data, range(data.count), classes, windows, splits.name):
        skipped += [x.error for x in batch if x.error]
        images = [x for x in batch if not x.error]
        for image, features in _embedded(images, windows, embed):
            if _process_of(image.index, shown, count) != mine:
                continue
            predicted = windows.predict(score(features), image)
            confusion += confusion_matrix(image.truth, predicted, len(confusion))
            if image.index in shown:
                seen = (windows.pixels(image), predicted, image.truth)
                pictures.append((data.key(image.index), *seen))
    confusion = np.sum(processes.gather(confusion.tolist()), axis=0)
    if not confusion.sum():
        raise InputError(
            f"{splits.name}: none of {data.count} images has a pixel that counts; the first that "
            f"could not be read: {skipped[:1]}. Check --segmentation.first-class and the masks."
        )
    side, window, stride = config.sizes
    processes.say_once(
        f"{splits.name}: protocol {config.protocol}, shorter side {side}, windows of {window} "
        f"pixels, {stride} apart, background as {config.background}"
    )
    values = {f"{config.protocol}/{name}": x for name, x in scores(confusion).items()}
    segments = Segments(confusion, pictures)
    return Outcome(task, values, skipped, classes.names, segments=segments)


def _process_of(index: int, shown: set[int], processes: int) -> int:
    """Return which process predicts an image: the first, which draws, if a picture is written."""
    return 0 if index in shown else index % processes


def _patches(
    splits: Splits,
    classes: "Classes",
    windows: "Windows",
    embed: Callable[..., np.ndarray],
    most: int,
    seed: int,
    split: Split,
    chosen: Sequence[int],
) -> linear_probe.Part:
    """Return the features and classes of patches of some images, equally many of each."""
    data, each = _masked(splits, split), max(most // max(len(chosen), 1), 1)
    features, labels = [], []
    for batch in _read(data, chosen, classes, windows, f"{splits.name}, {split}"):
        for image, states in _embedded([x for x in batch if not x.error], windows, embed):
            known = windows.classes_of_patches(image, len(classes.names))
            at = np.flatnonzero(known >= 0)
            rng = np.random.default_rng([seed, image.index])
            at = np.sort(rng.permutation(at)[:each])
            features.append(states.reshape(-1, states.shape[-1])[at])
            labels.append(known[at])
    if len(np.unique(np.concatenate([np.zeros(0, int), *labels]))) < 2:
        raise InputError(
            f"{splits.name}: the patches of {len(chosen)} images of the {split} split have fewer "
            "than two classes; add images with other masks."
        )
    return np.concatenate(features), np.concatenate(labels)


# ------------------------------------------------------------------ scores


def confusion_matrix(
    truth: Int[np.ndarray, "H W"], predicted: Int[np.ndarray, "H W"], classes: int
) -> Int[np.ndarray, "C C"]:
    """Count the pixels of each true class (rows) by predicted class, without IGNORED ones."""
    counts = truth != IGNORED
    pairs = truth[counts] * classes + predicted[counts]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def scores(confusion: Int[np.ndarray, "C C"]) -> dict[str, float]:
    """Return `miou`, the mean over classes of intersection / union over the whole data set, and
    `pixel_accuracy`. Classes that are neither there nor predicted have no IoU."""
    of_class = class_scores(confusion)
    right = np.trace(confusion) / confusion.sum()
    return {"miou": float(np.nanmean(of_class)), "pixel_accuracy": float(right)}


def class_scores(confusion: Int[np.ndarray, "C C"]) -> Float[np.ndarray, " C"]:
    """Return each class's intersection / union; NaN for a class without any pixel."""
    right = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - right
    return np.where(union > 0, right / np.maximum(union, 1), np.nan)


class Classes:
    """The classes of a data set that are found, and what the pixels of its masks mean."""

    def __init__(self, data: Segmented, config: SegmentationConfig) -> None:
        """Raises InputError if the background is to be ignored, and no class is called so."""
        self.config, names = config, list(data.names)
        index = np.arange(len(names))
        if config.background == "ignored":
            if "background" not in names:
                raise InputError(
                    "segmentation.background='ignored' needs a class called background in "
                    f"classnames.txt, which has {', '.join(names[:5])}, ...; use 'class'."
                )
            background = names.index("background")
            index -= index > background
            index[background] = IGNORED
            names.remove("background")
        self.names, self._index = names, index

    def truth(self, mask: Int[np.ndarray, "H W"]) -> Int[np.ndarray, "H W"]:
        """Return the class of each pixel, or IGNORED. Raises SampleError for an unknown value."""
        values = mask.astype(np.int64) - self.config.first_class
        counts = (mask != self.config.ignored) & (values >= 0)
        if counts.any() and values[counts].max() >= len(self._index):
            raise SampleError(
                f"the mask has the value {mask[counts].max()}; segmentation.first_class="
                f"{self.config.first_class} and {len(self._index)} classes allow up to "
                f"{len(self._index) - 1 + self.config.first_class}, and "
                f"{self.config.ignored} for ignored pixels"
            )
        return np.where(counts, self._index[np.where(counts, values, 0)], IGNORED)


# ------------------------------------------------------------------ windows


@dataclass(frozen=True, eq=False)
class _Image:
    """A resized image with the classes of its pixels, or why it could not be read."""

    index: int
    pixels: UInt8[np.ndarray, "H W 3"]
    truth: Int[np.ndarray, "h w"]
    error: str = ""


_NOTHING = np.zeros((0, 0, 3), np.uint8), np.zeros((0, 0), np.int64)


class Windows:
    """A model at the size of a protocol's windows, and what is done with these."""

    def __init__(self, encoder: Encoder, config: SegmentationConfig) -> None:
        """Raises InputError for an image tower without patches."""
        vision = encoder.model.config.vision
        if not vision.has_tokens:
            raise InputError(
                "segmentation needs a model whose image tower is a vision transformer, which has "
                "patches; this one has none."
            )
        self.side, self.window, self.stride = config.sizes
        self.grid = -(-self.window // vision.patch_size)  # patches of a side, the last completed
        self._size = self.grid * vision.patch_size
        self._encoder = at_size(encoder, self._size)
        self._up = bilinear_weights(self.grid, self.window)

    def resize(self, image: Any) -> UInt8[np.ndarray, "H W 3"]:
        """Resize the shorter side of an image, as torchvision does with a PIL image."""
        width, height = image.size
        shorter = min(width, height)
        if shorter != self.side:
            size = (int(self.side * width / shorter), int(self.side * height / shorter))
            image = image.resize(size, RESAMPLING["bicubic"])
        return np.asarray(image)

    def starts(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the first row and column of each window; the last ones end with the image."""

        def along(length: int) -> list[int]:
            count = max(length - self.window + self.stride - 1, 0) // self.stride + 1
            return [max(min(i * self.stride, length - self.window), 0) for i in range(count)]

        return [(y, x) for y in along(height) for x in along(width)]

    def of(self, image: Shaped[np.ndarray, "H W *C"]) -> Shaped[np.ndarray, "N S S *C"]:
        """Cut an image, or the classes of its pixels, into windows."""
        side = self.window
        return np.stack(
            [image[y : y + side, x : x + side] for y, x in self.starts(*image.shape[:2])]
        )

    def compute(
        self, function: Callable[..., Array], windows: UInt8[np.ndarray, "N S S 3"], **options: Any
    ) -> Float[np.ndarray, "N g g e"]:
        """Run a function over windows, stretched to a multiple of the patch size (bicubic)."""
        images: Any = windows
        if self._size != self.window:
            weights = bicubic_weights(self.window, self._size).astype(np.float32)
            normal: Any = self._encoder.preprocess.normalize(windows)
            images = np.einsum("iy,jx,NyxC->NijC", weights, weights, normal, optimize=True)
        features = self._encoder.compute(function, images, batch_size=_WINDOWS, **options)
        return features.reshape(len(windows), self.grid, self.grid, -1)

    def predict(
        self, patch_scores: Float[np.ndarray, "N g g C"], image: _Image
    ) -> Int[np.ndarray, "h w"]:
        """Return the class of each pixel of an image's mask, from the scores of its patches."""
        height, width = image.pixels.shape[:2]
        total = np.zeros((height, width, patch_scores.shape[-1]), np.float32)
        count = np.zeros((height, width, 1), np.float32)
        for (y, x), cosines in zip(self.starts(height, width), patch_scores, strict=True):
            at = np.s_[y : y + self.window, x : x + self.window]
            pixels = np.einsum("yi,xj,ijC->yxC", self._up, self._up, cosines, optimize=True)
            pixels = np.exp(pixels - pixels.max(-1, keepdims=True))
            total[at] += pixels / pixels.sum(-1, keepdims=True)
            count[at] += 1
        mean = total / count
        down, across = map(bilinear_weights, (height, width), image.truth.shape)
        columns = np.einsum("xj,yjC->yxC", across, mean, optimize=True)
        rows = range(0, len(down), _ROWS)
        blocks = (
            np.einsum("iy,yxC->ixC", down[i : i + _ROWS], columns, optimize=True) for i in rows
        )
        return np.concatenate([block.argmax(-1) for block in blocks])

    def classes_of_patches(self, image: _Image, classes: int) -> Int[np.ndarray, " patches"]:
        """Return the class that covers most of each patch of an image's windows, or IGNORED."""
        truth = _nearest(image.truth, *image.pixels.shape[:2])
        each = max(self.window // self.grid, 1)
        cut = np.stack([_nearest(x, *(self.grid * each,) * 2) for x in self.of(truth)])
        cut = cut.reshape(-1, self.grid, each, self.grid, each).swapaxes(2, 3)
        patches = cut.reshape(-1, each * each)
        patches = np.where(patches == IGNORED, classes, patches)
        flat = patches + np.arange(len(patches))[:, None] * (classes + 1)
        counts = np.bincount(flat.ravel(), minlength=len(patches) * (classes + 1))
        best = counts.reshape(len(patches), classes + 1).argmax(-1)
        return np.where(best == classes, IGNORED, best)

    def pixels(self, image: _Image) -> UInt8[np.ndarray, "h w 3"]:
        """Return the image at the size of its mask, for a picture."""
        return _nearest(image.pixels, *image.truth.shape)


def at_size(encoder: Encoder, size: int) -> Encoder:
    """Return the model for square images of `size` pixels, with resized position embeddings."""
    before = encoder.model.config.vision
    vision = before.with_image_size(size)
    model = replace(encoder.model, config=replace(encoder.model.config, vision=vision))
    path = vision.positions_path
    if path is None or vision.grid == before.grid:
        return replace(encoder, model=model)
    *folders, name = path.split("/")
    everywhere = sharding.replicated(encoder.mesh)
    table = functools.reduce(dict.__getitem__, folders, encoder.params)[name]
    table = np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(table))
    fitted = np.asarray(vision.fit({path: table}, before)[path])
    fitted = jax.make_array_from_callback(fitted.shape, everywhere, fitted.__getitem__)

    def put(tree: Params, names: Sequence[str]) -> Params:
        first, *rest = names
        return tree | {first: put(tree[first], rest) if rest else fitted}

    return replace(encoder, model=model, params=put(encoder.params, [*folders, name]))


def embed_patches(
    model: CLIP, params: Params, images: Images, *, values: bool
) -> Float[Array, "B L e"]:
    """Embed the patches of images, to be compared with texts."""
    return model.encode_patches(params, model.normalize(images), values=values)


def embed_states(model: CLIP, params: Params, images: Images) -> Float[Array, "B L D"]:
    """Return the normed states of the patches of images."""
    states = model.image_tokens(params, model.normalize(images), norm=True)
    return states[:, -model.config.vision.num_patches :]


def bilinear_weights(count: int, size: int) -> Float32[np.ndarray, "n N"]:
    """Return the weights of `count` values in a row that is resized to `size`, as in PyTorch: of
    both neighbours, without antialiasing; the end values are repeated outside."""
    at = np.maximum((np.arange(size) + 0.5) * (count / size) - 0.5, 0)
    left = np.floor(at).astype(int)
    weights, rows = np.zeros((size, count), np.float32), np.arange(size)
    weights[rows, left] = 1 - (at - left)
    weights[rows, np.minimum(left + 1, count - 1)] += at - left
    return weights


def _nearest(image: Shaped[np.ndarray, "H W *C"], height: int, width: int) -> np.ndarray:
    """Resize to the nearest pixels."""
    rows, columns = (
        ((np.arange(size) + 0.5) * (count / size)).astype(int)
        for count, size in zip(image.shape, (height, width), strict=False)
    )
    return image[rows[:, None], columns]


def _read(
    data: Segmented, chosen: Sequence[int], classes: Classes, windows: Windows, title: str
) -> Iterator[list[_Image]]:
    """Read images and masks in threads, one batch ahead."""

    def read(index: int) -> _Image:
        try:
            image, mask = data.load(index)
            return _Image(index, windows.resize(decode(image)), classes.truth(mask))
        except (ImageError, SampleError) as error:
            return _Image(index, *_NOTHING, f"{data.key(index)}: {error}")

    starts = range(0, len(chosen), _IMAGES)
    batches = ([int(i) for i in chosen[start : start + _IMAGES]] for start in starts)
    quiet = not processes.is_lead()
    with Display(title, len(chosen), quiet=quiet, fleeting=True) as display:
        for batch in read_ahead(batches, read, ahead=1):
            yield batch
            display.add(len(batch))


def _embedded(
    images: Sequence[_Image], windows: Windows, embed: Callable[..., np.ndarray]
) -> Iterator[tuple[_Image, Float[np.ndarray, "N g g e"]]]:
    """Compute the features of all windows of some images together."""
    if not images:
        return
    cut = [windows.of(image.pixels) for image in images]
    ends = np.cumsum([len(x) for x in cut])[:-1]
    yield from zip(images, np.split(embed(np.concatenate(cut)), ends), strict=True)
