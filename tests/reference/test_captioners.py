"""CoCa against open_clip, in and out; MaMMUT against a forward pass in torch, written here."""

import importlib
import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from clip_jax.convert import open_clip as layout
from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.formats import read_weights, verify, write_weights
from clip_jax.convert.tensor_files import write_safetensors
from clip_jax.convert.verify import BOUND, our_outputs, random_inputs, relative_difference
from clip_jax.losses import CaptionConfig, SoftmaxConfig
from clip_jax.losses.objective import total
from clip_jax.models.clip import CLIP
from clip_jax.models.decoder import MaMMUTConfig
from clip_jax.models.generation import GenerationConfig, generate
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import State, context, encode
from tests.convert.conftest import CONFIGS
from tests.reference.parity import random_weights

TEXT = {"context_length": 12, "vocab_size": 600, "width": 64}
SETTINGS = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 128,
        "patch_size": 8,
        "output_tokens": True,
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "attn_pooler_queries": 9,
    },
    "text_cfg": TEXT | {"heads": 2, "layers": 2, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT | {"heads": 4, "layers": 3},
}


@pytest.fixture(scope="module")
def coca(open_clip):
    """open_clip's module, with the class that transformers 5 dropped, which only beams need."""
    module = importlib.import_module("open_clip.coca_model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.generation, "BeamSearchScorer", object, raising=False)
        yield importlib.reload(module)


def coca_of(coca, settings: dict[str, Any] = SETTINGS):
    """A random model of open_clip's, drawn where it leaves memory as it was."""
    torch.manual_seed(0)
    text = dict(settings["text_cfg"])
    correct = text.pop("correct_cls_mask", False)
    model = coca.CoCa(**settings | {"text_cfg": text}).eval()
    with torch.no_grad():
        projection = model.text_decoder.text_projection
        projection.normal_(std=0.2)
        projection[:, -1] *= 2.5  # so that some captions end early
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.text.correct_cls_mask = correct
    return model


def folder_of(model, folder, settings=SETTINGS):
    """The folder that open_clip would have pushed."""
    folder.mkdir()
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    write_safetensors(folder / layout.WEIGHTS_NAME, tensors, {"format": "pt"})
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": settings | {"custom_text": True}, "preprocess_cfg": {}})
    )
    return folder


def inputs(config):
    """Pixels, and tokens in which the padding's id stands also between others."""
    images, tokens = random_inputs(config)
    tokens[:, 0] = 598
    tokens[0, :8], tokens[0, 8:] = [598, 5, 0, 6, 7, 8, 9, 599], 0
    return images, tokens


def theirs(model, images, tokens):
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        ids = torch.from_numpy(tokens).long()
        image, text = model.encode_image(pixels, False), model.encode_text(ids, False)
        written = model(pixels, ids)["logits"]
    made = {"image_features": image, "text_features": text, "caption_logits": written}
    return {name: x.numpy() for name, x in made.items()}


def assert_same(weights, images, tokens, expected):
    got = our_outputs(weights.config, weights.params, images, tokens)
    for name, x in expected.items():
        assert np.abs(x).max() > 0.1, name
        assert relative_difference(got[name], x) <= BOUND, name


NARROW = SETTINGS["vision_cfg"] | {"width": 64}
NO_QUERIES = {k: x for k, x in NARROW.items() if not k.startswith("att")}


CORRECT = SETTINGS["text_cfg"] | {"correct_cls_mask": True}
OPTIONS = {
    "the released mask": {},
    # Where all widths agree, a pool's projections are one tensor.
    "the correct mask, one width": {"text_cfg": CORRECT, "vision_cfg": NARROW},
    "no attentional pool": {"vision_cfg": NO_QUERIES},  # as coca_base
    "another padding": {
        "text_cfg": SETTINGS["text_cfg"] | {"pad_id": 5, "hf_tokenizer_name": "toy"}
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_coca_in(coca, tmp_path, name):
    settings = SETTINGS | OPTIONS[name]
    model = coca_of(coca, settings)
    weights = read_weights(folder_of(model, tmp_path / "theirs", settings))
    assert weights.config.text.correct_class_mask is ("correct" in name)
    images, tokens = inputs(weights.config)
    assert_same(weights, images, tokens, theirs(model, images, tokens))


def test_coca_out(coca, open_clip, tmp_path):
    """Bit for bit what came in, by way of our folder."""
    model = coca_of(coca)
    source = folder_of(model, tmp_path / "theirs")
    convert(ConvertConfig(source=source, destination=tmp_path / "ours", to="clip-jax"))
    settings = {"destination": tmp_path / "out", "to": "open-clip"}
    convert(ConvertConfig(source=tmp_path / "ours", **settings))
    done = verify(read_weights(source), tmp_path / "out", "open-clip")
    assert done.differing == ()
    assert done.texts_with_other_ids == 0
    again = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").state_dict()
    for name, x in model.state_dict().items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)


def test_both_losses_are_open_clips(coca, open_clip, tmp_path):
    model = coca_of(coca)
    weights = read_weights(folder_of(model, tmp_path / "theirs"))
    clip = CLIP(replace(weights.config, dtype="float32"))
    _, tokens = inputs(weights.config)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    out = model(
        torch.from_numpy(np.array(clip.normalize(jnp.asarray(pixels)))).permute(0, 3, 1, 2),
        torch.from_numpy(tokens).long(),
    )
    loss = importlib.import_module("open_clip.loss").CoCaLoss(2.0, 1.0)
    labels = out.pop("labels")
    contrastive, caption = (x.item() for x in loss(**out, labels=labels))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = {"image": jnp.asarray(pixels), "text": jnp.asarray(tokens)}
    objective = (SoftmaxConfig(), CaptionConfig())

    @jax.jit
    def compute(params, batch):
        x = context(clip, mesh, State(0, params, None), params, batch, {})
        return total(objective, replace(x, outputs=encode(x, objective)[0]))

    value, metrics = compute(weights.params, batch)
    np.testing.assert_allclose(metrics["contrastive_loss"], contrastive, rtol=BOUND)
    np.testing.assert_allclose(2 * metrics["caption_loss"], caption, rtol=BOUND)
    np.testing.assert_allclose(value, contrastive + caption, rtol=BOUND)


def test_greedy_is_open_clips_generate(coca, tmp_path):
    """Top 1 of 1: least length, forced end and padding behind an early one."""
    model = coca_of(coca)
    weights = read_weights(folder_of(model, tmp_path / "theirs"))
    clip = CLIP(replace(weights.config, dtype="float32"))
    images = np.random.default_rng(3).normal(size=(16, 32, 32, 3)).astype(np.float32)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    _, image_tokens = jax.jit(clip.encode_image_and_tokens)(weights.params, images)
    config = GenerationConfig(max_length=11, min_length=5)
    write = jax.jit(lambda p, x: generate(clip, p, x, config))
    params = jax.tree.map(np.array, weights.params)  # which are changed below
    kernel = params["decoder"]["vocab_projection"]
    ends = set()
    for boost in (1, 3, 9):  # the end of text comes earlier and earlier
        with torch.no_grad():
            model.text_decoder.text_projection[:, -1] *= boost
        kernel[:, -1] *= boost
        expected = model.generate(
            pixels,
            generation_type="top_k",
            top_k=1,
            seq_len=11,
            min_seq_len=5,
            sot_token_id=598,
            eos_token_id=599,
            fixed_output_length=True,
        ).numpy()
        np.testing.assert_array_equal(write(params, image_tokens), expected)
        ends |= set((expected == 599).argmax(1))
    assert 10 in ends
    assert len(ends) > 1


# ------------------------------------------------------------------ MaMMUT


def attention(w, name, x, other, heads, causal=False):
    weights = (w[f"{name}.in_proj_weight"].chunk(3), w[f"{name}.in_proj_bias"].chunk(3))
    q, k, v = (
        F.linear(a, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
        for a, weight, bias in zip((x, other, other), *weights, strict=True)
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
    return linear(w, f"{name}.out_proj", y)


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def block(w, name, x, heads, causal=False, image=None):
    other = norm(w, f"{name}.ln_1", x) if image is None else norm(w, f"{name}.ln_1_kv", image)
    x = x + attention(w, f"{name}.attn", norm(w, f"{name}.ln_1", x), other, heads, causal)
    if f"{name}.mlp.c_fc.weight" not in w:
        return x
    y = linear(w, f"{name}.mlp.c_fc", norm(w, f"{name}.ln_2", x))
    return x + linear(w, f"{name}.mlp.c_proj", F.gelu(y))


def text(w, ids, heads, depth, every, image=None):
    """LAION's text tower: without an image it sees all tokens, with one those before."""
    x = w["text.token_embedding.weight"][ids] + w["text.positional_embedding"][: ids.shape[1]]
    for i in range(depth):
        x = block(w, f"text.resblocks.{i}", x, heads, causal=image is not None)
        if image is not None and i % every == 0:
            x = block(w, f"text.cross_attn.{i // every}", x, heads, image=image)
    return norm(w, "text.ln_final", x)


def mammut(w, images, ids, config):
    vision = config.vision
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    x = F.conv2d(pixels, w["visual.conv1.weight"], stride=vision.patch_size).flatten(2).mT
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(w, "visual.ln_pre", x + w["visual.positional_embedding"])
    for i in range(vision.depth):
        x = block(w, f"visual.transformer.resblocks.{i}", x, vision.num_heads)
    sizes = config.text.num_heads, config.text.depth, config.decoder.cross_every
    written = text(w, ids[:, :-1], *sizes, image=x @ w["map_viz2txt_kv"])
    return {
        "image_features": norm(w, "visual.ln_post", x.mean(1)) @ w["visual.proj"],
        "text_features": text(w, ids, *sizes).mean(1),
        "caption_logits": written @ w["text.text_projection"],
    }


@pytest.mark.parametrize("first_mlp", [False, True])
def test_mammut_is_laions_both_ways(tmp_path, first_mlp):
    decoder = MaMMUTConfig(cross_every=2, first_mlp=first_mlp)
    config = replace(CONFIGS["mammut"], decoder=decoder)
    weights = random_weights(config, np.float32)
    write_weights(weights, tmp_path / "out", "open-clip")
    w = {name: torch.from_numpy(x) for name, x in layout.to_tensors(weights).items()}
    images, tokens = random_inputs(config)
    expected = mammut(w, images, torch.from_numpy(tokens).long(), config)
    again = read_weights(tmp_path / "out")
    assert again.config.decoder == decoder
    assert_same(again, images, tokens, {name: x.numpy() for name, x in expected.items()})
