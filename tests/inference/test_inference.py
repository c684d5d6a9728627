"""Commands on a model of images of any aspect ratio, at any sequence length."""

import dataclasses
import json

import numpy as np
import pytest

from clip_jax.evals.datasets import open_folder
from clip_jax.evals.reader import ImageCache, Splits
from clip_jax.inference.loading import load, load_on_mesh
from clip_jax.sharding import MeshConfig, make_mesh
from tests.conftest import TINY, write_tiny_model
from tests.evals.conftest import unit
from tests.inference.conftest import (
    NAFLEX_16,
    OTHER,
    OWN,
    SIZES,
    assert_loads_at_any_length,
    encoder_at,
    write_classes,
    write_image,
    write_photos,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A NaFlex model, one of fixed resolution, and images of many shapes."""
    path = tmp_path_factory.mktemp("naflex")
    write_tiny_model(path / "model", config=NAFLEX_16)
    write_tiny_model(path / "fixed", config=TINY)
    write_photos(path / "photos")
    return path


def test_a_fixed_resolution_has_no_length(folder):
    model = load(folder / "fixed")
    assert model.tokens is None
    advice = r"tokens=9 is for NaFlex models, and .* has a fixed resolution of 16 pixels.*convert"
    with pytest.raises(ValueError, match=advice):
        model.with_tokens(9)
    with pytest.raises(ValueError, match=advice):
        load(folder / "fixed", tokens=9)
    with pytest.raises(ValueError, match=advice):
        load_on_mesh(folder / "fixed", make_mesh(MeshConfig()), tokens=9)


def test_a_model_is_loaded_at_any_length(folder):
    assert_loads_at_any_length(folder / "model", folder / "photos", least=1e-3)


@pytest.mark.parametrize(("options", "tokens"), [([], OWN), (["--tokens", OTHER], OTHER)])
def test_predictions_name_their_length(options, tokens, folder, run):
    args = ["--images", folder / "photos", "--labels", "cat", "dog", *options, "--batch-size", 4]
    results = run("predict", folder / "model", *args)
    assert {row["tokens"] for row in results} == {tokens}
    model = load(folder / "model", tokens=tokens)
    images = model.encode_image(model.preprocess([row["image"] for row in results]))
    texts = model.encode_text(model.tokenize(["a photo of a cat.", "a photo of a dog."]))
    shares = model.probabilities(images, texts)
    for row, (cat, dog) in zip(results, shares, strict=True):
        got = {x["label"]: x["probability"] for x in row["labels"]}
        assert got == pytest.approx({"cat": cat, "dog": dog}, abs=1e-5)


def test_an_index_is_searched_at_its_own_length(folder, tmp_path, run):
    model, photos, index = folder / "model", folder / "photos", tmp_path / "index"
    run("embed", model, photos, index, "--tokens", OTHER)
    assert json.loads((index / "embed.json").read_text())["tokens"] == OTHER
    for name in range(len(SIZES)):
        best, *_ = run("search", model, index, "--image", photos / f"{name}.png")
        assert best["key"] == f"{name}.png"
        assert best["similarity"] == pytest.approx(1, abs=1e-5)
    query = ["search", model, index, "--image", photos / "0.png", "--tokens"]
    assert run(*query, OTHER)[0]["key"] == "0.png"
    assert f"have tokens={OTHER}, this model has tokens={OWN}" in run(*query, OWN, code=2)
    assert f"with tokens={OTHER}, now {OWN};" in run("embed", model, photos, index, code=2)
    # The same weights at a fixed resolution, by a manifest of before there were lengths.
    manifest = json.loads((index / "embed.json").read_text())
    del manifest["tokens"]
    (index / "embed.json").write_text(json.dumps(manifest))
    assert "have tokens=None" in run(*query[:-1], code=2)


def test_an_index_is_searched_at_its_own_width(folder, tmp_path, run):
    model, photos, index = folder / "fixed", folder / "photos", tmp_path / "index"
    run("embed", model, photos, index, "--dim", 6)
    assert json.loads((index / "embed.json").read_text())["dim"] == 6
    query = ["search", model, index, "--image", photos / "0.png"]
    best, *_ = run(*query)
    assert (best["key"], best["similarity"]) == ("0.png", pytest.approx(1, abs=1e-5))
    short = load(model, dim=6)
    np.testing.assert_array_equal(short.with_dim(4).params["visual"]["proj"].shape, (32, 4))
    a, b = (unit(short.encode_image(short.preprocess([photos / f"{i}.png"]))) for i in (0, 1))
    second = next(x for x in run(*query) if x["key"] == "1.png")
    assert second["similarity"] == pytest.approx((a @ b.T).item(), abs=1e-5)
    assert "have dim=6, this model has dim=5. Leave out --dim" in run(*query, "--dim", 5, code=2)
    assert "with dim=6, now 16;" in run("embed", model, photos, index, code=2)
    assert "have 16 channels; choose at most" in run(*query, "--dim", 17, code=2)


def test_captions_and_pairs_are_retrieved_at_any_length(folder, tmp_path, run):
    """Retrieval by hand: the recall of captions by embeddings of the library."""
    captions = {"images": [], "annotations": []}
    for i, size in enumerate(SIZES):
        path = tmp_path / f"flickr30k/images/{i}.png"
        write_image(path, *size, seed=i)
        captions["images"].append({"id": i, "file_name": path.name})
        captions["annotations"].append({"image_id": i, "caption": f"number {i}"})
    (tmp_path / "flickr30k/flickr30k_test_karpathy.json").write_text(json.dumps(captions))
    args = ["--dataset", "flickr30k", "--data-dir", tmp_path, "--tokens", OTHER]
    values = run("evaluate", folder / "model", *args)
    model = load(folder / "model", tokens=OTHER)
    paths = [tmp_path / f"flickr30k/images/{i}.png" for i in range(len(SIZES))]
    images = unit(model.encode_image(model.preprocess(paths)))
    texts = unit(model.encode_text(model.tokenize([x["caption"] for x in captions["annotations"]])))
    best = (images @ texts.T).argmax(axis=0) == np.arange(len(SIZES))
    assert values["flickr30k/image_retrieval_recall@1"] == pytest.approx(best.mean())
    assert values["tokens"] == OTHER


def test_decoded_images_are_kept_for_their_length_alone(folder, tmp_path):
    write_classes(tmp_path, SIZES)
    data, loads = open_folder(tmp_path / "test"), []

    def load_counted(index):
        loads.append(index)
        return data.load(index)

    counted = dataclasses.replace(data, load=load_counted)
    images, cache = [data.load(i)[0] for i in range(data.count)], ImageCache(1 << 20)
    for tokens in (OWN, OTHER, OWN):
        splits = Splits(
            "data", lambda _: counted, encoder_at(folder / "model", tokens), cache=cache
        )
        model = load(folder / "model", tokens=tokens)
        expected = unit(model.encode_image(model.preprocess(images)))
        np.testing.assert_allclose(splits.embedded("test").features, expected, atol=1e-6)
    assert len(loads) == 2 * data.count  # not read again for the last
