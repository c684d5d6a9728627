"""Data sets while training: what a run writes is what `evaluate` of its checkpoint says."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax import sharding
from clip_jax.checkpoint import CheckpointConfig
from clip_jax.cli import main
from clip_jax.config import Config
from clip_jax.data.images import Preprocess
from clip_jax.evals import reader
from clip_jax.evals.datasets import open_folder
from clip_jax.evals.reader import Kept, Reader
from clip_jax.evals.tasks import SuiteEvalConfig
from clip_jax.refused import Refused
from clip_jax.retention import named_step, steps_in
from clip_jax.serialize import from_dict
from clip_jax.train import train
from tests.conftest import rows, tiny_digits


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """Nineteen pictures in three classes, and one file that is none: no mesh divides them."""
    root, rng = tmp_path_factory.mktemp("animals") / "animals", np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir(parents=True)
        for number in range(6 + (label == 1)):
            pixels = rng.integers(0, 256, (20, 24, 3), np.uint8) // (label + 1)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    (root / "cat" / "torn.png").write_bytes(b"\x89PNG")
    captions = root.parent / "captions"
    captions.mkdir()
    files = sorted(path for path in root.rglob("*.png") if path.stem != "torn")
    (captions / "filenames.txt").write_text("".join(f"{path}\n" for path in files))
    for language, word in (("eng_Latn", "picture"), ("nob_Latn", "bilde")):  # no two are alike
        lines = "".join(f"{word} {i}\n" for i in range(len(files)))
        (captions / f"{language}.txt").write_text(lines)
    return root


def suite(animals, **changes):
    sets = (f"folder:{animals}", f"languages:{animals.parent / 'captions'}")
    return SuiteEvalConfig(dataset=sets, every_steps=6, **changes)


@pytest.fixture(scope="module")
def run(animals, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    checkpoint = CheckpointConfig(every_steps=5, best="animals/acc1")
    config = tiny_digits(steps=12, evals=(suite(animals),), checkpoint=checkpoint)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    return workdir, train(config, workdir)


@pytest.mark.long
def test_a_run_and_evaluate_give_the_same_digits(run, capsys):
    workdir, result = run
    assert main(["evaluate", str(workdir), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values.keys() >= {
        *("animals/acc1", "animals/mean_per_class_recall"),
        *(f"captions/{x}/text_retrieval_recall@5" for x in ("eng_Latn", "nob_Latn", "mean")),
    }
    assert values == {name: result[name] for name in values}
    assert any(values.items() <= row.items() for row in rows(workdir))


def test_the_best_so_far_is_saved_whenever_it_is_and_kept(run):
    workdir, _ = run
    found = {row["step"]: row["animals/acc1"] for row in rows(workdir) if "animals/acc1" in row}
    assert found.keys() == {6, 12}
    assert steps_in(workdir / "checkpoints") == [6, 10, 12]  # 6 is no multiple of 5
    best = named_step(workdir, "best")
    assert found[best] == max(found.values())
    config = from_dict(Config, json.loads((workdir / "config.json").read_text()))
    unknown = dataclasses.replace(config, checkpoint=CheckpointConfig(best="imagenet1k/acc1"))
    with pytest.raises(Refused, match=r"which give animals/\*"):
        train(unknown, workdir.parent / "other")


@pytest.mark.parametrize("sizes", ["1", "8", "4x2", "2x2x2"])
def test_every_mesh_gives_the_same_numbers(run, animals, sizes, capsys, monkeypatch):
    monkeypatch.setattr(reader, "_BATCH", 7)  # several batches, the last one part empty
    workdir, result = run
    data, fsdp, tensor = ([int(x) for x in sizes.split("x")] + [1, 1])[:3]
    if sizes == "1":
        monkeypatch.setattr(jax, "devices", lambda *_, d=jax.devices()[:1]: d)
    mesh = ["--mesh.data", str(data), "--mesh.fsdp", str(fsdp), "--mesh.tensor", str(tensor)]
    assert main(["evaluate", str(workdir), "--suite", "run", *mesh, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == pytest.approx({name: result[name] for name in values}, abs=1e-6)


def test_images_are_decoded_once_and_kept_within_the_budget(animals):
    data, mesh = open_folder(animals), sharding.make_mesh(sharding.MeshConfig())
    loads = []
    counted = dataclasses.replace(data, load=lambda i: (loads.append(i), data.load(i))[1])
    images = Reader(counted, Preprocess(image_size=16), mesh, counted.count)
    for budget, times in ((1 << 20, 1), (16 * 16 * 3 * 10, 2)):
        loads.clear()
        kept = Kept(budget)
        first, second = (list(kept.read("animals", images)) for _ in range(2))
        assert sorted(loads) == sorted(list(range(20)) * times)
        np.testing.assert_array_equal(first[0].pixels, second[0].pixels)
        assert [len(share.answers) + len(share.skipped) for share in first] == [20]


def test_wrong_use_is_said_before_training(tmp_path):
    with pytest.raises(Refused, match="no data set 'imagenet'"):
        SuiteEvalConfig(dataset=("imagenet",)).make()
    with pytest.raises(Refused, match="imagenet1k is not in"):
        SuiteEvalConfig(dataset=("imagenet1k",), data_dir=str(tmp_path)).make()
    with pytest.raises(Refused, match=r"evals\.memory_mib=-1"):
        SuiteEvalConfig(memory_mib=-1)
