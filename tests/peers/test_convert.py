"""The same numbers as openai-clip, open_clip and transformers, from their files and back.

The bound is 1e-5 of ‖a − b‖/‖b‖ on image features, text features and logits, float32 on CPU. That
the comparison can fail is tested too: `test_the_comparison_notices`.
"""

import json
import warnings
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch

from clip_jax.convert import openai
from clip_jax.convert.files import read_tensors
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.positions import resize_positions
from clip_jax.convert.verify import BOUND, our_outputs, random_inputs, relative_difference, verify
from clip_jax.convert.weights import Weights, default_inputs
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.resnet import ResNetConfig

TEXTS = ["a photo of a cat", "Ünïcödé &amp; <b>HTML</b>!", "seven  o'clock 42", "😀"]

# open_clip's settings of small models, one for every option that we have.
VISION = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
RESNET = {"layers": [1, 2, 1, 1], "width": 16, "patch_size": None}
OPEN_CLIP = {
    "quickgelu": ({"quick_gelu": True}, {}, {}),
    "gelu": ({}, {}, {}),
    "gelu tanh": ({}, {"act_kwargs": {"approximate": "tanh"}}, {}),
    "mean pooling": ({}, {"pool_type": "avg", "final_ln_after_pool": True}, {}),
    "no ln_pre": ({}, {"no_ln_pre": True}, {}),
    "layer scale": ({}, {"ls_init_value": 0.1}, {}),
    "heads of 32, wide MLP": ({}, {"head_width": 32, "mlp_ratio": 4.3637}, {"heads": 2}),
    "context of 77": ({}, {}, {"context_length": 77}),
    "not causal, last token": ({}, {}, {"no_causal_mask": True, "pool_type": "last"}),
    "end of text by id": ({}, {}, {"pool_type": "eos", "eos_id": 49407}),
    "sigmoid": ({"init_logit_bias": -10.0}, {}, {"proj_bias": True, "norm_kwargs": {"eps": 1e-6}}),
    "resnet": ({}, RESNET, {}),
    "resnet, quickgelu": ({"quick_gelu": True}, RESNET, {}),
    "custom text": ({"custom_text": True}, {}, {}),
}
HUGGING_FACE = {
    "legacy eos": ({}, {"eos_token_id": 2}),
    "new eos": ({}, {"eos_token_id": 49407}),
    "gelu": ({"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
    "one gelu": ({"hidden_act": "gelu", "layer_norm_eps": 1e-6}, {}),
    "odd MLP": ({"intermediate_size": 201}, {"intermediate_size": 77, "num_attention_heads": 4}),
    "eos below others": ({}, {"eos_token_id": 49407, "vocab_size": 49410}),
}
OPENAI = {
    "vit": (48, 64, 2, 128, 16, 20, 49408, 64, 1, 2),
    "resnet": (48, 64, (1, 2, 1, 1), 16, None, 20, 49408, 64, 1, 2),
}


def lively(model):
    """BatchNorm at work: fresh gains of 0 and statistics of 0 and 1 would hide mistakes."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def outputs(encode_image, encode_text, model, images, ids):
    """A peer's features and logits."""
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        image, text = encode_image(pixels), encode_text(torch.from_numpy(ids).long())
        unit = [x / x.norm(dim=-1, keepdim=True) for x in (image, text)]
        logits = unit[0] @ unit[1].T * model.logit_scale.exp()
        bias = getattr(model, "logit_bias", None)
        logits = logits if bias is None else logits + bias
    names = ("image_features", "text_features", "logits")
    return {n: x.numpy() for n, x in zip(names, (image, text, logits), strict=True)}


def of(model, images, ids):
    """A peer's outputs by the method names of openai-clip and open_clip, or transformers."""
    if hasattr(model, "encode_image"):
        return outputs(model.encode_image, model.encode_text, model, images, ids)
    return outputs(
        lambda x: model.get_image_features(pixel_values=x).pooler_output,
        lambda x: model.get_text_features(input_ids=x).pooler_output,
        model, images, ids,
    )  # fmt: skip


def difference(weights, peer, images, our_ids, their_ids):
    """Largest relative difference, each side with its own token ids.

    The ids are compared first: all of them, or, where the peer pads with end of text as
    transformers does, up to the end of text.
    """
    end = weights.tokenizer.vocab_size - 1
    padded = np.array(our_ids)
    if (their_ids[:, -1] == end).all() and (our_ids[:, -1] != end).any():
        after = np.cumsum(padded == end, axis=1) > 0
        assert (padded[after & (padded != end)] == weights.tokenizer.pad_id).all()
        padded[after] = end
    if not np.array_equal(padded, their_ids):
        return float("inf")
    ours = our_outputs(weights.config, weights.params, images, our_ids)
    theirs = of(peer, images, their_ids)
    return max(relative_difference(ours[name], theirs[name]) for name in theirs)


def read_back(weights, path, to, original, **options):
    """Write what was read; the tensors are the original file's, bit for bit."""
    write_weights(weights, path, to, **options)
    names = {"open-clip": "open_clip_model.safetensors", "hugging-face": "model.safetensors"}
    again = read_tensors(path / names[to] if to in names else path)
    assert again.keys() == original.keys()
    for name, array in original.items():
        assert again[name].dtype == array.dtype, name
        assert again[name].tobytes() == array.tobytes(), name


# ------------------------------------------------------------------ theirs, small, every option


def open_clip_model(open_clip, tmp_path, top, vision, text):
    torch.manual_seed(0)
    config = {"embed_dim": 48, "vision_cfg": VISION | vision, "text_cfg": TEXT | text, **top}
    kind = open_clip.CustomTextCLIP if top.get("custom_text") else open_clip.CLIP
    arguments = {name: x for name, x in config.items() if name != "custom_text"}
    model = lively(kind(**arguments))
    tmp_path.mkdir(exist_ok=True)
    content = {"model_cfg": config, "preprocess_cfg": {"interpolation": "bilinear"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    return model


def save_open_clip(model, folder, dtype="float32"):
    state = model.state_dict()
    if dtype == "float16":
        state = {n: x.half() if x.is_floating_point() else x for n, x in state.items()}
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    original = read_tensors(folder / "open_clip_pytorch_model.bin")
    return {name.removeprefix("text."): x for name, x in original.items()}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(open_clip, tmp_path, name):
    model = open_clip_model(open_clip, tmp_path / "in", *OPEN_CLIP[name])
    original = save_open_clip(model, tmp_path / "in")
    weights = read_weights(tmp_path / "in")
    assert weights.preprocess.interpolation == "bilinear"

    images, _ = random_inputs(weights.config)
    ours = weights.tokenizer.build()(TEXTS, weights.config.text.context_length, True)
    tokenizer = open_clip.SimpleTokenizer(context_length=weights.config.text.context_length)
    assert difference(weights, model, images, ours, tokenizer(TEXTS).numpy()) <= BOUND

    read_back(weights, tmp_path / "out", "open-clip", original)
    again, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    theirs = of(again.eval(), images, ours)
    for key, value in of(model, images, ours).items():
        assert relative_difference(theirs[key], value) <= BOUND
    assert "bilinear" in str(preprocess.transforms[0].interpolation).lower()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    assert np.array_equal(tokenizer(TEXTS).numpy(), ours)


@pytest.mark.parametrize("name", ["gelu", "sigmoid", "resnet"])
def test_open_clip_in_float16(open_clip, tmp_path, name):
    model = open_clip_model(open_clip, tmp_path / "in", *OPEN_CLIP[name])
    original = save_open_clip(model, tmp_path / "in", "float16")
    read_back(read_weights(tmp_path / "in"), tmp_path / "out", "open-clip", original)


def hugging_face_model(vision, text):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config={
            "image_size": 64, "patch_size": 16, "hidden_size": 128, "intermediate_size": 512,
            "num_hidden_layers": 2, "num_attention_heads": 2, **vision,
        },
        text_config={
            "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 1, "max_position_embeddings": 20, **text,
        },
        projection_dim=48,
    )  # fmt: skip
    return transformers.CLIPModel(config).eval()


def save_hugging_face(model, folder, **options):
    model.save_pretrained(folder, **options)
    original = {}
    for path in folder.glob("*.safetensors"):
        original |= read_tensors(path)
    return original


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(tmp_path, name):
    from transformers import CLIPModel, CLIPProcessor

    model = hugging_face_model(*HUGGING_FACE[name])
    original = save_hugging_face(model, tmp_path / "in")
    weights = read_weights(tmp_path / "in")
    assert weights.config.text.pool == ("eos" if name == "eos below others" else "argmax")

    read_back(weights, tmp_path / "out", "hugging-face", original)
    processor = CLIPProcessor.from_pretrained(tmp_path / "out", local_files_only=True)
    texts = [text for text in TEXTS if "&" not in text]  # transformers unescapes no HTML
    ours = weights.tokenizer.build()(texts, 20, True)
    theirs = processor(text=texts, padding="max_length", truncation=True, return_tensors="np")
    images, _ = random_inputs(weights.config)
    images = images[: len(texts)]
    assert difference(weights, model, images, ours, theirs["input_ids"]) <= BOUND
    again = CLIPModel.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    assert difference(weights, again, images, ours, theirs["input_ids"]) <= BOUND
    padded = processor(text=texts, padding=True, return_tensors="np")["input_ids"]
    assert padded.shape[1] < 20


def test_hugging_face_in_shards_and_float16(tmp_path):
    model = hugging_face_model({}, {})
    original = save_hugging_face(model, tmp_path / "in", max_shard_size="5MB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    read_back(read_weights(tmp_path / "in"), tmp_path / "out", "hugging-face", original)
    original = save_hugging_face(model.half(), tmp_path / "half")
    read_back(read_weights(tmp_path / "half"), tmp_path / "out", "hugging-face", original)


@pytest.mark.parametrize("archive", ["zip", "stream", "torchscript"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", OPENAI)
def test_openai(openai_clip, tmp_path, name, dtype, archive):
    from clip.model import CLIP as Peer
    from clip.model import convert_weights

    torch.manual_seed(0)
    model = lively(Peer(*OPENAI[name]))
    if dtype == "float16":
        convert_weights(model)
    sizes = dict(zip(openai.SIZES, (OPENAI[name][1], 20, 49408), strict=True))
    state = model.state_dict() | {n: torch.tensor(x) for n, x in sizes.items()}
    path = tmp_path / "in.pt"
    if archive == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(Shell(state)).save(str(path))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=archive == "zip")
    original = read_tensors(path)
    assert original.keys() == state.keys()
    weights = read_weights(path)
    model = model.float()

    images, _ = random_inputs(weights.config)
    ours = weights.tokenizer.build()(TEXTS, 20, True)
    theirs = openai_clip.tokenize(TEXTS, 20, truncate=True).numpy()
    assert difference(weights, model, images, ours, theirs) <= BOUND
    read_back(weights, tmp_path / "plain.pt", "openai", original, plain=True)
    read_back(weights, tmp_path / "archive.pt", "openai", original)
    if archive != "zip":
        return
    found = verify(weights, tmp_path / "archive.pt", "openai")
    assert found.passed
    if dtype == "float16":
        assert found.rounding_loss == 0
    else:
        assert 1e-5 < found.rounding_loss < 1e-2
    assert verify(weights, tmp_path / "plain.pt", "openai", plain=True).passed


class Shell(torch.nn.Module):
    """The nested attributes of a state dict, as TorchScript stores them."""

    def __init__(self, state):
        super().__init__()
        for name, x in state.items():
            parts = name.split(".")
            module = self
            for part in parts[:-1]:
                if part not in module._modules:
                    module.add_module(part, Shell({}))
                module = module._modules[part]
            module.register_buffer(parts[-1], x)


# ------------------------------------------------------------------ ours, to every format


def random_weights(config: CLIPConfig) -> Weights:
    """Weights of the size that initialisation has, biases and statistics not at rest."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = path[-1].key
        if name in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, x.shape)
        elif name == "logit_scale":
            values = np.log(1 / 0.07)
        elif name == "logit_bias":
            values = -10.0
        else:
            fan_in = np.prod(x.shape[-3:-1]) if len(x.shape) > 2 else 100
            values = rng.normal(0, max(fan_in, 25) ** -0.5, x.shape)
        return np.asarray(values, np.float32)

    shapes = jax.eval_shape(CLIP(config).init, jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    preprocess, tokenizer = default_inputs(config)
    return Weights(config=config, params=params, preprocess=preprocess, tokenizer=tokenizer)


def small(name: str) -> CLIPConfig:
    """A published architecture, narrow and with two layers."""
    config = zoo.get(name)
    if isinstance(config.vision, ResNetConfig):
        vision = replace(config.vision, image_size=64, layers=(1, 2, 1, 1), width=16, num_heads=8)
    else:
        vision = replace(
            config.vision, image_size=64, patch_size=16, width=128, depth=2, num_heads=2
        )
    text = replace(config.text, width=64, depth=2, num_heads=1, context_length=20, vocab_size=900)
    return replace(config, embed_dim=48, vision=vision, text=text)


@pytest.mark.parametrize("to", ["openai", "open-clip", "hugging-face"])
@pytest.mark.parametrize("name", ["ViT-B/32", "RN50", "ViT-B-32", "ViT-L-14-CLIPA"])
def test_ours(openai_clip, open_clip, tmp_path, name, to):
    weights = random_weights(small(name))
    try:
        write_weights(weights, tmp_path / "out", to)
    except ValueError as error:
        assert "express" in str(error) or "has no ResNet" in str(error)  # noqa: PT017
        assert (name, to) not in {("ViT-B/32", t) for t in ("openai", "open-clip", "hugging-face")}
        assert to != "open-clip"
        return
    assert verify(weights, tmp_path / "out", to).passed
    again = read_weights(tmp_path / "out")
    assert again.config == replace(
        weights.config,
        init_logit_scale=again.config.init_logit_scale,
        text=replace(weights.config.text, eos_token_id=again.config.text.eos_token_id),
    )
    jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)


@pytest.mark.parametrize("to", ["open-clip", "hugging-face"])
def test_rounded_files_say_what_rounding_cost(open_clip, tmp_path, to):
    weights = random_weights(small("ViT-B/32"))
    write_weights(weights, tmp_path / "out", to, dtype="float16")
    found = verify(weights, tmp_path / "out", to, dtype="float16")
    assert found.passed
    assert 1e-5 < found.rounding_loss < 1e-2


# ------------------------------------------------------------------ the comparison can fail


def permuted(weights):
    """Two layers change places (in a ResNet: two channels of one convolution)."""
    params = jax.tree.map(np.array, weights.params)
    if isinstance(weights.config.vision, ResNetConfig):
        kernel = params["visual"]["layer1"]["0"]["conv2"]["kernel"]
        kernel[..., [0, 1]] = kernel[..., [1, 0]]
    else:
        kernel = params["visual"]["transformer"]["resblocks"]["mlp"]["c_fc"]["kernel"]
        kernel[[0, 1]] = kernel[[1, 0]]
    return replace(weights, params=params)


def other_activation(weights):
    swap = {"quick_gelu": "gelu", "gelu": "quick_gelu"}
    config = weights.config
    text = replace(config.text, activation=swap[config.text.activation])
    return replace(weights, config=replace(config, text=text))


@pytest.mark.parametrize("peer", ["openai", "openai resnet", "open_clip", "transformers"])
@pytest.mark.parametrize("change", ["none", "activation", "padding", "layers"])
def test_the_comparison_notices(openai_clip, open_clip, tmp_path, peer, change):
    """Each comparison above passes as it is, and fails for each of three silent mistakes."""
    if peer.startswith("openai"):
        from clip.model import CLIP as Peer

        torch.manual_seed(0)
        model = lively(Peer(*OPENAI["resnet" if "resnet" in peer else "vit"]))
        sizes = zip(openai.SIZES, (64, 20, 49408), strict=True)
        torch.save(model.state_dict() | {n: torch.tensor(x) for n, x in sizes}, tmp_path / "x.pt")
        weights = read_weights(tmp_path / "x.pt")
        theirs = openai_clip.tokenize(TEXTS, 20, truncate=True).numpy()
    elif peer == "open_clip":
        model = open_clip_model(open_clip, tmp_path, *OPEN_CLIP["gelu"])
        torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
        weights = read_weights(tmp_path)
        theirs = open_clip.SimpleTokenizer(context_length=20)(TEXTS).numpy()
    else:
        model = hugging_face_model({}, {"eos_token_id": 49407})
        model.save_pretrained(tmp_path)
        weights = read_weights(tmp_path)
        theirs = weights.tokenizer.build()(TEXTS, 20, True)
        after = np.cumsum(theirs == 49407, axis=1) > 0
        theirs = np.where(after, 49407, theirs)
    ours = weights.tokenizer.build()(TEXTS, 20, True)
    images, _ = random_inputs(weights.config)
    if change == "activation":
        weights = other_activation(weights)
    elif change == "layers":
        weights = permuted(weights)
    elif change == "padding":
        ours = np.where(ours == 0, 5, ours)
        if peer == "transformers":
            with pytest.raises(AssertionError):
                difference(weights, model, images, ours, theirs)
            return
    found = difference(weights, model, images, ours, theirs)
    assert found <= BOUND if change == "none" else found > 1e-4


# ------------------------------------------------------------------ positions


@pytest.mark.parametrize("size", [96, 48, 80])
def test_positions_resize_as_open_clips(open_clip, tmp_path, size):
    from open_clip.model import resize_pos_embed

    model = open_clip_model(open_clip, tmp_path, *OPEN_CLIP["gelu"])
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    weights = resize_positions(read_weights(tmp_path), size)
    larger = open_clip_model(open_clip, tmp_path / "x", {}, {"image_size": size}, {})
    state = dict(model.state_dict())
    resize_pos_embed(state, larger)
    ours = weights.params["visual"]["positional_embedding"]
    assert relative_difference(ours, state["visual.positional_embedding"].numpy()) < 1e-6
    larger.load_state_dict(state)
    images, ids = random_inputs(weights.config)
    assert difference(weights, larger, images, ids, ids) <= BOUND


# ------------------------------------------------------------------ published sizes

RELEASED = ["ViT-B/32", "ViT-B/16", "RN50", "RN101", "RN50x4", "ViT-L/14", "ViT-L/14@336px"]
WIDE = ["ViT-H-14", "ViT-g-14", "ViT-bigG-14", "RN50x16-gelu", "RN50x64-gelu"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_released_models(openai_clip, open_clip, tmp_path, name):
    """Whole, against the model that each peer builds itself, then written and read by each."""
    from clip.model import build_model

    config = zoo.get(name)
    weights = random_weights(config)
    images, ids = random_inputs(config)
    tensors = openai.to_tensors(weights)
    state = {n: torch.from_numpy(np.array(x)) for n, x in tensors.items()}
    model = build_model(dict(state)).float()
    model.load_state_dict({n: x for n, x in state.items() if n not in openai.SIZES})
    assert difference(weights, model, images, ids, ids) <= BOUND
    del model, state, tensors
    write_weights(weights, tmp_path / "oc", "open-clip")
    assert verify(weights, tmp_path / "oc", "open-clip").passed
    if not isinstance(config.vision, ResNetConfig):
        write_weights(weights, tmp_path / "hf", "hugging-face")
        assert verify(weights, tmp_path / "hf", "hugging-face").passed


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_the_widest_models(open_clip, tmp_path, name):
    """Two layers at full width; shapes and counts of the whole are open_clip's."""
    config = zoo.get(name)
    with torch.device("meta"):
        settings = open_clip.get_model_config(name.removesuffix("-gelu"))
        whole = open_clip.CLIP(**settings)
    expected = {n: tuple(x.shape) for n, x in whole.state_dict().items()}
    shapes = jax.eval_shape(CLIP(config).init, jax.random.key(0))
    from clip_jax.convert import open_clip as ours
    from clip_jax.convert.state_dict import param_shapes

    found = {}
    for row in ours.table(config):
        shape = param_shapes(config)[row.ours]
        for theirs in row.names:
            stacked = "{}" in theirs
            each = row.their_shape(shape[1:] if stacked else shape)
            found |= {theirs.format(i): each for i in range(shape[0] if stacked else 1)}
    assert found == {n: s for n, s in expected.items() if not n.endswith("num_batches_tracked")}
    assert sum(np.prod(s, dtype=int) for s in found.values()) == sum(
        np.prod(x.shape, dtype=int) for x in jax.tree.leaves(shapes)
    )

    text = replace(config.text, depth=2)
    if isinstance(config.vision, ResNetConfig):
        vision = replace(config.vision, layers=(2, 2, 2, 2))
    else:
        vision = replace(config.vision, depth=2)
    weights = random_weights(replace(config, vision=vision, text=text))
    write_weights(weights, tmp_path, "open-clip")
    assert verify(weights, tmp_path, "open-clip").passed
