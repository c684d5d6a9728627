"""The same pixels as OpenAI, open_clip and transformers make, of photographs and odd images."""

import io
import json

import numpy as np
import pytest
import transformers
from PIL import Image

from clip_jax.convert import image_processor
from clip_jax.data.images import Preprocess
from clip_jax.errors import InputError
from tests.reference.pictures import FOLDER, ODD, PHOTO

# Gray, palette and alpha are among them.
PHOTOGRAPHS = [Image.open(x) for x in sorted(FOLDER.iterdir()) if x.suffix in (".png", ".jpg")]


def reference(transform, image: Image.Image) -> np.ndarray:
    return transform(image).numpy().transpose(1, 2, 0)


def assert_same_pixels(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [224, 97])
def test_photographs(size, openai_clip):
    assert len(PHOTOGRAPHS) > 10
    transform = openai_clip.clip._transform(size)
    for image in PHOTOGRAPHS:
        assert_same_pixels(Preprocess(image_size=size)(image), reference(transform, image))


@pytest.mark.parametrize("kind", ODD)
def test_odd_images(kind, tmp_path, openai_clip):
    data = ODD[kind]
    theirs = reference(openai_clip.clip._transform(224), Image.open(io.BytesIO(data)))
    path = tmp_path / "image"
    path.write_bytes(data)
    for given in (data, path, str(path), Image.open(io.BytesIO(data))):
        assert_same_pixels(Preprocess()(given), theirs)
    with Image.open(path) as image:
        pixels = np.asarray(image)
        # What an array cannot say: its palette, that it is CMYK, that its colour is transparent.
        if image.mode not in ("P", "LA", "F", "CMYK") and "transparency" not in image.info:
            assert_same_pixels(Preprocess()(pixels), theirs)


def test_seeked_frame_is_the_one_that_counts(openai_clip):
    image = Image.open(io.BytesIO(ODD["animated gif"]))
    image.seek(2)
    theirs = reference(openai_clip.clip._transform(224), image)
    assert_same_pixels(Preprocess()(image), theirs)
    assert np.abs(Preprocess()(ODD["animated gif"]) - theirs).max() > 0.1


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "ViT"])
def test_transformers_image_processors(kind, tmp_path):
    """Also what its file leaves out. torchvision resizes with rounding of its own."""
    square = {"height": 160, "width": 160}
    size = {"shortest_edge": 160} if kind == "CLIP" else square
    settings = {"do_convert_rgb": True, "size": size, "crop_size": square}
    settings = {"image_processor_type": f"{kind}ImageProcessor", **settings}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    ours = image_processor.read(tmp_path, 160)
    images = [PHOTO.resize(shape) for shape in [(640, 427), (427, 640), (333, 331), (33, 60)]]
    images += [Image.open(io.BytesIO(data)) for data in ODD.values()]
    for backend, bound in (("Pil", 0), ("", 2)):
        theirs = getattr(transformers, f"{kind}ImageProcessor{backend}").from_pretrained(tmp_path)
        for image in images:
            (x,) = theirs(image, do_rescale=False, do_normalize=False)["pixel_values"]
            difference = ours.pixels(image).astype(int) - np.transpose(np.array(x), (1, 2, 0))
            assert np.abs(difference).max() <= bound


@pytest.mark.parametrize(
    ("kind", "resize"),
    [
        ("Bit", {"shortest_edge": 256}),
        ("Bit", {"shortest_edge": 255}),  # an odd margin
        ("ViT", {"height": 256, "width": 256}),
    ],
)
def test_a_margin_is_cut_as_transformers_does_it(kind, resize, tmp_path):
    """From a file as of DINOv2's, and from the file that we write."""
    square = {"height": 224, "width": 224}
    sizes = {"size": resize, "crop_size": square}
    steps = {"do_convert_rgb": True, "do_center_crop": True}
    settings = {"image_processor_type": f"{kind}ImageProcessor", **sizes, **steps}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    ours = image_processor.read(tmp_path, 224, kind)
    again = tmp_path / "again"
    again.mkdir()
    image_processor.write(again, ours, kind)
    assert image_processor.read(again, 224, kind) == ours
    theirs = transformers.CLIPImageProcessorPil.from_pretrained(again)
    for shape in [(640, 427), (427, 641), (333, 331), (33, 60), (256, 256)]:
        image = PHOTO.resize(shape)
        (x,) = theirs(image, do_rescale=False, do_normalize=False)["pixel_values"]
        np.testing.assert_array_equal(ours.pixels(image), np.transpose(x, (1, 2, 0)))
        if kind == "Bit":
            own = transformers.BitImageProcessorPil.from_pretrained(tmp_path)
            (x,) = own(image, do_rescale=False, do_normalize=False)["pixel_values"]
            np.testing.assert_array_equal(ours.pixels(image), np.transpose(x, (1, 2, 0)))


CHANGES = [
    {}, {"do_normalize": False}, {"do_normalize": True}, {"resample": 2}, {"resample": 3},
    {"resample": 0}, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    {"do_center_crop": False}, {"do_center_crop": True}, {"do_resize": False},
    {"do_rescale": False}, {"rescale_factor": 1}, {"do_convert_rgb": False}, {"do_pad": True},
    {"size": 224}, {"size": 448}, {"size": {"shortest_edge": 224}}, {"crop_size": 224},
    {"size": {"height": 224, "width": 224}}, {"size": {"height": 448, "width": 448}},
    {"crop_size": {"height": 112, "width": 112}},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["CLIP", "ChineseCLIP", "Bit", "Siglip", "ViT", "Tipsv2"])
def test_each_setting_of_transformers_image_processors(kind, tmp_path):
    """Those that a file leaves out, too: equal pixels, or an InputError."""
    size = 448 if kind == "Tipsv2" else 224
    backend = "" if kind == "Tipsv2" else "Pil"
    equal = 0
    for change in CHANGES:
        settings = {"image_processor_type": f"{kind}ImageProcessor", **change}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        try:
            ours = image_processor.read(tmp_path, size, kind)
        except InputError:
            continue
        theirs = getattr(transformers, f"{kind}ImageProcessor{backend}").from_pretrained(tmp_path)
        image = PHOTO.resize((640, 427))
        (x,) = theirs(image)["pixel_values"]
        bound = 1e-5 if backend else 2.01 / 255 / min(ours.std)  # torchvision's own rounding
        np.testing.assert_allclose(ours(image), np.transpose(x, (1, 2, 0)), rtol=0, atol=bound)
        equal += 1
    assert equal > 9


@pytest.mark.parametrize(
    ("resize_mode", "interpolation", "fill"),
    [
        ("shortest", "bilinear", 0),
        ("squash", "bicubic", 0),
        ("longest", "bilinear", 0),
        ("longest", "bicubic", 200),  # bars of another colour
    ],
)
def test_open_clips_resize_modes(resize_mode, interpolation, fill, open_clip):
    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": interpolation}
    options |= {"resize_mode": resize_mode}
    transform = open_clip.image_transform(160, is_train=False, fill_color=fill, **options)
    ours = Preprocess(image_size=160, fill=fill, **options)
    shapes = [(451, 300), (300, 451), (160, 160), (33, 60), (333, 331), (801, 160)]
    images = [PHOTO.resize(shape) for shape in shapes]
    images += [Image.open(io.BytesIO(ODD[k])) for k in ("palette", "alpha", "gray", "cmyk jpeg")]
    for image in images:
        assert_same_pixels(ours(image), reference(transform, image))


@pytest.mark.parametrize("name", ["Siglip2ImageProcessor", "Siglip2ImageProcessorPil"])
def test_transformers_naflex_processors(name, tmp_path):
    """From a file with one setting, and from the file that we write."""
    settings = {"image_processor_type": name, "max_num_patches": 100, "do_convert_rgb": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    ours = image_processor.read(tmp_path, 256, "Siglip2", 16)
    again = tmp_path / "again"
    again.mkdir()
    image_processor.write(again, ours, True)
    assert image_processor.read(again, 256, "Siglip2", 16) == ours
    bound = 0 if name.endswith("Pil") else 2  # of 255
    shapes = [(640, 427), (427, 640), (333, 331), (33, 60), (1500, 1), (1, 700), (160, 160)]
    images = [PHOTO.resize(shape) for shape in shapes]
    images += [Image.open(io.BytesIO(data)) for data in ODD.values()]
    for folder in (tmp_path, again):
        theirs = getattr(transformers, name).from_pretrained(folder)
        for image in images:
            out = theirs(image, do_rescale=False, do_normalize=False)
            patches = ours.batch(image)
            np.testing.assert_array_equal(out["spatial_shapes"], patches.grid)
            valid = np.arange(100) < patches.length[0]
            np.testing.assert_array_equal(out["pixel_attention_mask"][0], valid)
            difference = np.abs(np.array(out["pixel_values"][0]) - patches.pixels[0].astype(float))
            assert difference.max() <= bound
        difference = ours.normalize(patches).pixels[0] - np.array(theirs(image)["pixel_values"][0])
        assert np.abs(difference[valid]).max() <= bound / 127.5 + 1e-6
