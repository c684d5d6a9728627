"""NaFlex: sizes, patches and embeddings of transformers' `Siglip2Model`, of images of any shape."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, Siglip2Config, Siglip2Model
from transformers.models.siglip2 import image_processing_pil_siglip2 as processing

from clip_jax.convert import hugging_face
from clip_jax.convert.formats import read_weights, verify, write_weights
from clip_jax.convert.on_demand import loaded
from clip_jax.convert.state_dict import to_params
from clip_jax.convert.tensor_files import read_tensors
from clip_jax.convert.verify import our_outputs, random_inputs
from clip_jax.convert.weights import Weights, default_preprocess
from clip_jax.inference.loading import load
from clip_jax.losses import SigmoidConfig
from clip_jax.losses.objective import total
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP
from clip_jax.models.images import NaFlex, Patches, fit_patches
from clip_jax.models.text import TokenizerConfig
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import State, context, encode
from tests import vocabularies
from tests.conftest import assert_close
from tests.convert.conftest import assert_same
from tests.reference.parity import random_weights, read_back

# One row, one column, full squares, and shapes between, of up to 300 patches: more than 16 x 16.
GRIDS = [
    *((1, 1), (1, 2), (2, 1), (1, 7), (7, 1), (1, 33), (33, 1), (1, 256), (256, 1), (1, 300)),
    *((300, 1), (2, 150), (150, 2), (3, 100), (16, 16), (17, 17), (15, 15), (8, 8), (4, 4)),
    *((16, 1), (1, 16), (16, 8), (8, 16), (15, 17), (17, 15), (32, 9), (9, 32), (14, 18)),
]
GRIDS += [
    (int(rows), int(np.random.default_rng(rows).integers(1, 300 // rows + 1)))
    for rows in range(2, 2 + 50 - len(GRIDS))
]


def patches_of(grids, config, length=300):
    """Random normalised patches of images with these grids; the padding is random, too."""
    rng = np.random.default_rng(0)
    width = 3 * config.vision.patch_size**2
    return Patches(
        rng.standard_normal((len(grids), length, width), np.float32),
        np.array(grids, np.int32),
        np.prod(grids, axis=1, dtype=np.int32),
    )


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def embeddings(weights, path, grids, length):
    """Our unit embeddings of images with these grids, which are transformers'."""
    _, tokens = random_inputs(weights.config)
    inputs = patches_of(grids, weights.config, length), tokens
    ours = our_outputs(weights.config, weights.params, *inputs)
    theirs = hugging_face.load(weights, path).outputs(inputs)
    for name in ("image_features", "text_features"):
        difference = unit(ours[name]) - unit(theirs[name])
        assert np.linalg.norm(difference, axis=1).max() <= 1e-5
    return unit(ours["image_features"])


def assert_same_embeddings(weights, path):
    """Each image in one batch of all shapes, and some in small batches of other lengths."""
    assert len(set(GRIDS)) == len(GRIDS) == 50
    turned = [grid[::-1] for grid in GRIDS]
    batches = [(GRIDS, 300), (turned, 300), (GRIDS[9:20:3], 320), (GRIDS[3:5], 7)]
    found = [embeddings(weights, path, *batch) for batch in batches]
    # The same pixels in other positions are another image.
    moved = np.linalg.norm(found[0] - found[1], axis=1)
    assert all((x > 1e-3) == (grid[0] != grid[1]) for x, grid in zip(moved, GRIDS, strict=True))


@pytest.fixture
def naflex() -> Weights:
    """A NaFlex of two layers whose table of positions has std 1, so that errors show."""
    config = zoo.get("ViT-B-16-SigLIP2-naflex")
    sizes = {"width": 64, "depth": 2, "num_heads": 4}
    rules = TokenizerConfig(file="", clean="lower")
    config = replace(
        config,
        embed_dim=64,
        vision=replace(config.vision, image_size=64, patch_size=4, max_patches=300, **sizes),
        text=replace(config.text, context_length=12, vocab_size=300, tokenizer=rules, **sizes),
    )
    weights = random_weights(config, np.float32)
    table = weights.params["visual"]["positional_embedding"]
    table[:] = np.random.default_rng(2).standard_normal(table.shape, np.float32)
    preprocess = replace(default_preprocess(config), rules="torchvision", interpolation="bilinear")
    return replace(weights, preprocess=preprocess)


def test_our_models_embeddings_in_transformers(naflex, tmp_path):
    write_weights(naflex, tmp_path, "hugging-face")
    assert_same_embeddings(naflex, tmp_path)
    assert verify(naflex, tmp_path, "hugging-face").passed
    assert_same(read_weights(tmp_path), naflex)


def test_transformers_own_folder(tmp_path):
    """Written by transformers, in its defaults where it has some."""
    torch.manual_seed(0)
    towers = {
        "hidden_size": 64,
        "intermediate_size": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vision = {**towers, "patch_size": 4}
    model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=towers)).eval()
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight.normal_()
        model.vision_model.embeddings.patch_embedding.bias.normal_()
        model.vision_model.head.attention.in_proj_bias.normal_()
        model.logit_scale.fill_(1.3)
        model.logit_bias.fill_(-2.1)
    model.save_pretrained(tmp_path)
    settings = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 4}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    weights = read_weights(tmp_path)
    assert weights.config.vision.grid == 16
    assert weights.config.vision.image_spec == weights.preprocess.image_spec == NaFlex(256, 4)
    embeddings(weights, tmp_path, GRIDS, 300)  # of other lengths: the test above
    assert verify(weights, tmp_path, "hugging-face").passed
    original = read_tensors(tmp_path / "model.safetensors")
    read_back(weights, tmp_path / "out", "hugging-face", original)


def test_a_written_folder_is_used_through_auto_classes(naflex, tmp_path):
    """Our probabilities of pictures and texts, as the model card says; `AutoProcessor` of
    transformers 5.24 has a patch size and a number of patches of its own.

    The pictures need no resizing, which by torchvision differs in a few bits.
    """
    vocabulary = vocabularies.byte_fallback(tmp_path / "tokenizer.json")
    text = naflex.config.text
    tokenizer = TokenizerConfig(file=str(vocabulary), clean="lower", end_id=1, pad_id=0)
    config = replace(naflex.config, text=replace(text, vocab_size=400, tokenizer=tokenizer))
    weights = replace(random_weights(config, np.float32), preprocess=naflex.preprocess)
    write_weights(weights, tmp_path / "folder", "hugging-face")
    rng = np.random.default_rng(0)
    sizes = [weights.preprocess.image_spec.fit(*size) for size in ((3, 4), (500, 90), (1, 900))]
    pictures = [rng.integers(0, 256, (*size[::-1], 3), np.uint8) for size in sizes]
    texts = ["A photo of a CAT", "a red bicycle, in the rain!"]
    folder = {"pretrained_model_name_or_path": tmp_path / "folder", "local_files_only": True}
    images = AutoImageProcessor.from_pretrained(**folder)(
        [Image.fromarray(x) for x in pictures], return_tensors="pt"
    )
    ids = AutoTokenizer.from_pretrained(**folder)(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    )["input_ids"]
    model = AutoModel.from_pretrained(**folder).eval()
    with torch.no_grad():
        theirs = model(input_ids=ids, **images)
    ours = load(tmp_path / "folder", dtype="float32")
    features = ours.encode_image(ours.preprocess(pictures))
    found = ours.probabilities(features, ours.encode_text(ours.tokenize(texts)))
    np.testing.assert_allclose(found, theirs.logits_per_image.sigmoid(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(unit(features), theirs.image_embeds, rtol=0, atol=1e-5)


def test_a_table_that_is_not_square_is_refused(naflex, tmp_path):
    write_weights(naflex, tmp_path, "hugging-face")
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    assert "image_size" not in content["vision_config"]
    content["vision_config"]["num_patches"] = 255
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="num_patches has 255 positions, which is not the square"):
        read_weights(tmp_path)


def test_sizes_are_those_of_transformers_for_100_000_random_images():
    rng = np.random.default_rng(0)
    count = 100_000
    sides = np.exp(rng.uniform(0, np.log(10_000), (count, 2))).astype(int).tolist()
    patches = rng.choice([14, 16, 32], count).tolist()
    most = rng.choice([1, 49, 128, 256, 576, 784, 1024], count).tolist()
    theirs = processing.get_image_size_for_max_num_patches
    ours = fit_patches.__wrapped__  # all sizes differ: the cache would only cost time
    wrong = [
        (width, height)
        for (width, height), patch, number in zip(sides, patches, most, strict=True)
        if ours(width, height, patch, number) != theirs(height, width, patch, number)[::-1]
    ]
    assert not wrong
    assert fit_patches(1, 1, 16, 1024) == (7 * 16, 7 * 16)  # enlarged a hundred times, no more


def test_patches_are_those_of_transformers_bit_for_bit():
    rng = np.random.default_rng(0)
    for rows, columns in ((3, 5), (1, 12), (12, 1), (4, 4)):
        image = rng.integers(0, 256, (4 * rows, 4 * columns, 3), np.uint8)
        theirs = processing.convert_image_to_patches(image.transpose(2, 0, 1), 4)
        theirs, mask = processing.pad_along_first_dim(theirs, 16)
        ours = NaFlex(16, 4).pack(image[None])
        np.testing.assert_array_equal(ours.pixels[0], theirs)
        assert ours.pixels.dtype == theirs.dtype
        np.testing.assert_array_equal(np.arange(16) < ours.length, mask)
        np.testing.assert_array_equal(ours.grid, [(rows, columns)])


def test_loss_and_gradients_of_a_padded_batch_are_those_of_each_image_alone(naflex, tmp_path):
    """The sigmoid loss; the reference computes in float64, one image at a time, without padding."""
    grids = [(1, 40), (40, 1), (6, 6), (1, 1), (3, 9), (5, 8), (2, 7), (13, 3)]
    images = patches_of(grids, naflex.config, 44)
    _, tokens = random_inputs(naflex.config)
    tokens = np.concatenate([tokens, tokens[::-1, ::-1]])[: len(grids)]
    write_weights(naflex, tmp_path, "hugging-face")
    theirs = Siglip2Model.from_pretrained(tmp_path).double()
    alone = [
        theirs.get_image_features(
            pixel_values=torch.tensor(images.pixels[i : i + 1, : a * b]).double(),
            pixel_attention_mask=torch.ones(1, a * b),
            spatial_shapes=torch.tensor([[a, b]]),
        ).pooler_output
        for i, (a, b) in enumerate(grids)
    ]
    texts = theirs.get_text_features(input_ids=torch.tensor(tokens).long()).pooler_output
    image, text = (torch.nn.functional.normalize(x) for x in (torch.cat(alone), texts))
    logits = image @ text.T * theirs.logit_scale.exp() + theirs.logit_bias
    expected = -torch.nn.functional.logsigmoid((2 * torch.eye(len(grids)) - 1) * logits).sum(1)
    expected.mean().backward()

    model = CLIP(replace(naflex.config, dtype="float32"))
    objective = (SigmoidConfig(),)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    inputs = {"image": images, "text": jnp.asarray(tokens)}

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        state = State(0, params, None)
        outputs, _ = encode(context(model, mesh, state, params, inputs, {}), objective)
        return total(objective, context(model, mesh, state, params, inputs, outputs))[0]

    value, gradients = loss(naflex.params)
    assert value == pytest.approx(expected.mean().item(), rel=1e-5)
    named = {name: x.grad.numpy() for name, x in theirs.named_parameters()}
    table = hugging_face.rows(naflex.config)
    assert_close(loaded(to_params(table, named, naflex.config, "gradients")), gradients)
