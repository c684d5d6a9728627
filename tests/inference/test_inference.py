"""Commands on a model of images of any aspect ratio, at any sequence length."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from clip_jax.checkpoints.retention import WATCHED
from clip_jax.cli.commands import main
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.evals.datasets import open_folder
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.evaluator import Encoder, Evaluations
from clip_jax.evals.held_out_pairs import PairsEvalConfig
from clip_jax.evals.reader import ImageCache, Splits
from clip_jax.inference.loading import load, load_on_mesh
from clip_jax.models.images import Patches
from clip_jax.sharding import MeshConfig, make_mesh
from tests.conftest import COCA, NAFLEX, TINY, rows, write_run, write_tiny_model
from tests.evals.conftest import unit

OWN, OTHER = 12, 30  # sequence lengths: the model's own, and another
SIZES = ((20, 60), (60, 20), (33, 40), (1, 50), (300, 7), (64, 64))  # width, height


def write_image(path, width, height, seed=0):
    """A smooth picture, so that it stays itself at every length."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A NaFlex model, one of fixed resolution, a captioner, a run, and images of many shapes."""
    path = tmp_path_factory.mktemp("naflex")
    text = dataclasses.replace(NAFLEX.text, context_length=16)
    model = dataclasses.replace(NAFLEX, text=text)
    write_tiny_model(path / "model", config=model)
    write_tiny_model(path / "fixed", config=TINY)
    write_run(model, path / "run")
    vision = dataclasses.replace(COCA.vision, image_size=32, max_patches=OWN)
    text = dataclasses.replace(COCA.text, context_length=20)
    write_tiny_model(path / "coca", config=dataclasses.replace(COCA, vision=vision, text=text))
    for i, size in enumerate(SIZES):
        write_image(path / f"photos/{i}.png", *size, seed=i)
    (path / "photos/broken.png").write_bytes(b"not an image")
    return path


@pytest.fixture
def run(capsys):
    """What a command prints: its JSON, or with another exit code its message."""

    def run(command, *args, code=0):
        capsys.readouterr()
        assert main([command, *map(str, args), "--json"]) == code
        printed = capsys.readouterr()
        return json.loads(printed.out) if code == 0 else " ".join(printed.err.split())

    return run


@pytest.mark.parametrize("place", ["model", "run"])
def test_a_model_is_loaded_at_any_length(place, folder):
    """From files and from a run, in this process and on a mesh, with the same weights."""
    own, other = load(folder / place), load(folder / place, tokens=OTHER)
    assert (own.tokens, other.tokens) == (OWN, OTHER)
    photos = [folder / f"photos/{i}.png" for i in range(len(SIZES))]
    images = other.preprocess(photos)
    assert isinstance(images, Patches)
    assert images.pixels.shape == (len(SIZES), OTHER, 3 * 8**2)
    assert (images.length > OWN).all()
    expected = unit(other.encode_image(images))
    difference = np.abs(unit(own.encode_image(own.preprocess(photos))) - expected).max()
    assert difference > 1e-3 or place == "run"  # whose weights are all alike
    again = own.with_tokens(OTHER)
    np.testing.assert_array_equal(unit(again.encode_image(again.preprocess(photos))), expected)
    alone = [other.encode_image(other.preprocess(photo)) for photo in photos]
    np.testing.assert_allclose(unit(np.concatenate(alone)), expected, atol=1e-6)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    sharded = load_on_mesh(folder / place, mesh, tokens=OTHER)
    assert (sharded.config, sharded.image_preprocess) == (other.config, other.image_preprocess)
    placed = Encoder(sharded.clip, sharded.params, mesh, sharded.image_preprocess, sharded.tokenize)
    packed = other.image_preprocess.batch
    np.testing.assert_allclose(placed.images(packed(photos[0])), expected[:1], atol=1e-6)


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


def test_a_decoder_writes_and_scores_captions_at_any_length(folder, tmp_path, run):
    args = ["--images", folder / "photos", "--caption", "--tokens", OTHER]
    results = run("predict", folder / "coca", *args)
    model = load(folder / "coca", tokens=OTHER)
    images = model.preprocess([row["image"] for row in results])
    assert [row["caption"] for row in results] == model.caption(images)
    write_classes(tmp_path / "data", SIZES[:3])
    args = ["--dataset", f"folder:{tmp_path / 'data'}", "--tasks", "likelihood"]
    values = run("evaluate", folder / "coca", *args, "--tokens", OTHER)
    assert values.keys() == {
        "tokens",
        "data/likelihood/acc1",
        "data/likelihood/roc_auc",
        "data/likelihood/mean_per_class_recall",
    }


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


def write_classes(root, shapes):
    """A data set of two colours with splits; its images have the given shapes in turn."""
    for i, split in enumerate(("train", "test")):
        for label, name in enumerate(("red", "blue")):
            for j, (width, height) in enumerate(shapes):
                path = root / split / name / f"{j}.png"
                write_image(path, width, height, seed=100 * label + 10 * i + j)


def test_every_task_names_its_length(folder, tmp_path, run):
    write_classes(tmp_path / "data", SIZES)
    args = ["--dataset", f"folder:{tmp_path / 'data'}", "--neighbours", 3]
    args += ["--tasks", "zero-shot", "probe", "neighbours"]
    values = {}
    for tokens in (OWN, OTHER):
        out = tmp_path / str(tokens)
        options = ["--output", out, "--tokens", tokens]
        values[tokens] = run("evaluate", folder / "model", *args, *options)
        assert values[tokens]["tokens"] == tokens
        assert values[tokens] == json.loads((out / "result.json").read_text())
        assert f"| model, {tokens} tokens |" in (out / "results.md").read_text()
        assert (out / "results.csv").read_text().splitlines()[0].endswith(",tokens")
    assert values[OWN].keys() == values[OTHER].keys()
    names = {"data/acc1", "data/linear_probe/acc1", "data/neighbours/acc1"}
    assert names < values[OWN].keys()
    assert "tokens=9 is for" in run("evaluate", folder / "fixed", *args, "--tokens", 9, code=2)


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


def test_the_digits_and_a_watched_run_name_their_length(folder, run):
    """A watcher evaluates at the length that its option sets."""
    digits = ["--dataset", "digits", "--images", 100]
    own = run("evaluate", folder / "run", *digits, "--tasks", "zero-shot", "neighbours")
    assert own["tokens"] == OWN
    assert {"digits/acc1", "digits/neighbours/acc1"} <= own.keys()
    watched = run("evaluate", folder / "run", *digits, "--tokens", OTHER, "--watch")
    assert watched["tokens"] == OTHER
    last = rows(folder / "run", WATCHED)[-1]
    assert (last["step"], last["tokens"]) == (2, OTHER)
    assert watched == {name: x for name, x in last.items() if name != "step"}


def encoder_at(folder, tokens):
    model = load(folder / "model", tokens=tokens)
    return Encoder(
        model.clip,
        model.params,
        make_mesh(MeshConfig()),
        model.image_preprocess,
        lambda texts: model.tokenize(texts, truncate=True),
    )


def test_decoded_images_are_kept_for_their_length_alone(folder, tmp_path):
    write_classes(tmp_path, SIZES)
    data, loads = open_folder(tmp_path / "test"), []

    def load_counted(index):
        loads.append(index)
        return data.load(index)

    counted = dataclasses.replace(data, load=load_counted)
    images, cache = [data.load(i)[0] for i in range(data.count)], ImageCache(1 << 20)
    for tokens in (OWN, OTHER, OWN):
        splits = Splits("data", lambda _: counted, encoder_at(folder, tokens), cache=cache)
        model = load(folder / "model", tokens=tokens)
        expected = unit(model.encode_image(model.preprocess(images)))
        np.testing.assert_allclose(splits.embedded("test").features, expected, atol=1e-6)
    assert len(loads) == 2 * data.count  # not read again for the last


def test_evaluators_in_training_name_their_length_and_mix_no_two(folder):
    """An evaluator that has read its pairs at one length reads them again at another."""
    source = DigitsConfig(split="test", digits=1)
    pairs = PairsEvalConfig(pairs=16, pool=8, data=DataConfig(source=source, crop="center"))
    configs = [pairs, DigitsEvalConfig(source=source, per_number=1)]
    evaluations = Evaluations(configs, steps=1)

    def measured(evaluations, tokens):
        return list(evaluations.run(1, encoder_at(folder, tokens), folder / "evals"))

    first, second = measured(evaluations, OWN), measured(evaluations, OTHER)
    assert [values["tokens"] for values in first + second] == [OWN] * 2 + [OTHER] * 2
    assert first[0]["info_nce"] != second[0]["info_nce"]
    assert second == measured(Evaluations(configs, steps=1), OTHER)
