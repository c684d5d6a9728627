"""PEFT's adapters: written from a run and read back, and what is refused. Without PyTorch."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from clip_jax.convert import hub
from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.state_dict import flatten
from clip_jax.convert.tensor_files import read_tensors, write_safetensors
from clip_jax.errors import InputError
from clip_jax.models.lora import LoRAConfig
from tests.convert.conftest import make_weights, refuse, write_lora_run

# Query and value alone: the key has no adapter, although it shares their kernel.
PARTS = LoRAConfig(
    rank=2, alpha=3.0, targets=("*/attn/q", "*/attn/v", "*/attn/out_proj", "*/mlp/*")
)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The folders of a base, of a run that adapts it and of its adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    write_weights(make_weights("siglip"), folder / "base", "hugging-face")
    write_lora_run(folder / "run", folder / "base", PARTS)
    write_weights(read_weights(folder / "run"), folder / "peft", "peft")
    return folder


@pytest.mark.parametrize("name", ["siglip", "vit"])
def test_there_and_back(tmp_path, name):
    """PEFT's scale and its products, which `read` computes, are those of our own merge."""
    base, to = tmp_path / "base", "hugging-face" if name == "siglip" else "clip-jax"
    write_weights(make_weights(name), base, to)
    own = replace(PARTS, rank_stabilized=name == "vit", targets=(*PARTS.targets, "text/*proj*"))
    weights = read_weights(write_lora_run(tmp_path / "run", base, own))
    write_weights(weights, tmp_path / "peft", "peft")
    start, found = (flatten(read_weights(tmp_path / x).params) for x in ("base", "peft"))
    for path, x in flatten(weights.params).items():
        np.testing.assert_allclose(found[path], x, rtol=1e-6, atol=1e-6, err_msg=path)
        adapted = path.endswith(("_proj/kernel", "c_fc/kernel", "c_proj/kernel", "text_projection"))
        assert np.array_equal(start[path], x) != adapted, path
    keys = [
        flat["visual/transformer/resblocks/attn/in_proj/kernel"][:, :, 1] for flat in (start, found)
    ]
    np.testing.assert_array_equal(*keys)
    tensors = read_tensors(tmp_path / "peft/adapter_model.safetensors")
    assert not [x for x in tensors if "k_proj" in x]
    assert {x.shape[0] for n, x in tensors.items() if "lora_A" in n} == {2}


def test_rounded_adapters(adapters, tmp_path):
    settings = {"source": adapters / "run", "to": "peft", "dtype": "bfloat16"}
    convert(ConvertConfig(destination=tmp_path / "out", **settings))
    tensors = read_tensors(tmp_path / "out/adapter_model.safetensors")
    assert {x.dtype.name for x in tensors.values()} == {"bfloat16"}
    assert "--to hugging-face" in (tmp_path / "out/README.md").read_text()


def test_a_base_on_the_hub(adapters, tmp_path, monkeypatch):
    """PEFT names OWNER/NAME; without the hub the message names the adapters' file."""
    content = json.loads((adapters / "peft/adapter_config.json").read_text())
    content |= {"base_model_name_or_path": "owner/name", "init_lora_weights": "gaussian"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    tensors = (adapters / "peft/adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors)
    monkeypatch.setattr(hub, "fetch", {"hf:owner/name": adapters / "base"}.__getitem__)
    again, ours = (flatten(read_weights(x).params) for x in (tmp_path, adapters / "peft"))
    for path, x in ours.items():
        np.testing.assert_array_equal(again[path], x, err_msg=path)

    def missing(name):
        raise InputError(f"{name} could not be downloaded.")

    monkeypatch.setattr(hub, "fetch", missing)
    refuse(tmp_path, r"adapter_config.json: hf:owner/name could not be downloaded", read_weights)


REFUSED = {
    "use_dora": (True, "use_dora=True is not supported; merge"),
    "modules_to_save": (["head"], r"modules_to_save=\['head'\] is not"),
    "bias": ("all", "bias='all' is not"),
    "peft_type": ("LOHA", "peft_type='LOHA' is not"),
    "init_lora_weights": ("pissa", "init_lora_weights='pissa' is not"),  # which changes the base
    "arrow_config": ({"top_k": 1}, "arrow_config=.*is not"),
    "base_model_name_or_path": (None, "set base_model_name_or_path to"),
    "lora_alpha": ("high", "lora_alpha is 'high'"),
    "alpha_pattern": ({".*": "high"}, r"\.\*.* is 'high'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_do_not_compute_is_named(adapters, tmp_path, name):
    value, match = REFUSED[name]
    content = json.loads((adapters / "peft/adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(content | {name: value}))
    tensors = (adapters / "peft/adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors)
    refuse(tmp_path, match, read_weights)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("text_model.encoder.layers.9.mlp.fc1.lora_A.weight", (2, 32), "layers.9.*no linear map"),
        ("text_model.encoder.layers.0.mlp.fc1.lora_A.weight", (2, 31), r"\(2, 31\).*fit no"),
        ("text_model.encoder.layers.0.mlp.fc1.lora_A.weight", (0, 32), "no linear map"),
        ("text_model.encoder.layers.0.mlp.fc1.lora_B.bias", (128,), "lora_B.bias is not"),
        ("vision_model.embeddings.patch_embedding.lora_A.weight", (2, 3, 8, 8), "no linear map"),
    ],
)
def test_tensors_that_do_not_fit_are_named(adapters, tmp_path, name, shape, match):
    tensors = read_tensors(adapters / "peft/adapter_model.safetensors")
    tensors[f"base_model.model.{name}"] = np.ones(shape, np.float32)
    write_safetensors(tmp_path / "adapter_model.safetensors", tensors, {})
    config = (adapters / "peft/adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    refuse(tmp_path, match, read_weights)


@pytest.mark.parametrize("dtype", ["complex64", "int8"])
def test_adapters_are_floating_point_numbers(adapters, tmp_path, dtype):
    """A complex one would lose its imaginary part, and an int8 one needs a scale."""
    shutil.copytree(adapters / "peft", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: x.astype(dtype) for name, x in read_tensors(path).items()}
    write_safetensors(path, tensors, {})
    refuse(tmp_path, rf"adapter_model.safetensors: .* has the type {dtype}", read_weights)


def test_adapters_of_the_pooling_attention(adapters, tmp_path):
    """PEFT ignores them until they are merged, so that one model would have two outputs."""
    pooling = LoRAConfig(rank=2, targets=("visual/attn_pool/proj",))
    run = write_lora_run(tmp_path / "run", adapters / "base", pooling)
    settings = {"source": run, "destination": tmp_path / "out", "to": "peft"}
    with pytest.raises(InputError, match="PEFT cannot have adapters of visual/attn_pool/proj"):
        convert(ConvertConfig(**settings))
    tensors = read_tensors(adapters / "peft/adapter_model.safetensors")
    name = "base_model.model.vision_model.head.attention.out_proj.lora_{}.weight"
    start = read_weights(adapters / "peft")
    config = (adapters / "peft/adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    more = {name.format("A"): np.ones((2, 32), np.float32)}
    for value in (0, 1):  # PEFT leaves B at 0, since no gradient arrives
        more[name.format("B")] = np.full((32, 2), value, np.float32)
        write_safetensors(tmp_path / "adapter_model.safetensors", tensors | more, {})
        if value:
            refuse(tmp_path, "ignores .*out_proj.* until it is merged", read_weights)
        else:
            same = flatten(read_weights(tmp_path).params)
            for path, x in flatten(start.params).items():
                np.testing.assert_array_equal(same[path], x, err_msg=path)


def test_only_a_run_with_adapters_that_transformers_can_have(adapters, tmp_path):
    with pytest.raises(InputError, match="needs a run that trains `lora`"):
        write_weights(make_weights("siglip"), tmp_path / "out", "peft")
    write_weights(make_weights("options"), tmp_path / "base", "clip-jax")
    weights = read_weights(write_lora_run(tmp_path / "run", tmp_path / "base", PARTS))
    with pytest.raises(InputError, match="CLIPModel cannot express"):
        write_weights(weights, tmp_path / "out", "peft")
    resized = read_weights(adapters / "run", image_size=16)
    with pytest.raises(InputError, match="and its own image size"):
        write_weights(resized, tmp_path / "out", "peft")
