"""RandAugment's operations and stored augmentations against torchvision, bit for bit."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.augment import OPERATIONS, Augmentation, AugmentationsConfig, draw, replay
from clip_jax.data.reinforced import Reinforcement, from_members, to_members
from clip_jax.models.images import Square

torch = pytest.importorskip("torch")
T = pytest.importorskip("torchvision.transforms")
F = T.functional

NAMES = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
    "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
SIZE = 96


def apply(image, name, magnitude):
    nearest = T.InterpolationMode.NEAREST
    return T.autoaugment._apply_op(image, name, magnitude, interpolation=nearest, fill=None)


def published(image, fields, size):
    """Reapply the fields of a set with a crop, a flip and RandAugment, in this order."""
    box, flip, operations = fields
    bicubic = T.InterpolationMode.BICUBIC
    image = F.resized_crop(image, *box, [size, size], bicubic)
    image = F.hflip(image) if flip else image
    for which, magnitude in operations or ():
        image = apply(image, NAMES[which], magnitude)
    return np.asarray(image)


@pytest.fixture(scope="module")
def photo():
    import skimage.data

    return Image.fromarray(skimage.data.chelsea()).crop((80, 40, 240, 160))


@pytest.fixture(scope="module")
def png(photo):
    photo.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.mark.parametrize("which", range(OPERATIONS), ids=NAMES)
def test_each_operation_at_every_level_and_both_signs(which, photo, png):
    levels, signed = T.RandAugment()._augmentation_space(31, (SIZE, SIZE))[NAMES[which]]
    levels = np.atleast_1d(levels.numpy()).tolist()
    box, changed = (5, 10, 100, 120), 0
    for magnitude in levels + [-x for x in levels if signed]:
        operations = ((which, magnitude),)
        actual = replay(png, Augmentation(box, False, operations), [Square(SIZE)])[0]
        expected = published(photo, [box, False, operations], SIZE)
        np.testing.assert_array_equal(actual, expected, err_msg=str(magnitude))
        changed += (expected != published(photo, [box, False, ()], SIZE)).any()
    assert changed >= min(20, len(levels)) or not which


def test_what_is_drawn_is_torchvisions_space():
    """Every operation, level and sign comes up, and none that torchvision does not have."""
    space = T.RandAugment()._augmentation_space(31, (SIZE, SIZE))
    expected = {
        (which, round(sign * float(magnitude), 4) + 0.0)
        for which, name in enumerate(NAMES)
        for magnitude in np.atleast_1d(space[name][0].numpy())
        for sign in ((1, -1) if space[name][1] else (1,))
    }
    rng = np.random.default_rng(0)
    drawn = draw(80, 80, rng, AugmentationsConfig(operations=10_000, size=SIZE)).operations
    assert {(one[0], round(one[1], 4) + 0.0) for one in drawn or () if one} == expected


def unit(rng, *shape):
    rows = rng.normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_a_set_written_here_is_read_by_the_published_rules(flip, photo, png, tmp_path):
    rng = np.random.default_rng(0)
    config = AugmentationsConfig(flip=flip, size=SIZE)
    augmentations = tuple(draw(*photo.size, rng, config) for _ in range(5))
    synthetic = ("a cat", "zwölf")
    stored = Reinforcement(
        augmentations, SIZE, unit(rng, 5, 24), synthetic, unit(rng, 1, 24), unit(rng, 2, 24)
    )
    members = {"png": png, "txt": b"a tabby", **to_members(stored)}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for extension, content in members.items():
            info = tarfile.TarInfo(f"000.{extension}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

    with tarfile.open(tmp_path / "a.tar") as tar:
        files = {x.name.split(".", 1)[1]: tar.extractfile(x).read() for x in tar.getmembers()}
    image = Image.open(io.BytesIO(files["png"])).convert("RGB")
    params = json.loads(files["paug.json"])["param_aug"]
    embeddings = np.load(io.BytesIO(files["npz"]))
    texts = json.loads(files["syn.json"])["syn_text"]
    assert tuple(texts) == synthetic
    assert [x.dtype for x in embeddings.values()] == [np.float16] * 3
    for i, fields in enumerate(params):
        # A configuration without random_horizontal_flip has two fields for each augmentation.
        box, *rest = fields
        read = [box, *(rest if flip else [False, *rest])]
        actual = replay(png, augmentations[i], [Square(SIZE)], SIZE)[0]
        np.testing.assert_array_equal(actual, published(image, read, SIZE))
        np.testing.assert_allclose(
            embeddings["image_emb"][i], stored.image[i], rtol=1e-3, atol=1e-7
        )
    np.testing.assert_allclose(embeddings["text_emb"][0], stored.text[0], rtol=1e-3, atol=1e-7)
    for i in range(2):
        expected = stored.synthetic_text[i].astype(np.float16)
        np.testing.assert_array_equal(embeddings["syn_text_emb"][i], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gzip_of_torch_save_is_read_without_torch(dtype):
    rng = np.random.default_rng(0)
    arrays = {"image_emb": unit(rng, 2, 8), "text_emb": unit(rng, 3, 8)}  # one true, two synthetic
    tensors = {name: torch.tensor(x).to(getattr(torch, dtype)) for name, x in arrays.items()}
    torch.save(tensors, file := io.BytesIO())
    members = {
        "paug.json": json.dumps({"param_aug": json.dumps([[[0, 0, 4, 4], None]] * 2)}).encode(),
        "syn.json": json.dumps({"syn_text": ["a", "b"]}).encode(),
        "pth.gz": gzip.compress(file.getvalue()),
    }
    read = from_members(members, captions=1)
    assert read is not None
    assert read.augmentations == (Augmentation((0, 0, 4, 4), None, None),) * 2
    wanted = {name: x.float().numpy() for name, x in tensors.items()}
    np.testing.assert_array_equal(read.image, wanted["image_emb"])
    np.testing.assert_array_equal(read.text, wanted["text_emb"][:1])
    np.testing.assert_array_equal(read.synthetic_text, wanted["text_emb"][1:])
