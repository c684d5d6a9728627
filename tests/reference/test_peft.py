"""Low-rank adapters in PEFT: ours load there, and theirs here."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.state_dict import flatten
from clip_jax.convert.verify import BOUND, our_outputs, random_inputs
from clip_jax.errors import InputError
from clip_jax.models.lora import LoRAConfig
from tests.convert.conftest import CONFIGS, write_lora_run
from tests.reference.parity import outputs, random_weights

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hugging Face folders of a small CLIP and of a small SigLIP with its pooling attention."""
    folder = tmp_path_factory.mktemp("folders")
    for name in ("vit", "siglip"):
        write_weights(random_weights(CONFIGS[name]), folder / name, "hugging-face")
    return folder


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_peft_loads_our_adapters(folders, tmp_path, name, dtype):
    """`--verify` compares with the adapters in PEFT; the files alone give the same."""
    targets = ("*/attn/q", "*/attn/v", "*/attn/out_proj", "*/mlp/*", "text/text_projection")
    adapters = LoRAConfig(rank=4, alpha=6.0, targets=targets, rank_stabilized=name == "vit")
    run = write_lora_run(tmp_path / "run", folders / name, adapters)
    settings = {"source": run, "to": "peft", "verify": True, "dtype": dtype}
    verification = convert(ConvertConfig(destination=tmp_path / "peft", **settings)).verification
    assert verification is not None
    theirs, _ = verification.made
    assert theirs.reference.startswith("peft ")
    assert verification.passed
    if dtype is not None:
        assert (theirs.rounding_loss or 0) > BOUND
        return
    merged = read_weights(run)
    images, tokens = random_inputs(merged.config)
    base = AutoModel.from_pretrained(folders / name).eval()
    start = outputs(base, images, tokens)
    theirs = outputs(peft.PeftModel.from_pretrained(base, tmp_path / "peft"), images, tokens)
    ours = our_outputs(merged.config, merged.params, images, tokens)
    for key in ("image_features", "text_features"):
        np.testing.assert_allclose(unit(ours[key]), unit(theirs[key]), atol=1e-5, rtol=0)
        assert np.abs(unit(start[key]) - unit(theirs[key])).max() > 1e-3


@pytest.mark.parametrize("to", ["openai", "open-clip", "hugging-face"])
def test_merged_adapters_load_everywhere(folders, tmp_path, to):
    adapters = LoRAConfig(rank=4, targets=("*/attn/*", "*/mlp/*", "*proj*", "visual/conv1"))
    run = write_lora_run(tmp_path / "run", folders / "vit", adapters)
    settings = {"source": run, "destination": tmp_path / "out", "to": to, "verify": True}
    verification = convert(ConvertConfig(**settings)).verification
    assert verification is not None
    theirs, again = verification.made
    # openai-clip has one vocabulary, larger than this model's.
    assert theirs.differing == (("token ids",) if to == "openai" else ())
    assert again.passed


def their_adapters(folder, out, base, **settings):
    """Save adapters of PEFT at random numbers, with settings of its own; return the model."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    model = peft.get_peft_model(AutoModel.from_pretrained(folder / base), config).eval()
    model.save_pretrained(out)
    return model


THEIRS = {
    "stabilized": (
        "siglip",
        {"use_rslora": True, "target_modules": ["q_proj", "fc1", "text_model.head"]},
    ),
    "patterns": (
        "siglip",
        {
            "target_modules": r".*(self_attn\.(k|v|out)_proj|mlp\.fc[12])",
            "rank_pattern": {"fc1": 2, r"text_model.*\.k_proj": 3},
            "alpha_pattern": {"fc1": 9, "vision_model.encoder.layers.1.mlp.fc2": 1},
        },
    ),
    "clip": (
        "vit",
        {
            "target_modules": ["q_proj", "v_proj", "visual_projection", "text_projection"],
            "use_rslora": True,
            "lora_dropout": 0.1,
            "alpha_pattern": {"q_proj": 2},
        },
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_we_read_adapters_of_peft(folders, tmp_path, name):
    base, settings = THEIRS[name]
    model = their_adapters(folders, tmp_path / "peft", base, **settings)
    weights, start = read_weights(tmp_path / "peft"), read_weights(folders / base)
    images, tokens = random_inputs(weights.config)
    theirs = outputs(model, images, tokens)
    ours, before = (our_outputs(x.config, x.params, images, tokens) for x in (weights, start))
    for key in ("image_features", "text_features"):
        np.testing.assert_allclose(unit(ours[key]), unit(theirs[key]), atol=1e-5, rtol=0)
    assert np.abs(unit(before["text_features"]) - unit(theirs["text_features"])).max() > 1e-3


REFUSED = {
    "use_dora": {"use_dora": True, "target_modules": ["fc1"]},
    "modules_to_save": {"modules_to_save": ["fc2"], "target_modules": ["fc1"]},
    "bias": {"bias": "all", "target_modules": ["fc1"]},
    "out_proj.* until it is merged": {"target_modules": ["out_proj"]},
    "in_proj|head.attention": {"target_modules": ["attention"]},
}


@pytest.mark.parametrize("match", REFUSED)
def test_what_we_do_not_compute_is_named(folders, tmp_path, match):
    their_adapters(folders, tmp_path, "siglip", **REFUSED[match])
    with pytest.raises(InputError, match=f"({match}).*merge the adapters in PEFT"):
        read_weights(tmp_path)


def test_training_leaves_an_ignored_adapter_at_zero(folders, tmp_path):
    """A suffix such as `out_proj` matches the pooling attention's, which gets no gradient."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["out_proj", "q_proj"])
    model = peft.get_peft_model(AutoModel.from_pretrained(folders / "siglip"), config)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.01)
    images, tokens = random_inputs(CONFIGS["siglip"])
    ids, pixels = torch.from_numpy(tokens).long(), torch.from_numpy(images).permute(0, 3, 1, 2)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, pixel_values=pixels, return_loss=True).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    weights, start = (read_weights(path) for path in (tmp_path, folders / "siglip"))
    ours = our_outputs(weights.config, weights.params, images, tokens)
    theirs = outputs(model, images, tokens)
    for key in ("image_features", "text_features"):
        np.testing.assert_allclose(unit(ours[key]), unit(theirs[key]), atol=1e-5, rtol=0)
    before, after = (flatten(x.params)["visual/attn_pool/proj/kernel"] for x in (start, weights))
    np.testing.assert_array_equal(before, after)
