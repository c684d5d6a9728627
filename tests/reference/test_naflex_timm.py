"""NaFlex towers in open_clip's folders: the images and embeddings of timm's NaFlex, both ways."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_transforms import Patchify, ResizeToSequence
from timm.models import register_model
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torchvision import transforms

from clip_jax.convert import open_clip as ours
from clip_jax.convert import timm
from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.formats import read_weights, verify, write_weights
from clip_jax.convert.tensor_files import read_tensors
from clip_jax.convert.weights import with_input
from clip_jax.errors import InputError
from clip_jax.inference.loading import Model, unit
from clip_jax.models import zoo
from clip_jax.models.images import NaFlex, Patches
from clip_jax.models.text import TokenizerConfig
from tests.convert.conftest import assert_same
from tests.reference.parity import random_weights, read_back

# Rows and columns: lines, full squares, and the rest of up to 400 patches at random.
SHAPES = [
    *((1, 1), (1, 2), (1, 7), (1, 16), (1, 17), (1, 64), (1, 256), (1, 400)),
    *((2, 1), (7, 1), (16, 1), (17, 1), (64, 1), (256, 1), (400, 1)),
    *((side, side) for side in (2, 8, 12, 15, 16, 17, 20)),
]
SHAPES += [
    (int(rows), int(np.random.default_rng(rows).integers(1, 400 // rows + 1)))
    for rows in range(2, 2 + 50 - len(SHAPES))
]
TOY = {"width": 64, "depth": 2, "num_heads": 4}


def siglip2(name="ViT-B-16-SigLIP2-naflex", **vision):
    """A NaFlex with a text tower of one layer, and positions of which a wrong resizing shows."""
    config = zoo.get(name)
    image = replace(config.vision, **vision)
    rules = TokenizerConfig(file="", clean="canonicalize")
    sizes = {"width": image.width, "depth": 1, "num_heads": 4, "vocab_size": 300}
    text = replace(config.text, context_length=12, tokenizer=rules, **sizes)
    config = replace(config, embed_dim=image.width, vision=image, text=text)
    weights = random_weights(config, np.float32)
    table = weights.params["visual"]["positional_embedding"]
    table[:] = np.random.default_rng(1).standard_normal(table.shape, np.float32)
    return weights


def naflexvit_toy_siglip(pretrained=False, **options):
    """timm's class of the released towers, small."""
    config = NaFlexVitCfg(
        patch_size=16,
        embed_dim=64,
        depth=2,
        num_heads=4,
        act_layer=NaFlexVitToy.activation,
        global_pool="map",
        pos_embed_interp_mode="bilinear",
    )
    return NaFlexVit(config, num_classes=0)


class NaFlexVitToy:
    activation = "gelu_tanh"


@pytest.fixture
def toy(monkeypatch):
    """Weights of a small tower that timm has under a name; open_clip can build no other."""
    register_model(naflexvit_toy_siglip)
    weights = siglip2(**TOY)
    monkeypatch.setitem(timm.TOWERS, "naflexvit_toy_siglip", weights.config.vision)
    return weights


def both_inputs(shapes, length):
    """Images of these shapes as timm's loader passes them, and as our patches; ours have numbers
    in the padding."""
    rng, patchify = np.random.default_rng(2), Patchify(16)
    sizes = [(3, 16 * rows, 16 * columns) for rows, columns in shapes]
    images = [torch.from_numpy(rng.standard_normal(size, np.float32)) for size in sizes]
    theirs, _ = NaFlexCollator(length)([(patchify(image), 0) for image in images])
    grid = np.array(shapes, np.int32)
    pixels, lengths = theirs["patches"].numpy().copy(), grid.prod(1).astype(np.int32)
    pixels[~theirs["patch_valid"].numpy()] = 3.0
    return theirs, Patches(pixels, grid, lengths)


def embeddings(weights, images):
    config = replace(weights.config, dtype="float32")
    with jax.default_matmul_precision("highest"):
        return unit(Model(config, weights.params, weights.preprocess).encode_image(images))


def difference(weights, model, theirs, images):
    """The largest difference of unit embeddings."""
    with torch.no_grad():
        expected = model.encode_image(theirs, normalize=True).numpy()
    return np.linalg.norm(embeddings(weights, images) - expected, axis=1).max()


def test_fifty_shapes_of_our_folder_in_open_clip(open_clip, toy, tmp_path):
    write_weights(toy, tmp_path, "open-clip")
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    for shapes, length in ((SHAPES, 400), (SHAPES[3:40:7], 450), (SHAPES[19:20], 256)):
        assert difference(toy, model, *both_inputs(shapes, length)) <= 1e-5
    assert verify(toy, tmp_path, "open-clip").passed
    assert_same(read_weights(tmp_path), toy)


def test_fifty_shapes_of_open_clips_folder(open_clip, toy, tmp_path):
    """With the settings of open_clip's own NaFlex models, and random weights of PyTorch's."""
    words = {"context_length": 12, "vocab_size": 300, "width": 64, "heads": 4, "layers": 1}
    words = {**words, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    image = {"timm_model_name": "naflexvit_toy_siglip", "timm_pool": "map", "timm_proj": "none"}
    image["image_size"] = 384
    settings = {"embed_dim": 64, "init_logit_bias": -10, "vision_cfg": image, "text_cfg": words}
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**settings).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.add_(torch.randn(x.shape) * (1 if "pos_embed" in name else 0.1))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors", {"format": "pt"})
    image["image_seq_len"] = 500  # of open_clip 4
    words["hf_tokenizer_name"] = "timm/ViT-B-16-SigLIP2-256"
    content = {"model_cfg": settings, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    weights = read_weights(tmp_path)
    assert weights.config.vision.image_spec == weights.preprocess.image_spec == NaFlex(500, 16)
    assert weights.config.vision.grid == 16
    assert difference(weights, model, *both_inputs(SHAPES, 400)) <= 1e-5
    original = read_tensors(tmp_path / "open_clip_model.safetensors")
    read_back(weights, tmp_path / "again", "open-clip", original)


def test_the_released_tower_by_its_name(open_clip, tmp_path):
    """B/16, whose name alone gives timm its sizes, its activation and its rule of resizing."""
    weights = siglip2()
    write_weights(weights, tmp_path, "open-clip", dtype="float32")
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    shapes = [(1, 64), (64, 1), (8, 8), (5, 11), (2, 3)]
    assert difference(weights, model, *both_inputs(shapes, 64)) <= 1e-5


def test_images_are_those_of_timm(open_clip, toy, tmp_path):
    """From pictures to embeddings, with timm's transforms, which open_clip 4 uses."""
    toy = with_input(toy, tokens=100)
    write_weights(toy, tmp_path, "open-clip")
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    rng = np.random.default_rng(0)
    sizes = [(640, 480), (30, 200), (200, 30), (5, 1), (1, 1), (500, 500)]
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]
    resize = ResizeToSequence(16, 100, interpolation="bicubic")
    normal = transforms.Normalize([0.5] * 3, [0.5] * 3)
    steps = transforms.Compose([resize, transforms.ToTensor(), normal, Patchify(16)])
    theirs, _ = NaFlexCollator(100)([(steps(picture), 0) for picture in pictures])
    weights = read_weights(tmp_path)
    images = Model(weights.config, weights.params, weights.preprocess).preprocess(pictures)
    valid = theirs["patch_valid"].numpy()
    pixels = theirs["patches"].numpy()
    np.testing.assert_allclose(images.pixels[valid], pixels[valid], rtol=0, atol=1e-6)
    assert difference(toy, model, theirs, images) <= 1e-5


def test_open_clips_own_preprocessing_is_square(open_clip, toy, tmp_path):
    """As the model card says: the embeddings of squashed images, at the folder's number of patches
    or, where that is no square, the next lower one."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (300, 200, 3), np.uint8))
    for tokens, side in ((100, 160), (128, 176)):
        weights, folder = with_input(toy, tokens=tokens), tmp_path / str(tokens)
        write_weights(weights, folder, "open-clip")
        assert read_weights(folder).config.vision.max_patches == tokens
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        square = with_input(weights, image_size=side)
        images = square.preprocess(picture)[None]
        assert difference(square, model.eval(), preprocess(picture)[None], images) <= 1e-5


def test_the_activation_that_a_name_fixes(monkeypatch, toy, tmp_path):
    monkeypatch.setattr(NaFlexVitToy, "activation", "gelu")
    vision = replace(toy.config.vision, activation="gelu")
    monkeypatch.setitem(timm.TOWERS, "naflexvit_toy_siglip", vision)
    write_weights(toy, tmp_path / "ours", "clip-jax")
    settings = {"source": tmp_path / "ours", "destination": tmp_path / "out", "to": "open-clip"}
    with pytest.raises(InputError, match=r"name in timm fixes it.*--accept-activation"):
        convert(ConvertConfig(**settings))
    done = convert(ConvertConfig(**settings, accept_activation=True, verify=True))
    assert done.activation_difference is not None
    assert 1e-5 < done.activation_difference < 1e-2
    assert done.verification is not None
    assert done.verification.passed
    assert "squashes images to squares" in (tmp_path / "out/README.md").read_text()


def test_towers_without_a_name_and_tables_of_another_grid(toy, tmp_path):
    for vision, match in (
        ({"image_size": 224}, "NaFlex with 14 x 14 positions"),
        ({"depth": 3}, "depth 3"),
        ({"pool": "mean", "class_token": True}, "vision.max_patches=256"),
    ):
        with pytest.raises(InputError, match=match):
            ours.to_tensors(siglip2(**TOY | vision))
    write_weights(toy, tmp_path, "open-clip")
    tensors = {
        name: torch.from_numpy(x) for name, x in read_tensors(tmp_path / ours.WEIGHTS_NAME).items()
    }
    tensors["visual.trunk.embeds.pos_embed"] = torch.zeros(1, 14, 14, 64)
    save_file(tensors, tmp_path / ours.WEIGHTS_NAME, {"format": "pt"})
    with pytest.raises(InputError, match=r"\[1, 14, 14, 64\] found, \[1, 16, 16, 64\] needed"):
        read_weights(tmp_path)
