"""`clip-jax evaluate` on data sets of every layout, on one and eight devices, with a real model."""

import csv
import functools
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from clip_jax.cli.commands import main
from clip_jax.config import Config
from clip_jax.convert.model_folder import write as write_model
from clip_jax.convert.weights import Weights, default_preprocess
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.errors import InputError
from clip_jax.evals import datasets, linear_probe, reader
from clip_jax.evals.catalog import SUITE
from clip_jax.evals.datasets import Tagged, open_folder
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.held_out_pairs import PairsEvalConfig
from clip_jax.evals.prompts import ensemble
from clip_jax.evals.reader import Outcome, Splits
from clip_jax.evals.results import to_markdown, to_table
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.evals.zero_shot import classify, multi_label, zero_shot
from clip_jax.inference.evaluate import (
    EvaluateConfig,
    Evaluators,
    _of_run,
    _suite,
    config_of_run,
)
from tests.evals.conftest import SMALL, drawn, encoder_on, mesh_of, png


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    weights = Weights(config=SMALL, params=drawn(), preprocess=default_preprocess(SMALL))
    write_model(weights, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """41 images in six folders, one that is none; captions of all."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    captions = {"images": [], "annotations": []}
    for name in ("blue", "dark", "green", "grey", "light", "red"):
        colour = rng.integers(0, 256, 3)
        (root / "mine" / name).mkdir(parents=True)
        for i in range(7 - (name == "dark")):
            pixels = np.clip(colour + rng.normal(0, 25, (20, 14, 3)), 0, 255)
            file, number = root / "mine" / name / f"{i}.png", len(captions["images"])
            file.write_bytes(png(pixels.astype(np.uint8)))
            captions["images"].append({"id": number, "file_name": str(file)})
            texts = [f"{name} {i} {j}" for j in range(1 + i % 3)]
            captions["annotations"] += [{"image_id": number, "caption": text} for text in texts]
    (root / "mine" / "grey" / "broken.png").write_bytes(b"not an image")
    (root / "flickr30k" / "images").mkdir(parents=True)
    (root / "flickr30k" / "flickr30k_test_karpathy.json").write_text(json.dumps(captions))
    return root


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """The digits have four images of each number: to draw them takes longest."""
    monkeypatch.setattr(datasets, "_PER_NUMBER", 4)


@pytest.fixture
def evaluate(model, capsys):
    """What the command measures, and what it says on standard error."""

    def run(*args):
        assert main(["evaluate", str(model), *map(str, args), "--json"]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out), printed.err

    return run


def embedded(data, encoder):
    return Splits("data", lambda split: data, encoder).embedded("test")


def test_a_folder_gives_the_same_numbers_on_a_mesh(data, monkeypatch):
    monkeypatch.setattr(reader, "_BATCH", 17)
    folder = open_folder(data / "mine")
    encoders = encoder_on(mesh_of(1)), encoder_on(mesh_of(8, data=2, fsdp=2, tensor=2))
    one, other = (classify(folder, embedded(folder, x), x) for x in encoders)
    assert one.logits is not None
    assert other.logits is not None
    assert len(one.labels) == 41
    assert one.skipped[0].startswith(f"{data}/mine/")
    assert one.logits.std(axis=0).min() > 3e-3  # images differ far beyond the tolerance below
    assert other.values == pytest.approx(one.values, abs=1e-6)
    np.testing.assert_allclose(other.logits, one.logits, atol=1e-5)
    np.testing.assert_array_equal(other.labels, one.labels)


def test_every_task_on_a_folder_with_splits(evaluate, data, tmp_path, monkeypatch):
    """What it prints is in tables and pictures, too."""
    few = functools.partial(linear_probe.search, lambdas=[0.01, 1.0, 100.0])
    monkeypatch.setattr(linear_probe, "search", few)
    for split, files in (("train", "[0-6].png"), ("test", "[1-3].png")):
        for file in (data / "mine").glob(f"*/{files}"):
            copy = tmp_path / "colours" / split / file.parent.name / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    templates, out = tmp_path / "mine.txt", tmp_path / "out"
    templates.write_text("a photo of a {c}.\n{c}\nthe colour {c}\n")
    args = ["--dataset", f"folder:{tmp_path / 'colours'}", "--templates", templates]
    tasks = ["--tasks", "zero-shot", "probe", "few-shot", "neighbours", "captions"]
    values, errors = evaluate(*args, *tasks, "--shots", 9, "--output", out)
    names = {
        "acc1",
        "acc5",
        "mean_per_class_recall",
        "linear_probe/acc1",
        "linear_probe/lambda",
        "neighbours/acc1",
        "templates/spread",
        "templates/gain",
    }
    assert {f"colours/{name}" for name in names} <= values.keys()
    assert values == json.loads((out / "result.json").read_text())
    assert "colours: few-shot of 9 left out: a class has fewer" in errors
    assert "colours: captions left out: the images have no captions" in errors
    table = csv.DictReader((out / "colours/templates.csv").read_text().splitlines())
    alone = [float(row["acc1"]) for row in table]
    assert len(alone) == 3
    assert np.mean(alone) == pytest.approx(values["colours/templates/mean"])
    results = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert {(row["dataset"], row["model"]) for row in results} == {("colours", "tiny")}
    rows = {row["task"]: row for row in results}
    assert float(rows["linear_probe"]["lp_acc1"]) == values["colours/linear_probe/acc1"]
    assert float(rows["zeroshot_classification"]["acc1"]) == values["colours/acc1"]
    assert rows["zeroshot_classification"]["lp_acc1"] == ""
    report = (out / "results.md").read_text()
    assert f"| colours | acc1 | {100 * values['colours/acc1']:.1f} |" in report
    assert "| colours | linear_probe/acc1 | " in report
    by_class = list(csv.DictReader((out / "colours/classes.csv").read_text().splitlines()))
    accuracies = [float(row["acc1"]) for row in by_class]
    assert accuracies == sorted(accuracies)
    assert np.mean(accuracies) == pytest.approx(values["colours/mean_per_class_recall"])
    assert {row["class"] for row in by_class} == {path.name for path in (data / "mine").iterdir()}
    of_probe = csv.DictReader((out / "colours/linear_probe/images.csv").read_text().splitlines())
    right = [float(row["acc1"]) for row in of_probe]
    assert np.mean(right) == pytest.approx(values["colours/linear_probe/acc1"])
    for name in ("confusion", "errors"):
        with Image.open(out / f"colours/{name}.png") as picture:
            assert picture.width > 200


def test_the_digits_take_every_task(evaluate):
    few = ["--dataset", "digits", "--images", 100]
    values, _ = evaluate(*few, "--tasks", "zero-shot", "neighbours")
    assert {"digits/acc1", "digits/templates/gain", "digits/neighbours/acc1"} <= values.keys()


def test_several_widths_are_evaluated_in_one_command(evaluate, tmp_path):
    few = ["--dataset", "digits", "--images", 100, "--tasks", "zero-shot", "neighbours"]
    values, _ = evaluate(*few, "--dim", 4, 8, "--output", tmp_path)
    each = {dim: evaluate(*few, "--dim", dim)[0] for dim in (4, 8)}
    assert values == {f"{dim}/{name}": x for dim, row in each.items() for name, x in row.items()}
    assert each[4] != each[8]
    assert json.loads((tmp_path / "result.json").read_text()) == values
    assert json.loads((tmp_path / "8/result.json").read_text()) == each[8]
    with pytest.raises(InputError, match="watch evaluates one width"):
        EvaluateConfig(model=tmp_path, watch=True, dim=(4, 8))


def test_a_model_without_evaluators_has_those_of_a_run_on_digits(evaluate, model, tmp_path):
    """One name, one number: the same images as in training."""
    values, _ = evaluate("--output", tmp_path)
    run = Config(evals=(DigitsEvalConfig(),))
    assert values == Evaluators(EvaluateConfig(model=model), run).run(encoder_on(mesh_of(8)), None)
    assert "zero_shot/seen/top1" in values
    assert (tmp_path / "predictions.png").exists()


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A model of finite weights whose image features are near float32's largest number."""
    path, params = tmp_path_factory.mktemp("model") / "huge", drawn()
    params["visual"]["ln_post"]["scale"] *= np.float32(1e37)
    write_model(Weights(config=SMALL, params=params, preprocess=default_preprocess(SMALL)), path)
    return path


@pytest.mark.parametrize("task", ["zero-shot", "probe", "few-shot", "neighbours"])
def test_features_that_overflow_are_counted_and_measure_nothing(
    task, overflowing, data, tmp_path, capsys
):
    """Comparisons with NaN are false, so such a model was right everywhere."""
    for split in ("train", "test"):
        shutil.copytree(data / "mine", tmp_path / "mine" / split)
    args = ["--dataset", f"folder:{tmp_path / 'mine'}", "--tasks", task, "--shots", "2"]
    assert main(["evaluate", str(overflowing), *args]) == 2
    captured = capsys.readouterr()
    assert re.search(r"\d+ of \d+ rows of .* are not finite", captured.err)
    assert captured.out == ""


@pytest.mark.parametrize(
    "args",
    [
        ["--dataset", "flickr30k", "--data-dir", "DATA"],
        [],
        ["--dataset", "digits", "--images", "100"],
        ["--suite", "clip", "--data-dir", "DATA"],
    ],
)
def test_no_evaluator_measures_what_is_not_finite(args, overflowing, data, capsys):
    args = [str(data) if x == "DATA" else x for x in args]
    assert main(["evaluate", str(overflowing), *args]) == 2
    assert re.search(r"[\d,]+ of [\d,]+ rows of .* are not finite", capsys.readouterr().err)


def test_a_task_without_its_split_is_named_and_the_others_run(evaluate, model, data, capsys):
    args = ["--dataset", f"folder:{data / 'mine'}", "--tasks"]
    values, errors = evaluate(*args, "zero-shot", "probe")
    assert "mine/acc1" in values
    assert "mine/grey/broken.png: not an image" in errors
    assert f"probe left out: {data / 'mine'} has no train split" in errors
    assert main(["evaluate", str(model), *args, "probe"]) == 2
    assert "nothing could be measured with --tasks probe" in capsys.readouterr().err


def test_pairs_that_differ_in_order(evaluate, data, tmp_path):
    files = sorted((data / "mine").glob("*/1.png"))
    cases = [
        {
            "image_path": str(file),
            "bbox_x": 1,
            "bbox_y": 1,
            "bbox_w": 9,
            "bbox_h": 9,
            "true_caption": f"{file.parent.name} on white",
            "relation_name": "on",
            "false_caption": f"white on {file.parent.name}",
        }
        for file in files
    ]
    path = tmp_path / "aro_relation/visual_genome_relation.json"
    path.parent.mkdir()
    path.write_text(json.dumps(cases))
    values, _ = evaluate("--dataset", "aro_relation", "--data-dir", tmp_path)
    assert set(values) == {"aro_relation/acc", "aro_relation/acc_macro"}

    # The same by hand: the nearer of the two captions.
    encoder = encoder_on(mesh_of(1))
    crops = [Image.open(file).crop((1, 1, 10, 10)) for file in files]
    images = encoder.images(np.stack([encoder.preprocess(x) for x in crops]))
    own, other = (
        (images * encoder.texts([case[f"{kind}_caption"] for case in cases])).sum(axis=1)
        for kind in ("true", "false")
    )
    assert values["aro_relation/acc"] == pytest.approx((own > other).mean())


def test_images_of_any_number_of_classes_are_ranked_for_each():
    def load(i):
        return np.full((16, 16, 3), 40 * i, np.uint8), np.array([1, -1 + i % 3], np.int8)

    tagged, encoder = Tagged(6, load, ["dark", "red"], ["a {c}", "{c}"]), encoder_on(mesh_of(1))
    images = embedded(tagged, encoder)
    classes = ensemble(encoder.classes(tagged.templates, tagged.names))
    expected = multi_label(images.features @ classes.T, images.labels)
    assert zero_shot(tagged, images, encoder).values == pytest.approx(expected)
    assert len(expected) == 2


def test_published_numbers_stand_beside():
    values = {"acc1": 0.5, "mean_per_class_recall": 0.4}
    outcome = Outcome("zeroshot_classification", values)
    probe = Outcome("linear_probe", {"linear_probe/acc1": 0.8})
    values = {"mean_average_precision": 0.5, "mean_average_precision_11": 0.6}
    voc = Outcome("zeroshot_classification", values)
    outcomes = [("pets", outcome), ("cifar10", outcome), ("cifar10", probe)]
    rows = to_markdown([*outcomes, ("voc2007_multilabel", voc)], "mine")
    assert rows.splitlines()[2:] == [
        "| pets | mean_per_class_recall | 40.0 | 85.3 | 87.0 | 88.9 | 93.2 | 93.7 |",
        "| cifar10 | acc1 | 50.0 | 71.6 | 89.8 | 90.8 | 95.6 | 94.9 |",
        "| cifar10 | linear_probe/acc1 | 80.0 |  |  |  |  |  |",
        "| voc2007_multilabel | mean_average_precision_11 | 60.0 |  |  |  |  |  |",
    ]


def test_a_suite_runs_what_is_there_and_names_the_rest(evaluate, data, tmp_path):
    (tmp_path / "flickr30k").symlink_to(data / "flickr30k")
    for number in range(10):
        (tmp_path / "mnist" / str(number)).mkdir(parents=True)
    (tmp_path / "mnist" / "0" / "broken.png").write_bytes(b"not an image")
    args = ["--suite", "clip", "--data-dir", tmp_path, "--tasks", "zero-shot"]
    values, errors = evaluate(*args)
    assert {name.partition("/")[0] for name in values} == {"flickr30k"}
    assert 0 < values["flickr30k/text_retrieval_recall@10"] < 1
    assert "left out: cifar10 is not in" in errors
    assert "left out: mnist: none of 1 images can be read" in errors
    assert "tensorflow_datasets build cifar10" in errors


def test_a_model_is_evaluated_beside_the_original(evaluate, model, data, tmp_path, capsys):
    """Results of both and the difference, in one table and in one file."""
    own = Weights(config=SMALL, params=drawn(scale=0.4), preprocess=default_preprocess(SMALL))
    write_model(own, tmp_path / "original")
    args = ["--dataset", f"folder:{data / 'mine'}", "--output", tmp_path / "out"]
    values, _ = evaluate(*args, "--beside", tmp_path / "original")
    assert json.loads((tmp_path / "out/result.json").read_text()) == values
    other = json.loads((tmp_path / "out/original/result.json").read_text())
    assert main(["evaluate", str(tmp_path / "original"), *map(str, args[:2]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == other
    for name, value in other.items():
        assert values[f"original/{name}"] == value
        assert values[f"change/{name}"] == values[name] - value
    assert len(values) == 3 * len(other)
    lines = [line.split() for line in to_table(values).splitlines()[1:]]
    assert lines[0] == ["metric", "model", "original", "change"]
    cells = (values["mine/acc1"], other["mine/acc1"], values["change/mine/acc1"])
    assert lines[2] == ["mine/acc1", *(f"{x:.4f}" for x in cells)]
    assert len(lines) == 2 + len(other)
    with pytest.raises(InputError, match="omit --beside"):
        EvaluateConfig(model=model, watch=True, beside=model)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--dataset", "nonsense"], "no data set 'nonsense'"),
        (["--dataset", "zip:x"], "no data set 'zip:x'"),
        (["--dataset", "folder:nowhere"], "there is no folder nowhere"),
        (["--dataset", "folder:."], "has no test split; put it in"),
        (["--dataset", "webdataset:nowhere"], "there are no tars in nowhere/test"),
        (["--dataset", "cifar10"], "cifar10 is not in data: "),
        (["--dataset", "digits", "--templates", "no.txt"], "no.txt cannot be read as text"),
        (["--tasks", "probe"], "--tasks: the evaluators of .* have no such option; use .* digits"),
        (["--suite", "clip", "--data-dir", "."], f"none of the suite's {len(SUITE)} data sets"),
        (["--suite", "run"], "is no run with evaluators"),
    ],
)
def test_wrong_use_is_explained(args, says, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()
    assert main(["evaluate", str(model), *args]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_options_count_more_than_what_the_run_has(model, tmp_path):
    assert config_of_run(model) is None  # whose config.json is a model's
    run = Config(evals=(DigitsEvalConfig(),))
    pairs = Config(evals=(PairsEvalConfig(),))
    ask = functools.partial(EvaluateConfig, model=tmp_path)
    for config, of, suite in (
        (ask(), run, "run"),
        (ask(), None, "run"),
        (ask(dataset=("digits",)), run, "clip"),
        (ask(data_dir="here"), run, "clip"),
        (ask(images=9, suite="clip"), pairs, "clip"),
    ):
        assert _suite(config, of) == suite
    own = Config(evals=(PairsEvalConfig(), SuiteEvalConfig()))
    assert [getattr(x, "images", None) for x in _of_run(ask(images=9), own)] == [None, 9]
    tasks = (SuiteEvalConfig(), SuiteEvalConfig(tasks=("probe",)))  # each has its metrics
    with pytest.raises(InputError, match=r"evals\.0 and evals\.1 both measure"):
        _of_run(ask(tasks=("neighbours",)), Config(evals=tasks))
    with pytest.raises(InputError, match=r"--images: the evaluators of .* have no such option"):
        _of_run(ask(images=9), pairs)
    source = DigitsConfig(digits=4)
    (digits,) = _of_run(ask(), Config(data=DataConfig(source=source), evals=()))
    assert digits == DigitsEvalConfig(source=source)
    for wrong in ({"shots": (0,)}, {"images": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EvaluateConfig(model=tmp_path, **wrong)
