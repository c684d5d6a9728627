"""One tower of a model alone, in transformers' classes; PE core's own files."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import transformers

from clip_jax.convert import perception_models
from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.fitting import starting_params
from clip_jax.convert.formats import read_weights, verify, write_weights
from clip_jax.convert.state_dict import flatten, from_params, table
from clip_jax.convert.tensor_files import read_tensors
from clip_jax.convert.verify import our_outputs, random_inputs, relative_difference
from clip_jax.errors import InputError
from clip_jax.models import zoo
from tests.conftest import TINY
from tests.reference import families
from tests.reference.parity import random_weights

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
IMAGE = {"image_size": 32, "patch_size": 8, "projection_dim": 16, **SIZES}
TEXT = {
    "vocab_size": 900,
    "max_position_embeddings": 12,
    "projection_dim": 16,
    "bos_token_id": 898,
    "eos_token_id": 899,
    **SIZES,
}


@pytest.mark.parametrize("name", ["CLIPVisionModelWithProjection", "CLIPTextModelWithProjection"])
def test_their_tower_and_back(tmp_path, name):
    kind = getattr(transformers, name)
    tower = "image" if "Vision" in name else "text"
    torch.manual_seed(0)
    model = kind(kind.config_class(**(IMAGE if tower == "image" else TEXT))).eval()
    model.save_pretrained(tmp_path / "in")
    weights = read_weights(tmp_path / "in", one_tower=True)
    assert weights.only_tower == tower
    images, ids = random_inputs(weights.config)
    given = torch.from_numpy(images).permute(0, 3, 1, 2) if tower == "image" else ids
    with torch.no_grad():
        theirs = model(torch.as_tensor(given))[f"{tower}_embeds"].numpy()
    ours = our_outputs(weights.config, weights.params, images, ids)
    assert relative_difference(ours[f"{tower}_features"], theirs) < 1e-5
    done = convert(
        ConvertConfig(
            source=tmp_path / "in",
            destination=tmp_path / "out",
            to="hugging-face",
            tower=tower,
            verify=True,
        )
    )
    assert done.verification.passed
    before, after = (read_tensors(tmp_path / x / "model.safetensors") for x in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[x], after[x]) for x in before)


def test_a_tower_of_a_model_becomes_a_folder_to_begin_with(tmp_path):
    """Its image tower, read again to initialise another model's; a whole model needs more."""
    write_weights(random_weights(TINY), tmp_path / "whole", "clip-jax")
    for tower in ("image", "text"):
        done = convert(
            ConvertConfig(
                source=tmp_path / "whole",
                destination=tmp_path / tower,
                to="hugging-face",
                tower=tower,
                verify=True,
            )
        )
        assert done.verification.passed
        assert starting_params(
            read_weights(tmp_path / tower, one_tower=True), TINY, (tower,)
        ).keys() == {{"image": "visual", "text": "text"}[tower]}
    with pytest.raises(InputError, match="holds the image tower of a model alone"):
        read_weights(tmp_path / "image")
    with pytest.raises(InputError, match="--init-towers"):
        starting_params(read_weights(tmp_path / "image", one_tower=True), TINY, ("text",))
    with pytest.raises(InputError, match="--tower text needs --to hugging-face"):
        convert(
            ConvertConfig(
                source=tmp_path / "whole", destination=tmp_path / "x", to="open-clip", tower="text"
            )
        )


def test_a_tower_whose_class_would_pool_another_token(tmp_path):
    """transformers' CLIPTextModel takes 2 for an id of OpenAI's; MetaCLIP 2's end of text is 2."""
    text = replace(TINY.text, pool="eos", eos_token_id=2)
    weights = replace(random_weights(replace(TINY, text=text)), only_tower="text")
    with pytest.raises(InputError, match=r"text.pool='eos' \(needs 'argmax'\).*--init-from"):
        write_weights(weights, tmp_path / "out", "hugging-face")
    image = replace(weights, only_tower="image")
    write_weights(image, tmp_path / "out", "hugging-face")


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_tower_without_projection(tmp_path, tower):
    """As the text encoders of diffusion models, whose tensors have no prefix in transformers 5."""
    kind = transformers.CLIPTextModel if tower == "text" else transformers.CLIPVisionModel
    model = kind(kind.config_class(**(TEXT if tower == "text" else IMAGE))).eval()
    model.save_pretrained(tmp_path)
    weights = read_weights(tmp_path, one_tower=True)
    images, ids = random_inputs(weights.config)
    given = torch.from_numpy(images).permute(0, 3, 1, 2) if tower == "image" else ids
    with torch.no_grad():
        theirs = model(torch.as_tensor(given)).pooler_output.numpy()
    ours = our_outputs(weights.config, weights.params, images, ids)
    assert relative_difference(ours[f"{tower}_features"], theirs) < 1e-5
    with pytest.raises(InputError, match=r"projection=False .*can start a run"):
        write_weights(weights, tmp_path / "out", "hugging-face")


def test_siglips_image_tower_alone(tmp_path):
    """It is read to start the image side of a model, and not written."""
    settings = transformers.SiglipVisionConfig(
        **{x: y for x, y in IMAGE.items() if "proj" not in x}
    )
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(settings).eval()
    model.save_pretrained(tmp_path)
    weights = read_weights(tmp_path, one_tower=True)
    assert (weights.only_tower, weights.config.embed_dim) == ("image", 32)
    assert verify(weights, tmp_path, "hugging-face").passed
    assert starting_params(weights, weights.config, ("image",)).keys() == {"visual"}
    with pytest.raises(InputError, match=r"SiglipModel cannot .*only_tower='image'"):
        write_weights(weights, tmp_path / "out", "hugging-face")


def test_pe_cores_own_file(tmp_path, monkeypatch):
    """The names of Meta's program, as timm's own converter reads them."""
    config = families.cut(zoo.get("PE-Core-T-16-384"), 2)
    monkeypatch.setitem(zoo.ARCHITECTURES, "PE-Core-T-16-384", config)
    weights = random_weights(config)
    bare = replace(config, vision=replace(config.vision, projection_bias=False))
    visual = {x: y for x, y in weights.params["visual"].items() if x != "proj_bias"}
    tensors = from_params(
        table(bare, perception_models.CONVENTION), weights.params | {"visual": visual}
    )
    torch.save({x: torch.from_numpy(y.copy()) for x, y in tensors.items()}, tmp_path / "pe.pt")
    again = read_weights(tmp_path / "pe.pt")
    assert again.config.vision == config.vision
    assert (again.preprocess.resize_mode, again.preprocess.interpolation) == ("squash", "bilinear")
    assert not again.params["visual"]["proj_bias"].any()
    flat = flatten(again.params)
    jax.tree.map(
        np.testing.assert_array_equal,
        flat | {"visual/proj_bias": 0},
        {**flatten(weights.params), "visual/proj_bias": 0},
    )
    import timm
    from timm.models.eva import checkpoint_filter_fn

    model = timm.create_model(
        "vit_pe_core_tiny_patch16_384", num_classes=512, global_pool="map", depth=2
    )
    state = {x: torch.from_numpy(y.copy()) for x, y in tensors.items()}
    model.load_state_dict(checkpoint_filter_fn(state, model))
    images, ids = random_inputs(again.config)
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    ours = our_outputs(again.config, again.params, images, ids)["image_features"]
    assert relative_difference(ours, theirs) < 1e-5
    part = {x: y for x, y in tensors.items() if not x.startswith("visual.transformer.resblocks.1")}
    with pytest.raises(InputError, match="no published PE core has width 192 and depth 1"):
        perception_models.read(part, "pe.pt")
