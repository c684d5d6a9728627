"""A tower whose embeddings are stored trains the other one as the locked tower itself does."""

import dataclasses
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from clip_jax.bench import InputBench, measure_input
from clip_jax.config import Config
from clip_jax.convert.formats import read_weights
from clip_jax.data.augment import AugmentationsConfig, AugmentConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources import SampleError
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource
from clip_jax.errors import InputError
from clip_jax.evals.held_out_pairs import PairsEvalConfig
from clip_jax.inference.evaluate import EvaluateConfig, evaluate
from clip_jax.inference.loading import load
from clip_jax.optim import OptimConfig
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.prepare.writer import prepare
from tests.conftest import MESHES, TINY, larger, losses, train_shared, write_tiny_model
from tests.data.conftest import FORMATS
from tests.prepare.conftest import records, tiny_pairs

PAIRS = 64
STEPS = 100
MODEL = dataclasses.replace(TINY, init_logit_scale=10.0)


@pytest.fixture(scope="module")
def made(in_made):
    """The tower's weights, and pairs with its embeddings in several types."""
    folder = in_made
    write_tiny_model(folder / "tower", config=MODEL)
    source = FORMATS["tar"](Path(), tiny_pairs(PAIRS)).path
    common = {"source": source, "batch_size": 16, "reinforce": (folder / "tower",)}
    of_images = {"reinforce_towers": ("image",), "augmentations_per_image": 4}
    of_images["augmentations"] = AugmentationsConfig(size=16, flip=0.5)
    for name, how in {
        "live": {"embedding_type": "float32", **of_images},
        "float32": {"embedding_type": "float32", "encode": "none", **of_images},
        "float16": {"encode": "none", **of_images},
        "int8": {"embedding_type": "int8", "encode": "none", **of_images},
        "texts": {"embedding_type": "float32", "reinforce_towers": ("text",)},
    }.items():
        prepare(PrepareConfig(**common, **how, destination=folder / name))
    return folder


def config_of(made, name, tower="image", **changes):
    """Return a run on some of the data, with the tower computed, or stored."""
    crop = {"crop": "stored"} if tower == "image" else {"augment": AugmentConfig(flip=0.5)}
    settings = {
        "model": MODEL,
        "data": DataConfig(
            source=ArrayRecordConfig(path=str(made / name / "*.array_record")), **crop
        ),
        "init_from": str(made / "tower"),
        "init_towers": (tower,),
        "optim": OptimConfig(learning_rate=4e-3, warmup_steps=4, locked=(tower,)),
        "steps": STEPS,
        "batch_size": 16,
        "report_every": 1,
    }
    return Config(**settings | changes)


def run(made, data, workdir, tower="image", **changes):
    train_shared(config_of(made, data, tower, **changes), workdir)
    return np.array(list(losses(workdir).values()))


def test_a_stored_image_tower_gives_the_losses_of_the_locked_one(made, tmp_path):
    """With augmentations, which differ between runs of this test, as the pairs' keys have its
    folder's name. The shards of the stored tower have no images."""
    expected = run(made, "live", tmp_path / "live")
    assert all("image" not in x for name in ("float32", "int8") for x in records(made / name))
    for name, first, all_steps in (
        ("float32", 1e-6, 1e-4),
        ("float16", 3e-4, 2e-3),
        ("int8", 5e-3, 2e-2),
    ):
        got = run(made, name, tmp_path / name, stored="image")
        assert len(got) == STEPS
        assert abs(got[0] - expected[0]) < first
        assert abs(got - expected).max() < all_steps
    assert expected[-50:].mean() < expected[:10].mean()


def test_a_stored_text_tower_gives_the_losses_of_the_locked_one(made, tmp_path):
    """The crops and flips of the images are random."""
    expected = run(made, "texts", tmp_path / "live", "text")
    got = run(made, "texts", tmp_path / "stored", "text", stored="text")
    assert abs(got[0] - expected[0]) < 1e-6
    assert abs(got - expected).max() < 1e-4
    assert expected[-50:].mean() < expected[:10].mean()


def test_images_in_the_shards_are_neither_decoded_nor_needed(made, tmp_path):
    """Without them, a record has the bytes of its image less."""
    with mock.patch.object(ArrayRecordSource, "_image", side_effect=SampleError, autospec=True):
        run(made, "live", tmp_path / "run", stored="image", stop_after=2)
    assert not (tmp_path / "run/skipped.jsonl").exists()
    sizes = []
    for name in ("live", "float32"):
        source = ArrayRecordSource(ArrayRecordConfig(path=str(made / name / "*.array_record")))
        sizes.append(np.array([source.record(i).size for i in range(PAIRS)]))
    images = [len(image) for _, image, _ in tiny_pairs(PAIRS)]
    np.testing.assert_allclose(sizes[0] - sizes[1], images, atol=24)


def test_the_input_of_a_stored_tower_reads_and_tokenizes(made):
    stages = {}
    for name, tower in (("live", "image"), ("float32", "image"), ("texts", "text")):
        stored = None if name == "live" else tower
        settings = vars(config_of(made, name, tower, stored=stored, steps=9, evals=()))
        bench = InputBench(**settings, seconds=0.1, warmup=0)
        result = measure_input(bench)
        stages[name] = list(result["stages"])
        assert result["samples_per_second"] > 0
    assert stages == {
        "live": ["read", "decode and crop", "tokenize"],
        "float32": ["read", "tokenize"],
        "texts": ["read", "decode and crop", "augment"],
    }


def test_a_run_goes_on_on_another_mesh(made, tmp_path):
    expected = run(made, "float32", tmp_path / "all", stored="image", stop_after=6)
    run(made, "float32", tmp_path / "parts", stored="image", stop_after=3)
    mesh = MESHES["2x2x2"]
    got = run(made, "float32", tmp_path / "parts", stored="image", stop_after=6, mesh=mesh)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.fixture
def trained(made, tmp_path):
    """A run with a stored tower and an evaluator, and its results."""
    source = FORMATS["tar"](tmp_path, tiny_pairs(16))
    held_out = PairsEvalConfig(data=DataConfig(source=source, crop="center"), pairs=16, pool=16)
    (copy := tmp_path / "tower").symlink_to(made / "tower")
    changes = {"stored": "image", "stop_after": 3, "init_from": str(copy), "evals": (held_out,)}
    result = train_shared(config_of(made, "float32", **changes), tmp_path / "run")
    return tmp_path / "run", result


def test_evaluators_and_saved_models_have_the_tower_itself(made, trained, tmp_path):
    workdir, result = trained
    again = evaluate(EvaluateConfig(model=workdir))
    assert {name: result[name] for name in again} == pytest.approx(again, abs=1e-5)
    model, tower = load(workdir), load(made / "tower")
    jax.tree.map(np.testing.assert_array_equal, model.params["visual"], tower.params["visual"])
    assert not np.array_equal(model.params["text"]["ln_final"]["scale"], np.ones(32))
    model.save(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "saved").params, model.params)
    saved = [path.read_text() for path in (workdir / "checkpoints/3").rglob("_METADATA")]
    assert any("ln_final" in text for text in saved)
    assert not any("visual" in text for text in saved)


def test_a_tower_that_has_changed_or_moved_is_named(made, trained, tmp_path):
    workdir, _ = trained
    (tmp_path / "tower").unlink()
    with pytest.raises(InputError, match=r"has the image tower of the weights in .*cannot be read"):
        load(workdir)
    write_tiny_model(tmp_path / "tower", seed=2, config=MODEL)
    with pytest.raises(InputError, match=r"has the image tower .* have changed. Restore them"):
        load(workdir)
    changed = config_of(made, "float32", stored="image", init_from=str(tmp_path / "tower"))
    with pytest.raises(InputError, match=r"image embeddings with weights \w+, but need \w+"):
        train_shared(changed, workdir)


def test_embeddings_of_another_tower_crop_width_size_or_tokenizer_are_refused_by_name(
    made, tmp_path
):
    write_tiny_model(tmp_path / "large", config=larger(MODEL))
    write_tiny_model(tmp_path / "wide", config=dataclasses.replace(MODEL, embed_dim=24))
    gray = dataclasses.replace(MODEL, image_mean=(0.5, 0.5, 0.5))
    write_tiny_model(tmp_path / "gray", config=gray)
    rules = dataclasses.replace(MODEL.text.tokenizer, clean="lower")
    lower = dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, tokenizer=rules))
    write_tiny_model(tmp_path / "lower", config=lower)
    data = config_of(made, "float32").data
    for data_of, tower, changes, message in (
        ("float32", "image", {"init_from": "large"}, "resolution 16, but need 32"),
        ("float32", "image", {"init_from": "wide"}, r"width \(16,\), but need \(24,\)"),
        ("float32", "image", {"init_from": "gray"}, r"normalization \w+, but need \w+"),
        ("texts", "text", {"init_from": "large"}, "context length 10, but need 5"),
        ("texts", "text", {"init_from": "lower"}, r"tokenizer \w+, but need \w+"),
        ("texts", "image", {}, r"resolution unknown, but need 16"),
        ("float32", "image", {"data": dataclasses.replace(data, crop="random")}, "data.crop is "),
    ):
        if name := changes.get("init_from"):
            changes = {"init_from": str(tmp_path / name), "init_architecture": True}
        config = config_of(made, data_of, tower, stored=tower, **changes)
        with pytest.raises(InputError, match=message):
            train_shared(config, tmp_path / "run")
    assert read_weights(made / "tower").stored is None
