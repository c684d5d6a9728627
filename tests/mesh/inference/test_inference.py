"""Evaluation and captioning with images of any aspect ratio, at any sequence length."""

import dataclasses
import functools
import json
from unittest import mock

import pytest

from clip_jax.checkpoints.retention import WATCHED
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.evals import datasets, linear_probe
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.evaluator import Evaluations
from clip_jax.evals.held_out_pairs import PairsEvalConfig
from clip_jax.inference.loading import load
from clip_jax.models.images import concatenate
from tests.conftest import COCA, TINY, rows, write_run, write_tiny_model
from tests.inference.conftest import (
    NAFLEX_16,
    OTHER,
    OWN,
    SIZES,
    assert_loads_at_any_length,
    encoder_at,
    write_classes,
    write_photos,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a NaFlex model, one of fixed resolution, a captioner, a run, and images to read."""
    path = tmp_path_factory.mktemp("naflex")
    write_tiny_model(path / "model", config=NAFLEX_16)
    write_tiny_model(path / "fixed", config=TINY)
    write_run(NAFLEX_16, path / "run")
    vision = dataclasses.replace(COCA.vision, image_size=32, max_patches=OWN)
    text = dataclasses.replace(COCA.text, context_length=20)
    write_tiny_model(path / "coca", config=dataclasses.replace(COCA, vision=vision, text=text))
    write_photos(path / "photos")
    return path


def test_a_run_is_loaded_at_any_length(folder):
    assert_loads_at_any_length(folder / "run", folder / "photos", least=0)


def test_a_decoder_writes_and_scores_captions_at_any_length(folder, tmp_path, run):
    args = ["--images", folder / "photos", "--caption", "--tokens", OTHER]
    results = run("predict", folder / "coca", *args)
    model = load(folder / "coca", tokens=OTHER)
    images = [model.image_preprocess.batch(row["image"]) for row in results]  # as bytes
    assert [row["caption"] for row in results] == model.caption(concatenate(images))
    write_classes(tmp_path / "data", SIZES[:3])
    args = ["--dataset", f"folder:{tmp_path / 'data'}", "--tasks", "likelihood"]
    values = run("evaluate", folder / "coca", *args, "--tokens", OTHER)
    assert values.keys() == {
        "tokens",
        "data/likelihood/acc1",
        "data/likelihood/roc_auc",
        "data/likelihood/mean_per_class_recall",
    }


def test_every_task_names_its_length(folder, tmp_path, run, monkeypatch):
    few = functools.partial(linear_probe.search, lambdas=[0.01, 1.0, 100.0])
    monkeypatch.setattr(linear_probe, "search", few)
    write_classes(tmp_path / "data", SIZES[:4])
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


@mock.patch.object(datasets, "_PER_NUMBER", 4)
def test_the_digits_and_a_watched_run_name_their_length(folder, run):
    """A watcher evaluates at the length of its own option, `--tokens`."""
    digits = ["--dataset", "digits", "--images", 100]
    own = run("evaluate", folder / "run", *digits, "--tasks", "zero-shot", "neighbours")
    assert own["tokens"] == OWN
    assert {"digits/acc1", "digits/neighbours/acc1"} <= own.keys()
    watched = run("evaluate", folder / "run", *digits, "--tokens", OTHER, "--watch")
    assert watched["tokens"] == OTHER
    last = rows(folder / "run", WATCHED)[-1]
    assert (last["step"], last["tokens"]) == (2, OTHER)
    assert watched == {name: x for name, x in last.items() if name != "step"}


def test_evaluators_in_training_name_their_length_and_mix_no_two(folder):
    """An evaluator reads its cached pairs again if the length has changed."""
    source = DigitsConfig(split="test", digits=1)
    pairs = PairsEvalConfig(pairs=16, pool=8, data=DataConfig(source=source, crop="center"))
    configs = [pairs, DigitsEvalConfig(source=source, per_number=1)]
    evaluations = Evaluations(configs, steps=1)

    def measured(evaluations, tokens):
        return list(evaluations.run(1, encoder_at(folder / "model", tokens), folder / "evals"))

    first, second = measured(evaluations, OWN), measured(evaluations, OTHER)
    assert [values["tokens"] for values in first + second] == [OWN] * 2 + [OTHER] * 2
    assert first[0]["info_nce"] != second[0]["info_nce"]
    assert second == measured(Evaluations(configs, steps=1), OTHER)
