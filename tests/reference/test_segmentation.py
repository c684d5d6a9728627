"""Segmentation against PyTorch: the published protocols re-typed, patches of libraries' models."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torchmetrics
from PIL import Image
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from clip_jax import sharding
from clip_jax.convert.formats import read_weights
from clip_jax.evals import segmentation
from clip_jax.evals.datasets import IGNORED
from clip_jax.evals.segmentation import SegmentationConfig, Windows
from clip_jax.models.clip import CLIP
from tests.evals.conftest import encoder_on, mesh_of

RNG = np.random.default_rng(0)
SIZES = {"side": 24, "window": 20, "stride": 10}  # 20 pixels are no multiple of the patch size, 8


def published(image, features, side, stride, texts, target):
    """Sliding windows as in the notebooks of DINOv3 and TIPS; `features` of a window [3, S, S]."""
    _, height, width = image.shape
    total = torch.zeros(len(texts), height, width)
    counts = torch.zeros(height, width)
    for i in range(max(height - side + stride - 1, 0) // stride + 1):
        for j in range(max(width - side + stride - 1, 0) // stride + 1):
            bottom, right = min(i * stride + side, height), min(j * stride + side, width)
            top, left = max(bottom - side, 0), max(right - side, 0)
            window = features(image[:, top:bottom, left:right])
            cosines = torch.einsum("cd,hwd->chw", texts, functional.normalize(window, dim=-1))
            shape = (bottom - top, right - left)
            options = {"mode": "bilinear", "align_corners": False}
            cosines = functional.interpolate(cosines[None], size=shape, **options)[0]
            total[:, top:bottom, left:right] += cosines.softmax(dim=0)
            counts[top:bottom, left:right] += 1
    mean = functional.interpolate((total / counts)[None], size=target, **options)[0]
    return mean.argmax(dim=0).numpy()


@pytest.mark.parametrize(("width", "height"), [(31, 24), (24, 45), (60, 50)])
def test_windows_are_those_of_the_published_code(width, height):
    """The image is resized, cut, stretched; scores of patches become classes of pixels."""
    pixels = Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))
    size = [24, int(24 * width / height)] if height < width else [int(24 * height / width), 24]
    resized = np.array(resize(pixels, size, InterpolationMode.BICUBIC))
    generator = torch.Generator().manual_seed(0)
    texts = functional.normalize(torch.randn(5, 7, generator=generator), dim=-1)
    kernel = torch.randn(7, 3, 8, 8, generator=generator)  # of a tower that is one linear map

    def embed(images):
        return functional.conv2d(images, kernel, stride=8).permute(0, 2, 3, 1)

    def features(window):
        side = math.ceil(window.shape[1] / 8) * 8
        options = {"mode": "bicubic", "align_corners": False}
        return embed(functional.interpolate(window[None], size=(side, side), **options))[0]

    encoder = encoder_on(mesh_of(1))
    normal = torch.tensor(np.array(encoder.preprocess.normalize(resized[None])))[0]
    expected = published(normal.permute(2, 0, 1), features, 20, 10, texts, (height, width))

    windows: Any = Windows(encoder, SegmentationConfig(**SIZES))
    ours = windows.resize(pixels)
    assert np.array_equal(ours, resized)

    def compute(_, images, **options):
        return embed(torch.tensor(images).permute(0, 3, 1, 2)).numpy()

    windows._encoder = SimpleNamespace(preprocess=encoder.preprocess, compute=compute)
    got = windows.compute(segmentation.embed_states, windows.of(ours))
    cosines = functional.normalize(torch.tensor(got), dim=-1) @ texts.T
    image = segmentation._Image(0, ours, np.zeros((height, width), np.int64))
    predicted = windows.predict(cosines.numpy(), image)
    assert (predicted != expected).mean() < 1e-3  # where two classes are equal but for rounding


def test_the_mean_over_classes_is_that_of_torchmetrics():
    truth, predicted = RNG.integers(0, 6, (2, 4, 20, 30))
    truth[truth == 5] = IGNORED
    predicted[predicted == 4] = 0  # class 5 is predicted only, class 4 is true only
    confusion = segmentation.confusion_matrix(truth, predicted, 7)  # class 6 is neither
    metric = torchmetrics.JaccardIndex(
        "multiclass", num_classes=7, average="macro", ignore_index=IGNORED
    )
    expected = metric(torch.tensor(predicted), torch.tensor(truth)).item()
    assert segmentation.scores(confusion)["miou"] == pytest.approx(expected, abs=1e-6)


def saved(tmp_path, kind):
    """A small model of transformers with random weights, and ours that is read from its folder."""
    import transformers

    torch.manual_seed(0)
    common = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 32}
    common |= {"intermediate_size": 64}
    vision = common | {"image_size": 32, "patch_size": 8}
    text = common | {"vocab_size": 520, "max_position_embeddings": 12}
    if kind == "clip":
        config = transformers.CLIPConfig(
            vision_config=vision, text_config=text | {"eos_token_id": 519}, projection_dim=16
        )
        model = transformers.CLIPModel(config)
    else:
        config = transformers.SiglipConfig(
            vision_config=vision, text_config=text | {"projection_size": 32}
        )
        model = transformers.SiglipModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "model")
    weights = read_weights(tmp_path / "model")
    return model.eval(), CLIP(replace(weights.config, dtype="float32")), weights.params


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("values", [False, True])
def test_patches_are_those_of_transformers(tmp_path, kind, values):
    """The last block's states or its values, then what the library makes of a pooled state."""
    theirs, model, params = saved(tmp_path, kind)
    images = RNG.normal(size=(2, 32, 32, 3)).astype(np.float32)
    vision, extra = theirs.vision_model, int(kind == "clip")
    with torch.no_grad():
        pixels = torch.tensor(images).permute(0, 3, 1, 2)
        states = vision(pixels, output_hidden_states=True).hidden_states
        x = states[-1]
        if values:
            x, last = states[-2], vision.encoder.layers[-1]
            x = x + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(x)))
            x = x + last.mlp(last.layer_norm2(x))
        x = vision.post_layernorm(x)[:, extra:]
        if kind == "clip":
            expected = theirs.visual_projection(x)
        else:
            alone = [vision.head(x[:, i : i + 1]) for i in range(x.shape[1])]
            expected = torch.stack(alone, dim=1)
    got = model.encode_patches(params, images, values=values)
    assert np.abs(np.asarray(got) - expected.numpy()).max() < 1e-4 * expected.abs().max()


def test_a_class_is_the_mean_of_its_prompts():
    """Unit embeddings of all templates, their mean, to unit length again."""
    encoder = encoder_on(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))
    texts = encoder.classes(["a {c}", "the {c}."], ["cat", "dog"])
    features = torch.tensor(np.stack([encoder.texts(["a cat", "the cat."])]))
    mean = functional.normalize(functional.normalize(features, dim=-1).mean(dim=1), dim=-1)
    got = segmentation.prompts.ensemble(texts)[0]
    np.testing.assert_allclose(got, mean[0], rtol=0, atol=1e-6)
