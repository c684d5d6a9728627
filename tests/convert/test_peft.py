"""PEFT's adapters: written from a run and read back, and what is refused. Without PyTorch."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from clip_jax.convert import hub, peft
from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.state_dict import flatten
from clip_jax.convert.tensor_files import read_tensors, write_safetensors
from clip_jax.errors import InputError
from clip_jax.models.lora import LoRAConfig
from clip_jax.storage import bucket
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
    adapters = replace(
        PARTS, rank_stabilized=name == "vit", targets=(*PARTS.targets, "text/*proj*")
    )
    weights = read_weights(write_lora_run(tmp_path / "run", base, adapters))
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


def test_no_shard_of_a_base_is_read_instead_of_the_merged_model(adapters):
    """A base that is a run can be read by shard."""
    base = replace(read_weights(adapters / "base"), read_sharded=lambda shapes, shardings: shapes)
    assert peft.read(adapters / "peft", lambda path: base).read_sharded is None


def change(adapters: Path, folder: Path, **settings: object) -> Path:
    """Write a copy of the adapters with other settings."""
    shutil.copytree(adapters / "peft", folder, dirs_exist_ok=True)
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | settings))
    return folder


def test_a_base_on_the_hub_is_downloaded_for_a_person_alone(adapters, tmp_path):
    """PEFT names OWNER/NAME; without the hub the message names the adapters' file."""
    name = {"base_model_name_or_path": "owner/name", "init_lora_weights": "gaussian"}
    folder = change(adapters, tmp_path / "peft", **name)
    with mock.patch.object(hub, "fetch", autospec=True, return_value=adapters / "base") as fetch:
        refuse(
            folder,
            r"adapter_config.json: the base .*'owner/name', is nothing .*--base",
            read_weights,
        )
        fetch.assert_not_called()
        settings = ConvertConfig(
            source=folder, destination=tmp_path / "out", to="clip-jax", base="hf:owner/name"
        )
        convert(settings)
        fetch.assert_called_once_with("hf:owner/name")
        again, ours = (
            flatten(read_weights(x).params) for x in (tmp_path / "out", adapters / "peft")
        )
        for path, x in ours.items():
            np.testing.assert_array_equal(again[path], x, err_msg=path)
        fetch.side_effect = InputError("hf:owner/name could not be downloaded.")
        with pytest.raises(InputError, match=r"adapter_config.json: hf:owner/name could not"):
            read_weights(folder, base="hf:owner/name")


@pytest.mark.parametrize("base", ["gs://bucket/base", "hf:owner/name", "~nobody/x", "x" * 5000])
def test_a_file_contacts_nobody(adapters, tmp_path, base):
    """Neither a bucket nor the hub, whatever it names as its base."""
    folder = change(adapters, tmp_path, base_model_name_or_path=base)
    with mock.patch.object(bucket, "check", autospec=True) as contacted:
        refuse(folder, "is nothing on this machine", read_weights)
    contacted.assert_not_called()


def test_a_file_may_name_the_bundled_model_as_its_base(adapters, tmp_path):
    folder = change(adapters, tmp_path / "peft", base_model_name_or_path="icons")
    with mock.patch.object(hub, "fetch", autospec=True, return_value=adapters / "base") as fetch:
        read_weights(folder)
    fetch.assert_called_once_with("icons")


def test_adapters_that_are_their_own_base(adapters, tmp_path):
    """Directly, or through other adapters, they would be read without end."""
    first, second = (tmp_path / name for name in ("first", "second"))
    change(adapters, first, base_model_name_or_path=str(first))
    refuse(first, "first has low-rank adapters that are their own base", read_weights)
    change(adapters, first, base_model_name_or_path=str(second))
    change(adapters, second, base_model_name_or_path=str(first))
    refuse(first, "first has low-rank adapters that are their own base", read_weights)
    assert read_weights(first, base=str(adapters / "base")).params
    with pytest.raises(InputError, match=r"base has no adapters .* omit --base"):
        read_weights(adapters / "base", base=str(first))


MODULES = (
    "text_model.encoder.layers.0.mlp.fc1",
    "text_model.encoder.layers.10.mlp.fc1",
    "vision_model.encoder.layers.0.self_attn.q_proj",
    "vision_model.encoder.layers.0.mlp.fc1",
)


@pytest.mark.parametrize(
    "text",
    [
        "fc1", "mlp.fc1$", "c1", r"layers\.0\.mlp\.fc1", "^text_model.*", ".*", "^layers.0.mlp.fc1",
        "vision_model.encoder.layers.0.*_proj", "layers.1..mlp.fc1", "layers.0",
    ],
)  # fmt: skip
def test_patterns_match_as_in_peft(text):
    """PEFT's own rule is a regular expression (`get_pattern_key` in peft/utils/other.py)."""
    for module in MODULES:
        theirs = re.match(rf"(.*\.)?({text})$", module)
        assert bool(peft._pattern(text, "x").match(module)) == bool(theirs), module


@pytest.mark.parametrize("text", ["([a-z_.0-9]+)+!", "(", "*", ".?" * 40, "a{4000000000}", r"\.*"])
def test_patterns_that_could_hang_are_refused(adapters, tmp_path, text):
    content = change(adapters, tmp_path, alpha_pattern={text: 4})
    refuse(content, r"alpha_pattern: the pattern .* is not supported.* merge the", read_weights)


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
