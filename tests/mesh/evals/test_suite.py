"""Data sets that a run evaluates while training: `evaluate` of its checkpoint gives the same."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from clip_jax.checkpoints.retention import CheckpointConfig, named_step, steps_in
from clip_jax.cli.commands import main
from clip_jax.config import Config
from clip_jax.errors import InputError
from clip_jax.evals import reader
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.serialize import from_dict
from clip_jax.train import train
from tests.conftest import rows, tiny_digits


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """Write 19 pictures in three classes, which no mesh divides evenly, and a broken file."""
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
    for language, word in (("eng_Latn", "picture"), ("nob_Latn", "bilde")):  # all captions differ
        lines = "".join(f"{word} {i}\n" for i in range(len(files)))
        (captions / f"{language}.txt").write_text(lines)
    return root


@pytest.fixture(scope="module")
def run(animals, tmp_path_factory):
    """Train with evaluations at steps 3 and 6 and a checkpoint every five steps. Step 3 is saved
    only as the best one."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    checkpoint = CheckpointConfig(every_steps=5, best="animals/acc1")
    sets = (f"folder:{animals}", f"languages:{animals.parent / 'captions'}")
    evals = (SuiteEvalConfig(dataset=sets, every_steps=3),)
    config = tiny_digits(steps=6, evals=evals, checkpoint=checkpoint)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    return workdir, train(config, workdir)


def test_a_run_and_evaluate_give_the_same_digits_on_any_mesh(run, capsys, monkeypatch):
    workdir, result = run
    assert main(["evaluate", str(workdir), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values.keys() >= {
        *("animals/acc1", "animals/mean_per_class_recall"),
        *(f"captions/{x}/text_retrieval_recall@5" for x in ("eng_Latn", "nob_Latn", "mean")),
    }
    assert values == {name: result[name] for name in values}
    assert any(values.items() <= row.items() for row in rows(workdir))
    table = (workdir / "evals/results.md").read_text()
    assert f"| animals | acc1 | {100 * values['animals/acc1']:.1f} |" in table
    assert (workdir / "evals/animals/confusion.png").is_file()

    monkeypatch.setattr(reader, "_BATCH", 7)  # several batches, the last one padded
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    assert main(["evaluate", str(workdir), "--suite", "run", *mesh, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(values, abs=1e-6)


def test_options_are_those_of_the_runs_own_data_sets(run, animals, capsys):
    """With options, too, `evaluate` reads the run's data sets and not the bundled digits. If the
    run's config cannot be read, this is an error."""
    workdir, _ = run
    few = ["--images", "5", "--tasks", "zero-shot", "neighbours", "--json"]
    results = []
    for data in ([], ["--dataset", f"folder:{animals}"]):
        assert main(["evaluate", str(workdir), *data, *few]) == 0
        values = json.loads(capsys.readouterr().out)
        results.append({name: x for name, x in values.items() if name.startswith("animals/")})
    assert results[0] == results[1] != {}
    text = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(text[:-9])
    try:
        assert main(["evaluate", str(workdir)]) == 2
    finally:
        (workdir / "config.json").write_text(text)
    assert "config.json cannot be read" in capsys.readouterr().err


def test_the_best_so_far_is_saved_whenever_it_is_and_kept(run):
    workdir, _ = run
    results = {row["step"]: row["animals/acc1"] for row in rows(workdir) if "animals/acc1" in row}
    assert results.keys() == {3, 6}
    assert steps_in(workdir / "checkpoints") == [3, 5, 6]  # 3 is no multiple of 5
    assert results[named_step(workdir, "best")] == max(results.values())
    config = from_dict(Config, json.loads((workdir / "config.json").read_text()))
    unknown = dataclasses.replace(config, checkpoint=CheckpointConfig(best="imagenet1k/acc1"))
    with pytest.raises(InputError, match=r"which yield animals/\*"):
        train(unknown, workdir.parent / "other")
