"""Every format there and back, bit for bit, measured on files; and what each cannot express."""

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from clip_jax.convert import hugging_face, open_clip, openai
from clip_jax.convert.files import read_tensors, write_safetensors
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.state_dict import flatten, param_shapes
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.models import zoo

DTYPES = ["float32", "float16", "bfloat16"]


def assert_same(a, b):
    """The same bits, dtypes and settings."""
    assert (a.config, a.preprocess) == (b.config, b.preprocess)
    a, b = flatten(a.params), flatten(b.params)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        assert a[path].tobytes() == b[path].tobytes(), path


def cast(weights, dtype):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return replace(weights, params=jax.tree.map(lambda x: x.astype(kind), weights.params))


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_folder(tmp_path, weights, dtype):
    weights = cast(weights, dtype)
    write_weights(weights, tmp_path, "clip-jax")
    assert_same(read_weights(tmp_path), weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_open_clip(tmp_path, weights, dtype):
    weights = cast(weights, dtype)
    write_weights(weights, tmp_path, "open-clip")
    assert_same(read_weights(tmp_path), weights)
    assert_same(read_weights(tmp_path / "open_clip_model.safetensors"), weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["vit", "gelu", "eos"])
def test_hugging_face(tmp_path, make_weights, name, dtype):
    weights = cast(make_weights(name), dtype)
    write_weights(weights, tmp_path, "hugging-face")
    assert_same(read_weights(tmp_path), weights)
    assert_same(read_weights(tmp_path / "model.safetensors"), weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "to"),
    [
        *((name, "open-clip") for name in ("vit", "gelu", "eos", "resnet")),
        *((name, "hugging-face") for name in ("vit", "gelu", "eos")),
    ],
)
def test_files_come_back_byte_for_byte(tmp_path, make_weights, name, to, dtype):
    """Our folder → another format → our folder: every file of it (tests/reference has OpenAI's)."""
    weights = replace(make_weights(name), batches_tracked=7 if name == "resnet" else 0)
    write_weights(cast(weights, dtype), tmp_path / "before", "clip-jax")
    write_weights(read_weights(tmp_path / "before"), tmp_path / "there", to)
    write_weights(read_weights(tmp_path / "there"), tmp_path / "after", "clip-jax")
    for path in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_openai(tmp_path, make_weights, name, dtype):
    """The names alone; tests/reference has the archive, which needs torch to write."""
    weights = make_weights(name)
    tensors = openai.to_tensors(weights, dtype)
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    again = read_weights(tmp_path / "x.safetensors")
    if dtype is None:
        assert_same(again, weights)
    back = openai.to_tensors(again)
    assert back.keys() == tensors.keys()
    for path in tensors:
        np.testing.assert_array_equal(back[path], tensors[path], strict=True)
    assert {str(x.dtype) for n, x in tensors.items() if "ln_" in n or "bn" in n} <= {
        "float32", "int64",
    }  # fmt: skip
    assert tensors["text_projection"].dtype == (dtype or "float32")


def test_dtype_is_a_choice(tmp_path, make_weights):
    write_weights(make_weights("vit"), tmp_path, "clip-jax", dtype="float16")
    again = read_weights(tmp_path)
    assert {x.dtype.name for x in flatten(again.params).values()} == {"float16"}


def test_transposed_arrays_are_written_as_they_read(tmp_path):
    """safetensors writes the memory of an array, not its values, unless told."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_safetensors(tmp_path / "x.safetensors", {"x": x, "scalar": np.float32(3)}, {})
    tensors = read_tensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(tensors["x"], x)
    assert tensors["scalar"].shape == ()


def test_files_are_as_open_as_any_other(tmp_path):
    """safetensors alone would make them readable by their owner only."""
    write_safetensors(tmp_path / "x.safetensors", {"x": np.zeros(1)}, {})
    (tmp_path / "other").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    "name",
    [n for n in zoo.ARCHITECTURES if "SigLIP" not in n],
)
def test_every_architecture_has_its_table(name):
    """Rows and parameters agree, whole: nothing is left out and nothing is twice."""
    config = zoo.get(name)
    table = open_clip.table(config)
    shapes = param_shapes(config)
    assert sorted(row.ours for row in table) == sorted(shapes)
    names = [
        name
        for row in table
        for block in range(shapes[row.ours][0] if "{}" in row.names[0] else 1)
        for name in row.names_of(block)
    ]
    assert len(set(names)) == len(names)


# ------------------------------------------------------------------ what a format cannot say


@pytest.mark.parametrize(
    ("name", "change", "to", "match"),
    [
        ("resnet", {}, "hugging-face", "CLIPModel has no ResNet"),
        ("options", {}, "hugging-face", r"init_logit_bias \(SigLIP\), vision.pool, vision.pre_no"),
        ("options", {}, "openai", "init_logit_bias, text.activation"),
        ("gelu", {}, "openai", "text.activation, vision.activation"),
        ("eos", {}, "openai", "text.pool"),
        ("vit", {"preprocess": Preprocess(image_size=32, interpolation="bilinear")}, "openai",
         "preprocess"),
        ("vit", {"preprocess": Preprocess(image_size=32, resize_mode="longest")}, "hugging-face",
         "resize_mode"),
    ],
)  # fmt: skip
def test_a_format_says_what_it_cannot_express(tmp_path, make_weights, name, change, to, match):
    weights = replace(make_weights(name), **change)
    with pytest.raises(ValueError, match=match):
        write_weights(weights, tmp_path / "x", to)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("to", "tower", "change", "match"),
    [
        ("openai", "vision", {"num_heads": 4}, r"vision.num_heads \(one per 64"),
        ("openai", "text", {"num_heads": 2}, r"text.num_heads \(one per 64"),
        ("openai", "vision", {"mlp_ratio": 3.0}, "vision.mlp_ratio"),
        ("open-clip", "vision", {"activation": "gelu"}, "one tower with QuickGELU"),
        ("open-clip", "vision", {"patch_bias": True}, "vision.patch_bias"),
        ("open-clip", "text", {"causal": False}, "padding with id 0 in a vocabulary of 600"),
        ("open-clip", "text", {"pool": "last"}, "padding with id 0 in a vocabulary of 600"),
        ("hugging-face", "text", {"causal": False}, "text.causal"),
    ],
)
def test_options_that_a_loader_assumes(tmp_path, make_weights, to, tower, change, match):
    weights = make_weights("vit")
    part = replace(getattr(weights.config, tower), **change)
    weights = replace(weights, config=replace(weights.config, **{tower: part}))
    with pytest.raises(ValueError, match=match):
        write_weights(weights, tmp_path / "x", to)


# ------------------------------------------------------------------ what a file does not say


def test_quick_gelu_is_asked_for(tmp_path, make_weights, monkeypatch):
    weights = make_weights("gelu")
    # A published model of these sizes, so that only the activation is unknown.
    monkeypatch.setitem(zoo.ARCHITECTURES, "small", weights.config)
    write_safetensors(tmp_path / "x.safetensors", open_clip.to_tensors(weights), {})
    with pytest.raises(ValueError, match=r"does not say whether .* QuickGELU"):
        read_weights(tmp_path / "x.safetensors")
    assert_same(read_weights(tmp_path / "x.safetensors", activation="gelu"), weights)
    assert_same(read_weights(tmp_path / "x.safetensors", architecture="small"), weights)
    quick = read_weights(tmp_path / "x.safetensors", activation="quick_gelu")
    assert quick.config.vision.activation == quick.config.text.activation == "quick_gelu"
    with pytest.raises(ValueError, match="is no ViT-B/32: its towers have widths"):
        read_weights(tmp_path / "x.safetensors", architecture="ViT-B/32")


def test_heads_are_asked_for(tmp_path, make_weights):
    write_safetensors(tmp_path / "x.safetensors", open_clip.to_tensors(make_weights("gelu")), {})
    with pytest.raises(ValueError, match="number of attention heads is unknown"):
        read_weights(tmp_path / "x.safetensors", activation="gelu")


def test_heads_come_from_the_published_model():
    """ViT-H/14 has 16 heads of 80 channels: OpenAI's rule of 64 would give 20."""
    config = zoo.get("ViT-H-14")
    tensors = {}
    for row in open_clip.table(config):
        shape = param_shapes(config)[row.ours]
        for name in row.names:
            stacked = "{}" in name
            array = np.broadcast_to(np.float16(0), row.their_shape(shape[1:] if stacked else shape))
            tensors |= {name.format(i): array for i in range(shape[0] if stacked else 1)}
    found = openai.infer(tensors, "x", activation="gelu")
    assert found.vision.num_heads == 16
    assert found == config


def test_a_contradiction_is_an_error(tmp_path, make_weights):
    write_weights(make_weights("vit"), tmp_path, "open-clip")
    with pytest.raises(ValueError, match="says that its activation is quick_gelu, not gelu"):
        read_weights(tmp_path, activation="gelu")


def test_mismatches_are_listed(tmp_path, make_weights):
    """Missing, surplus and misshapen tensors, the first ten, with both shapes."""
    write_weights(make_weights("vit"), tmp_path, "open-clip")
    path = tmp_path / "open_clip_model.safetensors"
    tensors = read_tensors(path)
    tensors["extra"] = np.zeros(3, np.float32)
    del tensors["logit_scale"]
    tensors["ln_final.bias"] = np.zeros(7, np.float32)
    write_safetensors(path, tensors, {})
    with pytest.raises(ValueError, match="3 tensors differ") as error:
        read_weights(tmp_path)
    assert "logit_scale: missing, [] needed" in str(error.value)
    assert "extra: surplus, [3]" in str(error.value)
    assert "ln_final.bias: [7] found, [64] needed" in str(error.value)
    for i in range(20):
        tensors[f"extra{i}"] = np.zeros(3, np.float32)
    write_safetensors(path, tensors, {})
    with pytest.raises(ValueError, match="and 13 more"):
        read_weights(tmp_path)


def test_a_setting_that_we_do_not_have(tmp_path, make_weights):
    write_weights(make_weights("vit"), tmp_path, "open-clip")
    path = tmp_path / "open_clip_config.json"
    content = json.loads(path.read_text())
    for section, name, value, match in [
        ("vision_cfg", "qk_norm", True, "vision_cfg.qk_norm=True is not supported"),
        ("vision_cfg", "pool_type", "avg", "final_ln_after_pool=False is not supported"),
        ("vision_cfg", "timm_model_name", "convnext_base", "timm_model_name='convnext_base'"),
        ("text_cfg", "embed_cls", True, "embed_cls=True is not supported without multimodal_cfg"),
        ("multimodal_cfg", "width", 64, "embed_cls=False is not supported with multimodal_cfg"),
        ("text_cfg", "hf_model_name", "roberta", "hf_model_name='roberta' is not supported"),
        ("text_cfg", "width", "64", "text_cfg.width is '64'; a whole number"),
    ]:
        changed = json.loads(json.dumps(content))
        changed["model_cfg"].setdefault(section, {})[name] = value
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=match):
            read_weights(tmp_path)


def test_wrapped_names(tmp_path, make_weights):
    """What DistributedDataParallel, torch.compile and open_clip's custom towers add to names."""
    weights = make_weights("vit")
    write_weights(weights, tmp_path, "open-clip")
    path = tmp_path / "open_clip_model.safetensors"
    tensors = read_tensors(path)
    text = ("transformer.", "token_embedding.", "positional", "ln_final.", "text_projection")
    for rename in (
        lambda n: f"module.{n}",
        lambda n: f"module._orig_mod.{n}",
        lambda n: f"text.{n}" if n.startswith(text) else n,
    ):
        write_safetensors(path, {rename(n): x for n, x in tensors.items()}, {})
        assert_same(read_weights(tmp_path), weights)


def test_hugging_face_reads_both_ends_of_text(tmp_path, make_weights):
    weights = make_weights("vit")
    hugging_face.write(weights, tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for eos, pool in ((2, "argmax"), (599, "argmax"), (550, "eos")):
        content["text_config"]["eos_token_id"] = eos
        path.write_text(json.dumps(content))
        assert read_weights(tmp_path).config.text.pool == pool


def test_settings_of_old_hugging_face_files(tmp_path, make_weights):
    """`text_config_dict` held what counted; position ids were saved as tensors."""
    weights = make_weights("vit")
    hugging_face.write(weights, tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["text_config_dict"] = content["text_config"]
    content["text_config"] = {"hidden_size": 512}
    path.write_text(json.dumps(content))
    tensors = read_tensors(tmp_path / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = np.arange(16)[None]
    write_safetensors(tmp_path / "model.safetensors", tensors, {})
    assert_same(read_weights(tmp_path), weights)


def test_a_tower_in_an_old_hugging_face_file_is_one_of_two_dicts(tmp_path, make_weights):
    """`text_config_dict` stands for the whole tower: what it leaves out has its default."""
    hugging_face.write(make_weights("gelu"), tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for tower in ("vision", "text"):
        left_out = {"hidden_act", "model_type"}
        whole = content[f"{tower}_config"] | {"layer_norm_eps": 1e-3}
        content[f"{tower}_config_dict"] = {n: x for n, x in whole.items() if n not in left_out}
    path.write_text(json.dumps(content))
    config = read_weights(tmp_path).config
    assert config.vision.activation == config.text.activation == "quick_gelu"
    assert config.vision.norm_epsilon == config.text.norm_epsilon == 1e-3


@pytest.mark.parametrize("to", ["hugging-face", "open-clip", "clip-jax"])
def test_weights_are_finite_floating_point_numbers(tmp_path, make_weights, to):
    weights = make_weights("vit")
    for value, match in [
        (np.int32(weights.params["visual"]["proj"]), r"visual/proj has the type int32"),
        (np.full_like(weights.params["visual"]["proj"], np.nan), r"has 6144 values of 6144 that"),
    ]:
        visual = weights.params["visual"] | {"proj": value}
        write_weights(replace(weights, params=weights.params | {"visual": visual}), tmp_path, to)
        with pytest.raises(ValueError, match=match) as error:
            read_weights(tmp_path)
        assert str(tmp_path) in str(error.value)


def test_the_colour_of_bars_is_kept(tmp_path, make_weights):
    preprocess = Preprocess(image_size=32, resize_mode="longest", fill=200)
    weights = replace(make_weights("vit"), preprocess=preprocess)
    for to in ("open-clip", "clip-jax"):
        write_weights(weights, tmp_path, to)
        assert_same(read_weights(tmp_path), weights)


def test_a_foreign_tokenizer_is_not_taken_for_clips(tmp_path, make_weights):
    hugging_face.write(make_weights("vit"), tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["!</w>"], vocab["#</w>"] = vocab["#</w>"], vocab["!</w>"]
    path.write_text(json.dumps(content))
    weights = read_weights(tmp_path)
    assert weights.config.text.tokenizer.file == str(path)
    swapped, clips = (make_tokenizer(x.config.text) for x in (weights, make_weights("vit")))
    assert swapped("a!", 16)[0, 2] == clips("a#", 16)[0, 2] != clips("a!", 16)[0, 2]
