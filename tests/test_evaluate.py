"""`clip-jax evaluate` on data sets of every layout, on one and eight devices, with a real model."""

import csv
import functools
import io
import json
import shutil
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax import sharding
from clip_jax.cli import main
from clip_jax.config import Config
from clip_jax.convert.folder import write as write_model
from clip_jax.convert.weights import Weights, default_preprocess
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.evals import measure, reader, supervised
from clip_jax.evals.datasets import open_folder, open_webdataset
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.report import to_markdown
from clip_jax.evals.suite import SUITE
from clip_jax.evaluate import EvaluateConfig, _warn_of_other_numbers
from clip_jax.loading import load
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from tests.data.conftest import write_tar

CLASSES = ("dark", "grey", "light", "red", "blue", "green")
COLOURS = ((10,) * 3, (120,) * 3, (240,) * 3, (220, 20, 20), (20, 20, 220), (20, 200, 20))


def encoded(colour, rng):
    pixels = np.clip(np.array(colour) + rng.normal(0, 25, (20, 14, 3)), 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = CLIPConfig(
        embed_dim=16,
        vision=ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2),
        text=TextConfig(vocab_size=600, context_length=16, width=16, depth=1, num_heads=2),
        dtype="float32",
    )
    rng = np.random.default_rng(0)  # quicker than compiling the initialisation
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32),
        jax.eval_shape(CLIP(config).init, jax.random.key(0)),
    )
    path = tmp_path_factory.mktemp("model") / "tiny"
    preprocess = default_preprocess(config)
    write_model(Weights(config=config, params=params, preprocess=preprocess), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """41 images in six folders, one that is none; the same in tars; captions of some."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    members, captions = [], {"images": [], "annotations": []}
    for label in sorted(range(6), key=lambda c: CLASSES[c]):
        folder = root / "mine" / CLASSES[label]
        folder.mkdir(parents=True)
        for i in range(7 - (label == 0)):
            content = encoded(COLOURS[label], rng)
            (folder / f"{i}.png").write_bytes(content)
            members.append((content, sorted(CLASSES).index(CLASSES[label])))
            captions["images"].append({"id": len(members), "file_name": f"{folder}/{i}.png"})
            captions["annotations"] += [
                {"image_id": len(members), "caption": f"{CLASSES[label]} {i} {j}"}
                for j in range(1 + i % 3)
            ]
    (root / "mine" / "grey" / "broken.png").write_bytes(b"not an image")
    (root / "tars" / "test").mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(root / "tars" / "test" / f"{shard}.tar", "w") as file:
            for i, (content, label) in list(enumerate(members))[shard::2]:
                for name, body in ((f"{i:03d}.png", content), (f"{i:03d}.cls", b"%d" % label)):
                    info = tarfile.TarInfo(name)
                    info.size = len(body)
                    file.addfile(info, io.BytesIO(body))
    (root / "tars" / "classnames.txt").write_text("\n".join(sorted(CLASSES)))
    (root / "tars" / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.")
    (root / "flickr30k" / "images").mkdir(parents=True)
    (root / "flickr30k" / "flickr30k_test_karpathy.json").write_text(json.dumps(captions))
    return root


def encoder(model, devices, **sizes):
    loaded = load(model)
    mesh = sharding.make_mesh(sharding.MeshConfig(**sizes), jax.devices()[:devices])
    params = jax.device_put(loaded.params, sharding.replicated(mesh))
    return Encoder(
        loaded.clip, params, mesh, loaded.image_preprocess, lambda t: loaded.tokenize(t, True)
    )


def classify(data, encoder):
    return measure.classify(data, embedded(data, encoder), encoder)


def embedded(data, encoder):
    return measure.Splits("data", lambda split: data, encoder).embedded("test")


def test_a_folder_gives_the_same_numbers_on_a_mesh(model, data, monkeypatch):
    monkeypatch.setattr(reader, "_BATCH", 17)
    folder = open_folder(data / "mine")
    one = classify(folder, encoder(model, 1))
    assert len(one.labels) == 41
    assert one.skipped[0].startswith(f"{data}/mine/")
    assert one.logits.std(axis=0).min() > 3e-3  # images differ far beyond the tolerance below
    other = classify(folder, encoder(model, 8, data=2, fsdp=2, tensor=2))
    assert other.values == pytest.approx(one.values, abs=1e-6)
    np.testing.assert_allclose(other.logits, one.logits, atol=1e-5)
    np.testing.assert_array_equal(other.labels, one.labels)


def test_tars_give_the_numbers_of_the_folder(model, data):
    tars = classify(open_webdataset(data / "tars"), encoder(model, 8))
    folder = classify(open_folder(data / "mine"), encoder(model, 8))
    assert sorted(tars.labels) == sorted(folder.labels)
    assert tars.values == pytest.approx(folder.values, abs=1e-6)


def test_a_bad_label_in_a_tar_is_skipped_and_named(model, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("dark\nlight\n")
    image = encoded(COLOURS[0], np.random.default_rng(0))
    members = [(f"{i}.png", image) for i in range(4)]
    members += [("0.cls", b"1"), ("1.cls", b"2"), ("2.cls", b"x")]
    write_tar(tmp_path / "test" / "0.tar", sorted(members))
    images = embedded(open_webdataset(tmp_path), encoder(model, 1))
    assert images.answers == [1]
    assert images.skipped == [
        f"{tmp_path}/test/0.tar:1: .cls is '2', not a number below 2",
        f"{tmp_path}/test/0.tar:2: .cls is 'x', not a number below 2",
        f"{tmp_path}/test/0.tar:3: no .cls member",
    ]


def test_the_command_writes_tables_and_pictures(model, data, tmp_path, capsys):
    templates = tmp_path / "mine.txt"
    templates.write_text("a photo of a {c}.\n{c}\nthe colour {c}\n")
    out = tmp_path / "out"
    args = ["--dataset", f"folder:{data / 'mine'}", "--templates", str(templates)]
    assert main(["evaluate", str(model), *args, "--output", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert "mine/grey/broken.png: not an image" in printed.err
    assert values == json.loads((out / "result.json").read_text())
    assert {f"mine/{name}" for name in ("acc1", "acc5", "mean_per_class_recall",
            "templates/spread", "templates/gain")} <= values.keys()  # fmt: skip
    row, = csv.DictReader(io.StringIO((out / "results.csv").read_text()))  # fmt: skip
    assert (row["dataset"], row["task"], row["model"]) == (
        "mine",
        "zeroshot_classification",
        "tiny",
    )
    assert float(row["acc1"]) == values["mine/acc1"]
    assert f"| mine | acc1 | {100 * values['mine/acc1']:.1f} |" in (out / "results.md").read_text()
    for name in ("classes", "confusion", "errors"):
        with Image.open(out / "mine" / f"{name}.png") as picture:
            assert picture.width > 200


@pytest.fixture(scope="module")
def splits(data, tmp_path_factory):
    """The folder of `data` as a training split, half of it as a test split too."""
    root = tmp_path_factory.mktemp("splits") / "colours"
    for folder in (data / "mine").iterdir():
        for split, files in (("train", "[0-6].png"), ("test", "[1-3].png")):
            (root / split / folder.name).mkdir(parents=True)
            for file in folder.glob(files):
                shutil.copy(file, root / split / folder.name)
    return root


def test_every_task_on_a_folder_with_splits(model, splits, tmp_path, monkeypatch, capsys):
    few = functools.partial(supervised.search, lambdas=np.logspace(-2, 2, 3))
    monkeypatch.setattr(supervised, "search", few)
    templates = tmp_path / "mine.txt"
    templates.write_text("a photo of a {c}.\n{c}\nthe colour {c}\n")
    out = tmp_path / "out"
    args = ["--dataset", f"folder:{splits}", "--templates", str(templates), "--output", str(out)]
    tasks = ["--tasks", "zero-shot", "templates", "probe", "few-shot", "neighbours", "alignment"]
    assert main(["evaluate", str(model), *args, *tasks, "--shots", "9", "--json"]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    names = {"acc1", "linear_probe/acc1", "linear_probe/lambda",
             "neighbours/acc1", "templates/spread", "templates/gain", "templates/selected",
             "template/{c}", "template/the colour {c}"}  # fmt: skip
    assert {f"colours/{name}" for name in names} <= values.keys()
    assert "colours: few-shot of 9 left out: a class has fewer" in printed.err
    assert "colours: alignment is for images with captions" in printed.err
    chosen = (out / "colours" / "templates.txt").read_text().splitlines()
    assert f"chosen on validation images: {'; '.join(chosen)}" in printed.err
    rows = list(csv.reader((out / "colours" / "templates.csv").read_text().splitlines()))
    assert rows[0] == ["template", "acc1"]
    assert {row[0]: float(row[1]) for row in rows[1:]} == {
        name.removeprefix("colours/template/"): value
        for name, value in values.items() if name.startswith("colours/template/")
    }  # fmt: skip
    results = csv.DictReader((out / "results.csv").read_text().splitlines())
    tasks = {row["task"]: row for row in results}
    assert float(tasks["linear_probe"]["lp_acc1"]) == values["colours/linear_probe/acc1"]
    assert tasks["zeroshot_classification"]["lp_acc1"] == ""
    assert "| colours | linear_probe/acc1 | " in (out / "results.md").read_text()


def test_the_digits_take_every_task(model, tmp_path, capsys):
    few = ["--digits.per-number", "1", "--digits.source.digits", "1", "--pool", "16"]
    tasks = ["--tasks", "zero-shot", "templates", "neighbours", "alignment"]
    out = ["--output", str(tmp_path)]
    assert main(["evaluate", str(model), *few, *tasks, *out, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert {"zero_shot/seen/top1", "digits/acc1", "digits/templates/gain", "digits/neighbours/acc1",
            "info_nce", "modality_gap"} <= values.keys()  # fmt: skip
    for name in ("predictions.png", "digits/confusion.png", "results.md"):
        assert (tmp_path / name).exists()


def test_a_task_without_its_split_is_named_and_the_others_run(model, data, capsys):
    args = ["--dataset", f"folder:{data / 'mine'}", "--tasks", "zero-shot", "probe", "templates"]
    assert main(["evaluate", str(model), *args, "--json"]) == 0
    printed = capsys.readouterr()
    assert "mine/acc1" in json.loads(printed.out)
    assert f"probe left out: {data / 'mine'} has no train split" in printed.err
    assert "templates left out: mine has not two templates" in printed.err
    assert main(["evaluate", str(model), *args[:2], "--tasks", "probe"]) == 2
    assert "nothing could be measured with --tasks probe" in capsys.readouterr().err


def test_pairs_that_differ_in_order(model, data, tmp_path, capsys):
    files = sorted((data / "mine").glob("*/1.png"))
    cases = [
        {"image_path": str(file), "bbox_x": 1, "bbox_y": 1, "bbox_w": 9, "bbox_h": 9,
         "true_caption": f"{file.parent.name} on white", "relation_name": "on",
         "false_caption": f"white on {file.parent.name}"} for file in files
    ]  # fmt: skip
    path = tmp_path / "visual_genome_relation.json"
    path.write_text(json.dumps(cases))
    assert main(["evaluate", str(model), "--dataset", f"aro:{path}", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values) == {"visual_genome_relation/acc", "visual_genome_relation/acc_macro"}

    # The same by hand: the nearer of the two captions.
    parts, loaded = encoder(model, 1), load(model)
    crops = [Image.open(file).crop((1, 1, 10, 10)) for file in files]
    images = parts.images(np.stack([loaded.image_preprocess(x) for x in crops]))
    own, other = (
        (images * parts.texts([case[f"{kind}_caption"] for case in cases])).sum(axis=1)
        for kind in ("true", "false")
    )
    assert values["visual_genome_relation/acc"] == pytest.approx((own > other).mean())


def test_voc_is_measured_by_eleven_points(model, data, tmp_path, capsys):
    folder = tmp_path / "voc2007_multilabel"
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "JPEGImages").mkdir()
    files = sorted((data / "mine").glob("*/[1-3].png"))
    for number, file in enumerate(files):
        shutil.copy(file, folder / "JPEGImages" / f"{number:06d}.jpg")  # Pillow looks inside
    for place in range(20):
        marks = "".join(f"{i:06d} {1 if i % 20 == place else -1:2d}\n" for i in range(len(files)))
        (folder / "ImageSets" / "Main" / f"class{place:02d}_test.txt").write_text(marks)
    out = tmp_path / "out"
    args = ["--dataset", "voc2007_multilabel", "--data-dir", str(tmp_path), "--output", str(out)]
    assert main(["evaluate", str(model), *args, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    names = {"mean_average_precision", "mean_average_precision_11"}
    assert set(values) == {f"voc2007_multilabel/{name}" for name in names}
    found = 100 * values["voc2007_multilabel/mean_average_precision_11"]
    row = f"| voc2007_multilabel | mean_average_precision_11 | {found:.1f} |"
    assert row in (out / "results.md").read_text()


def test_captions_are_aligned(model, data, capsys):
    args = ["--dataset", "flickr30k", "--data-dir", str(data), "--tasks", "alignment"]
    assert main(["evaluate", str(model), *args, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["flickr30k/info_nce_pool"] == 41
    assert {"flickr30k/alignment", "flickr30k/modality_gap"} <= values.keys()


def test_published_numbers_stand_beside(tmp_path):
    outcome = measure.Outcome(
        "zeroshot_classification", {"acc1": 0.5, "mean_per_class_recall": 0.4}
    )
    probe = measure.Outcome("linear_probe", {"linear_probe/acc1": 0.8})
    rows = to_markdown([("pets", outcome), ("cifar10", outcome), ("cifar10", probe)], "mine")
    assert rows.splitlines()[2:] == [
        "| pets | mean_per_class_recall | 40.0 | 85.3 | 87.0 | 88.9 | 93.2 | 93.7 |",
        "| cifar10 | acc1 | 50.0 | 71.6 | 89.8 | 90.8 | 95.6 | 94.9 |",
        "| cifar10 | linear_probe/acc1 | 80.0 |  |  |  |  |  |",
    ]


def test_a_suite_runs_what_is_there_and_names_the_rest(model, data, tmp_path, capsys):
    (tmp_path / "flickr30k").symlink_to(data / "flickr30k")
    for number in range(10):
        (tmp_path / "mnist" / str(number)).mkdir(parents=True)
    (tmp_path / "mnist" / "0" / "broken.png").write_bytes(b"not an image")
    args = ["--suite", "clip", "--data-dir", str(tmp_path), "--json"]
    assert main(["evaluate", str(model), *args]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert {name.partition("/")[0] for name in values} == {"flickr30k"}
    assert 0 < values["flickr30k/text_retrieval_recall@10"] < 1
    assert "left out: cifar10 is not in" in printed.err
    assert "left out: mnist: none of 1 images can be read" in printed.err
    assert "tensorflow_datasets build cifar10" in printed.err


def test_wrong_use_is_explained(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()
    for args, says in (
        (["--dataset", "nonsense"], "no data set 'nonsense'"),
        (["--dataset", "zip:x"], "is of no known kind"),
        (["--dataset", "folder:nowhere"], "there is no folder nowhere"),
        (["--dataset", f"folder:{tmp_path}"], "has no test split; put it in"),
        (["--dataset", "webdataset:nowhere"], "there are no tars in nowhere/test"),
        (["--dataset", "aro:nowhere.json"], "nowhere.json cannot be read as JSON"),
        (["--dataset", "cifar10"], "cifar10 is not in data: "),
        (["--templates", "nowhere.txt"], "nowhere.txt cannot be read as text"),
        (
            ["--suite", "clip", "--data-dir", str(tmp_path)],
            f"none of the suite's {len(SUITE)} data sets",
        ),
    ):
        assert main(["evaluate", str(model), *args]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"), [(["--shots", "0"], "shots=(0,)"), (["--pool", "1"], "pool=1 must be at")]
)
def test_wrong_numbers_are_explained(args, says, model, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(model), *args])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_a_run_that_learned_other_numbers_is_told_apart(tmp_path, capsys):
    config = EvaluateConfig(model=tmp_path)
    for digits, says in ((2, ""), (4, "data.source.digits=4, this measures --digits.source.dig")):
        run = Config(data=DataConfig(source=DigitsConfig(digits=digits)))
        _warn_of_other_numbers(config, run)
        said = capsys.readouterr().err
        assert says in said
        assert bool(says) == bool(said)


def test_digits_measure_word_order(model):
    config = DigitsEvalConfig(per_number=1, max_numbers=9)
    parts = encoder(model, 8)
    values = dict(config.make().run(parts))
    for split in ("seen", "unseen"):
        assert 0 <= values[f"zero_shot/{split}/order"] <= 1
