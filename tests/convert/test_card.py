"""A model card follows the weights: from a run to a folder, and from folder to folder."""

import json
from dataclasses import replace

import numpy as np
import pytest

from clip_jax.cli.commands import main
from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.tensor_files import write_safetensors
from clip_jax.convert.weights import Head
from clip_jax.errors import InputError
from clip_jax.inference.loading import load, load_on_mesh, unit
from clip_jax.models.lora import LoRAConfig
from clip_jax.sharding import MeshConfig, make_mesh
from tests.conftest import TINY, write_run
from tests.convert.conftest import make_weights, write_lora_run


def test_what_a_run_was_is_carried_from_folder_to_folder(tmp_path):
    """Weights that say nothing of themselves have a card that says so."""
    workdir, *_ = write_run(TINY, tmp_path / "run")
    result = {"zero_shot/seen/top1": 0.93, "seconds/steps": 12.0, "note": "fast"}
    (workdir / "result.json").write_text(json.dumps(result))
    run, there, back, lost = (str(tmp_path / name) for name in ("run", "there", "back", "lost"))
    assert main(["convert", run, there, "--to", "hugging-face"]) == 0
    assert main(["convert", there, back, "--to", "clip-jax"]) == 0
    for name in ("there", "back"):
        card = (tmp_path / name / "README.md").read_text()
        assert f"# {name}\n" in card
        assert "| steps | 2 |\n" in card
        assert "| batch_size | 1024 |\n" in card
        assert "| optim/learning_rate | " in card
        assert "| image_activation | quick_gelu |" in card
        assert "| zero_shot/seen/top1 | 0.93 |" in card
        assert "seconds/steps" not in card
        assert "license:  # fill in" in card
        facts = json.loads((tmp_path / name / "training.json").read_text())
        assert facts["result"] == result
    assert "AutoModel.from_pretrained" in (tmp_path / "there/README.md").read_text()
    (tmp_path / "back/training.json").unlink()
    assert main(["convert", back, lost, "--to", "clip-jax"]) == 0
    card = (tmp_path / "lost/README.md").read_text()
    assert card.count("Not known.") == 2
    assert not (tmp_path / "lost/training.json").exists()


def test_a_classifier_follows_the_weights(tmp_path, capsys):
    """In folders of every format, with a line in the card; an older one is removed."""
    kernel = np.random.default_rng(0).normal(size=(2, 48)).astype(np.float32)
    head = Head(("a", "é"), ("{}", "a photo of {}"), kernel)
    plain = make_weights("vit")
    write_weights(plain, tmp_path / "plain", "clip-jax")
    adapters = LoRAConfig(rank=2, targets=("visual/proj",))
    last = write_lora_run(tmp_path / "run", tmp_path / "plain", adapters, head)
    for to in ("clip-jax", "hugging-face", "peft", "open-clip"):
        source = tmp_path / "run" if to == "peft" else last
        last = tmp_path / to
        convert(ConvertConfig(source=source, destination=last, to=to))
        found = read_weights(last).head
        assert found is not None
        assert found[:2] == head[:2]
        np.testing.assert_array_equal(found.kernel, kernel)
        card = (last / "README.md").read_text()
        assert "row of `kernel` for each class" in card
    images = np.random.default_rng(1).normal(size=(3, 48)).astype(np.float32)
    model = load(last)
    logits = np.exp(float(model.params["logit_scale"])) * unit(images) @ kernel.T
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(model.class_probabilities(images), expected, rtol=1e-5)
    mesh = make_mesh(MeshConfig())
    np.testing.assert_array_equal(load_on_mesh(tmp_path / "run@1", mesh).head.kernel, kernel)
    siglip = replace(make_weights("siglip"), head=Head(("a",), (), np.ones((1, 32), np.float32)))
    write_weights(siglip, tmp_path / "out.npz", "big-vision")
    assert "out.npz is a single file without the classifier" in capsys.readouterr().err
    settings = {"source": tmp_path / "plain", "destination": last, "overwrite": True}
    convert(ConvertConfig(to="open-clip", **settings))
    assert not (last / "classifier.safetensors").exists()
    assert "kernel" not in (last / "README.md").read_text()
    with pytest.raises(InputError, match="has no classifier"):
        load(last).class_probabilities(images)


@pytest.mark.parametrize("damage", ["width", "names", "number", "NaN", "file"])
def test_a_damaged_classifier_is_refused(tmp_path, damage):
    weights = make_weights("vit")
    kernel = np.ones((2, 47 if damage == "width" else 48), np.float32)
    kernel[0, 0] = np.nan if damage == "NaN" else 1
    names = ("a",) if damage == "number" else ("a", "b")
    write_weights(replace(weights, head=Head(names, (), kernel)), tmp_path, "clip-jax")
    path = tmp_path / "classifier.safetensors"
    if damage == "names":
        write_safetensors(path, {"kernel": kernel}, {"classes": "5", "templates": "[]"})
    elif damage == "file":
        path.write_bytes(b"other")
    with pytest.raises(InputError, match=r"classifier.safetensors is damaged .* of width 48"):
        read_weights(tmp_path)
