"""Every format there and back, bit for bit, measured on files; and what each cannot express."""

import contextlib
import json
import re
import typing
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from clip_jax.cli.commands import main
from clip_jax.convert import hugging_face, open_clip, openai
from clip_jax.convert import verify as convert_verify
from clip_jax.convert.fitting import starting_params
from clip_jax.convert.formats import (
    HEAD_NAME,
    TARGETS,
    Format,
    able_formats,
    read_weights,
    write_weights,
)
from clip_jax.convert.tensor_files import read_tensors, write_safetensors
from clip_jax.convert.weights import Head, Weights, default_preprocess
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.lora import LoRAConfig
from clip_jax.models.text import TokenizerConfig
from clip_jax.optim import Tower
from tests import vocabularies
from tests.conftest import FAMILIES, parameters
from tests.convert.conftest import CONFIGS, assert_same, cast, make_weights, write_lora_run


def test_each_format_has_its_target():
    assert tuple(TARGETS) == typing.get_args(Format)


def assert_refused(folder, match, **options):
    with pytest.raises(ValueError, match=match):
        read_weights(folder, **options)


@pytest.mark.parametrize(
    ("name", "to", "dtype"),
    [
        ("vit", "open-clip", "float32"),
        ("vit", "hugging-face", "bfloat16"),
        ("gelu", "open-clip", "bfloat16"),
        ("gelu", "hugging-face", "float16"),
        ("options", "open-clip", "float16"),
        ("eos", "open-clip", "float16"),
        ("eos", "hugging-face", "float32"),
        ("resnet", "open-clip", "float32"),
        ("resnet", "open-clip", "bfloat16"),
    ],
)
def test_there_and_back(tmp_path, name, to, dtype):
    """Our folder → another format, or its file alone → our folder, byte for byte.

    tests/reference has OpenAI's archive.
    """
    weights = cast(make_weights(name), dtype)
    if to == "open-clip":  # which has a colour of bars
        pixels = replace(weights.preprocess, resize_mode="longest", fill=200)
    else:
        pixels = replace(weights.preprocess, rules="transformers")
    weights = replace(weights, preprocess=pixels)
    write_weights(weights, tmp_path / "before", "clip-jax")
    before = read_weights(tmp_path / "before")
    assert_same(before, weights)
    write_weights(before, tmp_path / "there", to)
    there = read_weights(tmp_path / "there")
    assert_same(there, weights)
    for path in (tmp_path / "there").glob("*config*.json"):  # as their libraries write it
        text = path.read_text()
        assert text.rstrip("\n") == json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    file = {"open-clip": "open_clip_model.safetensors", "hugging-face": "model.safetensors"}[to]
    assert_same(read_weights(tmp_path / "there" / file), weights)
    write_weights(there, tmp_path / "after", "clip-jax")
    for path in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(("name", "dtype"), [("vit", "float16"), ("resnet", None)])
def test_openais_names(tmp_path, name, dtype):
    tensors = openai.to_tensors(make_weights(name), dtype)
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    again = read_weights(tmp_path / "x.safetensors")
    if dtype is None:
        assert_same(again, make_weights(name))
    back = openai.to_tensors(again)
    assert back.keys() == tensors.keys()
    for path in tensors:
        np.testing.assert_array_equal(back[path], tensors[path], strict=True)
    norms = {str(x.dtype) for n, x in tensors.items() if "ln_" in n or "bn" in n}
    assert norms <= {"float32", "int64"}
    assert tensors["text_projection"].dtype == (dtype or "float32")


def test_safetensors_hold_values_and_are_as_open_as_any_other_file(tmp_path):
    """The library alone writes an array's memory, for its owner only."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": x, "scalar": np.float32(3)}, {})
    tensors = read_tensors(path)
    np.testing.assert_array_equal(tensors["x"], x)
    assert tensors["scalar"].shape == ()
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


# ------------------------------------------------------------------ what a format cannot say


@pytest.mark.parametrize(
    ("to", "name", "changes", "match"),
    [
        (
            "hugging-face",
            "resnet",
            {},
            r"CLIPModel cannot .*vision=ResNetConfig \(needs ViTConfig\)",
        ),
        (
            "hugging-face",
            "options",
            {},
            r"has_logit_bias=True .*vision.pool='mean' .*vision.pre_norm=False \(needs True\)",
        ),
        ("openai", "options", {}, r"has_logit_bias=True \(needs False\), text.activation"),
        (
            "openai",
            "gelu",
            {},
            r"text.activation='gelu' .*, vision.activation='gelu'",
        ),
        ("openai", "eos", {}, "text.pool"),
        ("openai", "vit", {"vision": {"num_heads": 4}}, r"vision.head_width=32 \(needs 64\)"),
        ("openai", "vit", {"text": {"num_heads": 2}}, r"text.head_width=32 \(needs 64\)"),
        ("openai", "vit", {"vision": {"mlp_ratio": 3.0}}, "vision.mlp_ratio"),
        ("openai", "vit", {"pixels": {"interpolation": "bilinear"}}, "preprocess"),
        (
            "open-clip",
            "vit",
            {"vision": {"activation": "gelu"}},
            "vision.activation='gelu' .*both towers have QuickGELU or neither",
        ),
        ("open-clip", "vit", {"vision": {"patch_bias": True}}, "vision.patch_bias"),
        (
            "open-clip",
            "vit",
            {"text": {"tokenizer": TokenizerConfig(clean="whitespace")}},
            "only with text.tokenizer.clean='clip' or 'canonicalize', not 'whitespace'",
        ),
        ("openai", "vit", {"vision": {"max_patches": 9}}, r"vision.max_patches=9 \(needs None"),
        ("open-clip", "vit", {"vision": {"max_patches": 9}}, "max_patches=9.*are SigLIP's"),
        ("open-clip", "naflex", {}, "none is a ViT of width 32.* NaFlex with 4 x 4 positions"),
        ("hugging-face", "vit", {"vision": {"max_patches": 9}}, r"vision.max_patches=9 \(needs"),
        ("hugging-face", "vit", {"text": {"causal": False}}, "text.causal"),
        ("hugging-face", "vit", {"pixels": {"resize_mode": "longest"}}, "resize_mode"),
        ("hugging-face", "coca", {}, "decoder"),
        ("openai", "coca", {}, "decoder"),
        ("open-clip", "coca", {}, "correct_class_mask"),
        ("big-vision", "coca", {}, "decoder"),
        (
            "big-vision",
            "vit",
            {},
            "big_vision's SigLIP cannot express this model's has_logit_bias=Fa",
        ),
        ("big-vision", "resnet", {}, "big_vision's SigLIP cannot .*vision=ResNetConfig"),
        (
            "big-vision",
            "siglip",
            {"text": {"activation": "gelu"}},
            r"text.activation='gelu' \(needs 'gelu_tanh'\)",
        ),
    ],
)
def test_a_format_says_what_it_cannot_express(tmp_path, to, name, changes, match):
    weights = make_weights(name)
    config = weights.config
    weights = replace(
        weights,
        config=replace(
            config,
            vision=replace(config.vision, **changes.get("vision", {})),
            text=replace(config.text, **changes.get("text", {})),
        ),
        preprocess=replace(weights.preprocess, **changes.get("pixels", {})),
    )
    with pytest.raises(ValueError, match=match):
        write_weights(weights, tmp_path / "x", to)
    assert not (tmp_path / "x").exists()


ADVISED = CONFIGS | FAMILIES
# Without lower case, which transformers has not with CLIP's vocabulary.
_CASED = replace(CONFIGS["vit"].text, tokenizer=TokenizerConfig(clean="whitespace"))
ADVISED["cased"] = replace(CONFIGS["vit"], text=_CASED)


@pytest.mark.parametrize("name", ADVISED)
def test_an_error_advises_exactly_the_formats_that_can_express_the_model(tmp_path, name):
    config = ADVISED[name]
    pixels = default_preprocess(config)
    if name == "siglip":
        pixels = replace(pixels, resize_mode="squash")
    weights = Weights(config=config, params=parameters(config), preprocess=pixels)
    able = able_formats(weights)
    assert "clip-jax" in able
    for to in TARGETS:
        if to not in able:
            with pytest.raises(InputError, match=r"choose --to [^;]*\.$") as error:
                write_weights(weights, tmp_path / to, to)
            choice = str(error.value).rpartition("choose --to ")[2].rstrip(".")
            assert re.split(", | or ", choice) == able
        elif to != "openai":  # which needs PyTorch; tests/reference writes it
            write_weights(weights, tmp_path / to, to)


@pytest.mark.parametrize(("name", "able"), [("vit", ["hugging-face"]), ("siglip", [])])
def test_the_formats_that_can_express_one_tower_alone(tmp_path, name, able):
    weights = make_weights(name)
    alone = {"visual": weights.params["visual"]}
    weights = replace(weights, params=alone, only_tower="image")
    assert able_formats(weights) == able
    if able:
        write_weights(weights, tmp_path / "x", "hugging-face")
    else:
        with pytest.raises(InputError, match=r"only_tower='image' \(needs None.*--init-towers\.$"):
            write_weights(weights, tmp_path / "x", "hugging-face")


# ------------------------------------------------------------------ what a file does not say


def test_quick_gelu_and_heads_are_asked_for(tmp_path):
    weights, path = make_weights("gelu"), tmp_path / "x.safetensors"
    write_safetensors(path, open_clip.to_tensors(weights), {})
    assert_refused(path, "number of attention heads is unknown", activation="gelu")
    # A published model of these sizes, with heads of 32 channels: the activation alone is unknown.
    with mock.patch.dict(zoo.ARCHITECTURES, small=weights.config):
        assert_refused(path, r"does not say whether .* QuickGELU")
        assert_same(read_weights(path, activation="gelu"), weights)
        quick = read_weights(path, activation="quick_gelu").config
    assert quick.vision.activation == quick.text.activation == "quick_gelu"


def test_mismatches_are_listed(tmp_path):
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
    tensors |= {f"extra{i}": np.zeros(3, np.float32) for i in range(20)}
    write_safetensors(path, tensors, {})
    assert_refused(tmp_path, "and 13 more")


def test_a_setting_that_we_do_not_have(tmp_path):
    write_weights(make_weights("vit"), tmp_path, "open-clip")
    path = tmp_path / "open_clip_config.json"
    content = path.read_text()
    for section, name, value, match in [
        ("vision_cfg", "qk_norm", True, "vision_cfg.qk_norm=True is not supported"),
        ("vision_cfg", "pool_type", "avg", "final_ln_after_pool=False is not supported"),
        ("vision_cfg", "attentional_pool", True, "attentional_pool=True is not supported with"),
        ("vision_cfg", "timm_model_name", "swin_base", "timm_model_name='swin_base'"),
        ("text_cfg", "embed_cls", True, "embed_cls=True is not supported without multimodal_cfg"),
        ("multimodal_cfg", "width", 64, "embed_cls=False is not supported with multimodal_cfg"),
        ("text_cfg", "hf_model_name", "roberta", r"hf_model_name='roberta', .* is not supported"),
        ("text_cfg", "width", "64", "text_cfg.width is '64'; it must be an integer"),
    ]:
        changed = json.loads(content)
        changed["model_cfg"].setdefault(section, {})[name] = value
        path.write_text(json.dumps(changed))
        assert_refused(tmp_path, match)


def test_a_class_token_masks_the_padding_of_its_tokenizer(tmp_path):
    """open_clip masks pad_id, whatever its tokenizer pads with."""
    weights, path = make_weights("coca"), tmp_path / "open_clip_config.json"
    rules = TokenizerConfig(file=str(vocabularies.unigram(tmp_path / "x")), end_id=2, pad_id=1)
    text = replace(weights.config.text, correct_class_mask=False, tokenizer=rules)
    write_weights(
        replace(weights, config=replace(weights.config, text=text)), tmp_path, "open-clip"
    )
    assert read_weights(tmp_path).config.text.tokenizer.pad_id == 1
    path.write_text(path.read_text().replace('"pad_id": 1', '"pad_id": 3'))
    assert_refused(tmp_path, r"text_cfg.pad_id=3 is not supported: .* padding id, 1\.")


@pytest.mark.parametrize(("pool", "clean"), [("class_token", "clip"), ("last", "canonicalize")])
def test_a_short_vocabulary_is_padded_with_0(tmp_path, pool, clean):
    """Which matters to a class token and to the last state. In transformers it would be "!"."""
    weights = make_weights("coca" if pool == "class_token" else "vit")
    text = replace(weights.config.text, pool=pool, tokenizer=TokenizerConfig(clean=clean))
    text = replace(text, correct_class_mask=pool != "class_token")
    write_weights(
        replace(weights, config=replace(weights.config, text=text)), tmp_path, "open-clip"
    )
    assert read_weights(tmp_path).config.text == text
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == settings["sep_token"] == "<|padding|>"
    content = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert content["model_cfg"]["text_cfg"]["tokenizer_kwargs"]["strip_sep_token"] is True


def test_wrapped_names(tmp_path):
    """What DistributedDataParallel, torch.compile and open_clip's custom towers add to names."""
    write_weights(make_weights("vit"), tmp_path, "open-clip")
    path = tmp_path / "open_clip_model.safetensors"
    tensors = read_tensors(path)
    text = ("transformer.", "token_embedding.", "positional", "ln_final.", "text_projection")
    for rename in (
        lambda n: f"module.{n}",
        lambda n: f"module._orig_mod.{n}",
        lambda n: f"text.{n}" if n.startswith(text) else n,
    ):
        write_safetensors(path, {rename(n): x for n, x in tensors.items()}, {})
        assert_same(read_weights(tmp_path), make_weights("vit"))


def test_hugging_face_reads_both_ends_of_text(tmp_path):
    hugging_face.write(make_weights("vit"), tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for eos, pool in ((2, "argmax"), (599, "argmax"), (550, "eos")):
        content["text_config"]["eos_token_id"] = eos
        path.write_text(json.dumps(content))
        assert read_weights(tmp_path).config.text.pool == pool


def test_settings_of_old_hugging_face_files(tmp_path):
    """`…_config_dict` stands for a whole tower; position ids were saved as tensors."""
    weights = make_weights("vit")
    hugging_face.write(weights, tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for tower in ("vision", "text"):
        section = content[f"{tower}_config"] | {"layer_norm_eps": 1e-3}
        del section["hidden_act"], section["model_type"]  # it has its default, not the other's
        content[f"{tower}_config_dict"] = section
        content[f"{tower}_config"] = {"hidden_size": 512, "hidden_act": "gelu"}
    path.write_text(json.dumps(content))
    tensors = read_tensors(tmp_path / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = np.arange(16)[None]
    write_safetensors(tmp_path / "model.safetensors", tensors, {})
    vision, text = (
        replace(tower, norm_epsilon=1e-3) for tower in (weights.config.vision, weights.config.text)
    )
    config = replace(weights.config, vision=vision, text=text)
    pixels = replace(weights.preprocess, rules="transformers")
    assert_same(read_weights(tmp_path), replace(weights, config=config, preprocess=pixels))


def of_config(config):
    return Weights(config=config, params=parameters(config), preprocess=default_preprocess(config))


def test_tipsv2_without_registers(tmp_path):
    """transformers' file has an empty tensor then, and its configuration a 0."""
    config = changed(FAMILIES["tips"], "vision.registers", 0)
    weights = of_config(config)
    write_weights(weights, tmp_path, "hugging-face")
    tensors = read_tensors(tmp_path / "model.safetensors")
    assert tensors["vision_encoder.register_tokens"].shape == (1, 0, 32)
    again = read_weights(tmp_path)
    assert again.config.vision == config.vision
    assert again.params["visual"].keys() == weights.params["visual"].keys()


def test_weights_are_finite_floating_point_numbers(tmp_path):
    weights = make_weights("vit")
    visual = weights.params["visual"]
    for value, match in [
        (np.int32(visual["proj"]), r"visual/proj has the type int32"),
        (np.full_like(visual["proj"], np.nan), r"has 6144 values of 6144 that"),
    ]:
        params = weights.params | {"visual": visual | {"proj": value}}
        write_weights(replace(weights, params=params), tmp_path, "clip-jax")
        with pytest.raises(ValueError, match=match) as error:
            read_weights(tmp_path)
        assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("config", "tensor", "dtype"),
    [
        (CONFIGS["vit"], "text_model.encoder.layers.0.mlp.fc1.weight", "int8"),
        (FAMILIES["tips"], "temperature", "complex64"),
    ],
)
def test_arithmetic_of_reading_hides_no_type(tmp_path, config, tensor, dtype):
    """A stack of int8 and float32 is float32, and the logarithm of a temperature is, too."""
    weights = Weights(
        config=config, params=parameters(config), preprocess=default_preprocess(config)
    )
    write_weights(weights, tmp_path, "hugging-face")
    path = tmp_path / "model.safetensors"
    tensors = read_tensors(path)
    write_safetensors(path, tensors | {tensor: tensors[tensor].astype(dtype)}, {})
    assert_refused(tmp_path, f"{tensor} has the type {dtype}; weights must be floating-point")


def test_a_classifier_of_integers_is_refused(tmp_path):
    head = Head(("ant", "bee"), ("a {}",), np.ones((2, 48), np.float32))
    write_weights(replace(make_weights("vit"), head=head), tmp_path, "clip-jax")
    texts = {"classes": '["ant", "bee"]', "templates": '["a {}"]'}
    write_safetensors(tmp_path / HEAD_NAME, {"kernel": np.ones((2, 48), np.int8)}, texts)
    assert_refused(tmp_path, "kernel has the type int8")


def test_a_foreign_tokenizer_is_not_taken_for_clips(tmp_path):
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


@pytest.mark.parametrize("name", ["vit", "siglip", "naflex", "tips", "chinese_clip"])
def test_only_clips_class_has_clips_vocabulary_without_files(tmp_path, name):
    """Any other would take the ids of another vocabulary for its own."""
    weights = of_config(FAMILIES[name]) if name in FAMILIES else make_weights(name)
    hugging_face.write(weights, tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    assert read_weights(tmp_path).config.text.tokenizer.file == ("clip" if name == "vit" else "")


# ------------------------------------------------------------------ LAION's MaMMUT


@pytest.mark.parametrize(("name", "to"), [("mammut", "open-clip"), ("siglip", "big-vision")])
def test_what_no_library_can_load_is_written_and_an_error(tmp_path, capsys, name, to):
    write_weights(make_weights(name), tmp_path / "model", "clip-jax")
    flags = ["--to", to, "--verify"]
    with mock.patch.object(convert_verify, "library", return_value=contextlib.nullcontext()):
        assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out.npz"), *flags]) == 2
    assert (tmp_path / "out.npz").exists()
    message = "is written, but --verify compared it with no library, because .*result: .*open_clip"
    assert re.search(message, capsys.readouterr().err)


def test_laions_configuration_is_read(tmp_path):
    """mammut_ViT-S-32 as LAION's repository has it."""
    settings = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 16,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
            "output_tokens": True,
            "pool_type": "avg_all",
            "final_ln_after_pool": True,
        },
        "text_cfg": {
            "context_length": 10,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 4,
            "output_tokens": True,
            "cross_attn_ratio": 2,
            "does_full_decoding": True,
            "has_mlp": False,
        },
        "custom_text": True,
    }
    weights = make_weights("mammut")
    write_safetensors(tmp_path / open_clip.WEIGHTS_NAME, open_clip.to_tensors(weights), {})
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    config = read_weights(tmp_path).config
    assert config == replace(weights.config, dtype=config.dtype)
    settings["text_cfg"] |= {"layers": 1000, "cross_attn_ratio": 1000}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    assert_refused(tmp_path, "decoder.cross_every=1000 must be at least 1 and at most 200")


# ------------------------------------------------------------------ to begin training with


def test_the_base_of_adapters_is_the_one_that_they_began_with(tmp_path):
    """A run's step and its newest are read; another base, or none, is one message."""
    weights, base = make_weights("vit"), tmp_path / "base"
    write_weights(weights, base, "clip-jax")
    adapters = LoRAConfig(rank=2, alpha=1.0, targets=("visual/proj",))
    run = write_lora_run(tmp_path / "run", base, adapters)
    for name in ("run", "run@1"):
        params = read_weights(tmp_path / name).params
        assert set(params) == set(weights.params)
        assert not np.array_equal(params["visual"]["proj"], weights.params["visual"]["proj"])
        np.testing.assert_array_equal(
            params["text"]["ln_final"]["scale"], weights.params["text"]["ln_final"]["scale"]
        )
    changed = {**weights.params, "logit_scale": np.asarray(1, np.float32)}
    write_weights(replace(weights, params=changed), base, "clip-jax")
    message = rf"run has low-rank adapters of the weights in {base}, which have changed. Restore"
    with pytest.raises(InputError, match=message):
        read_weights(run)
    base.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"cannot be read \(there is no .*set init_from in .*json"):
        read_weights(run)
    write_weights(weights, tmp_path / "moved", "clip-jax")
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(content | {"init_from": str(tmp_path / "moved")}))
    assert read_weights(run).adapters is not None
    (run / "config.json").write_text(json.dumps(content | {"init_from": str(run)}))
    with pytest.raises(InputError, match=r"run has low-rank adapters that are their own base"):
        read_weights(run)


def changed(config: CLIPConfig, field: str, value: object) -> CLIPConfig:
    """The configuration with another value of a field such as vision.activation."""
    part, _, name = field.rpartition(".")
    if not part:
        return replace(config, **{name: value})
    return replace(config, **{part: replace(getattr(config, part), **{name: value})})


# Settings that change no shape of `make_weights("options")`, and whether its function.
@pytest.mark.parametrize(
    ("field", "value", "is_other"),
    [
        ("vision.activation", "gelu", True),
        ("vision.norm_epsilon", 1e-5, True),
        ("vision.pool", "class_token", True),
        ("image_mean", (0.5, 0.5, 0.5), True),
        ("image_std", (0.5, 0.5, 0.5), True),
        ("text.activation", "quick_gelu", True),
        ("text.causal", True, True),
        ("text.pool", "argmax", True),
        ("vision.image_size", 48, False),
        ("vision.max_patches", 20, False),
        ("vision.patch_dropout", 0.5, False),
        ("vision.layer_scale", 0.2, False),  # the initial one
        ("vision.mlp_ratio", 4.364, False),  # the same width
        ("dtype", "float32", False),
        ("remat", "full", False),
        ("init_logit_scale", 5.0, False),
    ],
)
def test_a_model_that_computes_something_else_does_not_begin(tmp_path, field, value, is_other):
    """Shapes are the same, so nothing else would show the difference."""
    weights = make_weights("options")
    write_weights(weights, tmp_path, "clip-jax")
    config = changed(weights.config, field, value)
    other: Tower = "image" if field.startswith("text") else "text"
    assert starting_params(read_weights(tmp_path), config, [other])
    assert starting_params(read_weights(tmp_path), config, allowed=[field])
    if not is_other:
        assert starting_params(read_weights(tmp_path), config)
        return
    owner, _, name = field.rpartition(".")
    part = getattr(weights.config, owner) if owner else weights.config
    message = f"{field} is {getattr(part, name)!r} in the weights and {value!r} in the model; set"
    with pytest.raises(InputError, match=re.escape(message)):
        starting_params(read_weights(tmp_path), config)


def test_a_model_whose_images_are_prepared_in_another_way_does_not_begin(tmp_path, siglip):
    """SigLIP's are squashed, and its evaluation would be that of centre crops."""
    write_weights(siglip, tmp_path, "clip-jax")
    assert starting_params(read_weights(tmp_path), siglip.config, preprocess=siglip.preprocess)
    crops = default_preprocess(siglip.config)
    with pytest.raises(InputError, match=r"resize_mode is 'squash' in the weights and"):
        starting_params(read_weights(tmp_path), siglip.config, preprocess=crops)
    assert starting_params(
        read_weights(tmp_path), siglip.config, preprocess=crops, allowed=["preprocess.*"]
    )
    flexible = make_weights("naflex")  # whose images are resized by the model's own rule
    assert starting_params(read_weights(tmp_path), flexible.config, preprocess=flexible.preprocess)


def test_a_tower_that_pools_the_last_position_keeps_its_length(tmp_path, siglip, capsys):
    """The logit bias is left out with a message if the model has none."""
    write_weights(siglip, tmp_path, "clip-jax")
    config = replace(siglip.config, init_logit_bias=None)
    assert "logit_bias" not in starting_params(read_weights(tmp_path), config)
    assert "its logit bias is left out, since the model has none" in capsys.readouterr().err
    assert "logit_bias" in starting_params(read_weights(tmp_path), siglip.config)
    assert capsys.readouterr().err == ""
    shorter = replace(config, text=replace(config.text, context_length=5))
    with pytest.raises(InputError, match=r"context_length=5 does not .* padded to 6 tokens"):
        starting_params(read_weights(tmp_path), shorter)
    assert set(starting_params(read_weights(tmp_path), shorter, ["image"])) == {"visual"}
