"""`evaluate RUN --watch`: each checkpoint once, whatever is killed, and none deleted meanwhile."""

import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from clip_jax import files, watch
from clip_jax.checkpoint import Checkpoints
from clip_jax.cli import main
from clip_jax.config import Config
from clip_jax.evals.tasks import SuiteEvalConfig
from clip_jax.evaluate import EvaluateConfig, evaluate
from clip_jax.models.clip import CLIP
from clip_jax.optim import OptimConfig
from clip_jax.retention import WATCH, WATCHED, named_step, steps_in
from clip_jax.scaling import table
from clip_jax.serialize import to_dict
from clip_jax.workdir import Claim
from tests import watching
from tests.conftest import TINY, rows
from tests.forks import Forks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as `train` leaves it, with three checkpoints of made-up weights."""
    root, rng = tmp_path_factory.mktemp("watch"), np.random.default_rng(0)
    for label, name in enumerate("abc"):
        (root / "animals" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8) // (label + 1)
            Image.fromarray(pixels).save(root / "animals" / name / f"{number}.png")
    evals = (SuiteEvalConfig(dataset=(f"folder:{root / 'animals'}",)),)
    config = Config(model=TINY, steps=6, evals=evals, optim=OptimConfig(warmup_steps=1))
    files.write_whole(root / "run/config.json", json.dumps(to_dict(config)))
    result = {"step": 6, "samples_seen": 6144}
    files.write_whole(root / "run/result.json", json.dumps(result))
    shapes = jax.eval_shape(CLIP(TINY).init, jax.random.key(0))
    checkpoints = Checkpoints(root / "run/checkpoints", config.checkpoint)
    for step in (2, 4, 6):
        params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(x.dtype), shapes)
        checkpoints.save(step, {"params": jax.device_put(params)}, {"samples": step})
    checkpoints.close()
    return root / "run"


@pytest.fixture(scope="module")
def known(run):
    """What `evaluate` says of each step."""
    return {step: evaluate(EvaluateConfig(model=Path(f"{run}@{step}"))) for step in (2, 4, 6)}


@pytest.fixture
def workdir(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def opened(monkeypatch):
    """The steps that were read."""
    steps, plain = [], watch.open_encoder
    monkeypatch.setattr(
        watch, "open_encoder",
        lambda config, run: (steps.append(config.model.name), plain(config, run))[1],
    )  # fmt: skip
    return steps


def watched(workdir) -> dict[int, dict]:
    """What was found, by step; a step that stands there twice is an error."""
    found = rows(workdir, WATCHED)
    assert len({row["step"] for row in found}) == len(found)
    return {row["step"]: row for row in found}


@pytest.mark.long
def test_every_checkpoint_is_evaluated_once(workdir, known, opened, capsys):
    assert main(["evaluate", str(workdir), "--watch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == known[6]
    result = json.loads((workdir / "result.json").read_text())
    assert result == {"step": 6, "samples_seen": 6144} | known[6]
    curve = {step: {"step": step} | values for step, values in known.items()}
    assert watched(workdir) == curve
    assert opened == ["run@2", "run@4", "run@6"]
    assert list((workdir / "tensorboard/watch").iterdir())
    assert main(["evaluate", str(workdir), "--watch"]) == 0
    assert len(opened) == 3  # nothing is measured again

    kept = (workdir / WATCHED).read_text().splitlines(keepends=True)
    (workdir / WATCHED).write_text("".join(kept[:2]) + kept[2][:20])  # a kill while it was written
    with pytest.raises(table.Unfinished, match="has evaluated step 4 of 6"):
        table._ours(workdir / "result.json")
    assert main(["evaluate", str(workdir), "--watch"]) == 0
    assert opened[3:] == ["run@6"]
    assert watched(workdir) == curve
    assert table._ours(workdir / "result.json")["animals/acc1"] == known[6]["animals/acc1"]


def test_one_watches_a_run_and_a_run_it_must_be(workdir, tmp_path, capsys):
    with Claim(epath.Path(workdir) / WATCH, "watching") as claim:
        claim.take()
        assert main(["evaluate", str(workdir), "--watch"]) == 2
    assert "is watching in" in capsys.readouterr().err
    for model in (tmp_path, f"{workdir}@2"):
        assert main(["evaluate", str(model), "--watch"]) == 2
        assert "--watch needs a run's work directory" in capsys.readouterr().err


@pytest.mark.long
def test_a_damaged_checkpoint_is_named_and_left_out(workdir, opened, capsys):
    (workdir / "checkpoints/4/position/metadata").write_text("{")
    assert main(["evaluate", str(workdir), "--watch"]) == 0
    assert "step 4 is left out: the checkpoint of step 4 in" in capsys.readouterr().err
    assert watched(workdir).keys() == {2, 6}


@pytest.mark.parametrize("is_deleted", [True, False])
def test_what_a_run_deletes_after_its_last_step_is_waited_for(
    is_deleted, workdir, opened, monkeypatch, capsys
):
    """It says first what it will delete, then its last step appears, and then it deletes."""
    files.write_whole(workdir / WATCH / "deleting", json.dumps({"steps": [4]}))
    waits = []

    def wait(seconds):
        waits.append(opened.copy())
        if is_deleted:
            shutil.rmtree(workdir / "checkpoints/4")
        else:  # killed before it could
            monkeypatch.setattr(watch, "LEASE_SECONDS", 0)

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=wait, monotonic=time.monotonic))
    assert main(["evaluate", str(workdir), "--watch"]) == 0
    assert waits == [["run@2", "run@6"]]
    assert watched(workdir).keys() == ({2, 6} if is_deleted else {2, 4, 6})
    assert "left out" not in capsys.readouterr().err


def test_a_run_in_a_bucket_is_watched(run, known, bucket, opened):
    workdir = epath.Path(bucket.url) / "run"
    for step in (4, 6):
        files.copy_tree(run / f"checkpoints/{step}", workdir / f"checkpoints/{step}")
        (workdir / f"checkpoints/{step}/commit_success.txt").write_text("committed")
    for name in ("config.json", "result.json"):
        files.write_whole(workdir / name, (run / name).read_bytes())
    assert main(["evaluate", str(workdir), "--watch"]) == 0
    found = [json.loads(line) for line in (workdir / WATCHED).read_text().splitlines()]
    assert found == [{"step": step} | known[step] for step in (4, 6)]
    assert list((workdir / "tensorboard/watch").iterdir())
    assert main(["evaluate", str(workdir), "--watch"]) == 0
    assert opened == ["run@4", "run@6"]


# ------------------------------------------------------------------------------------- kills


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks"), "tests.watching") as forks:
        yield forks


@pytest.fixture
def stderr():
    """What all processes of a test complain of."""
    with tempfile.TemporaryFile("w+") as stderr:
        yield stderr


def kill_at_random(forks, workdir, stderr, seed: int, steps: int, kills: int) -> None:
    """Kill a run and its watcher at random moments, let both end, and see what they left."""
    drawn = random.Random(seed)
    work = {"run": ("run", workdir, steps, 0.15), "watch": ("evaluate", workdir, 0.1)}

    def start(name):
        function, *arguments = work[name]
        return forks.start(f"tests.watching:{function}", *arguments, stderr=stderr.fileno())

    def said() -> str:
        stderr.seek(0)
        return stderr.read()

    begun = {"run": start("run")}
    while not (workdir / "config.json").exists():
        assert begun["run"].poll() is None, said()
        time.sleep(0.02)
    begun["watch"] = start("watch")
    for _ in range(kills):
        time.sleep(drawn.uniform(0.1, 1.5))
        name = drawn.choice(["run", "watch"])
        if begun[name].poll() is None:
            begun[name].kill()
            begun[name].wait()
        begun[name] = start(name)
    for process in begun.values():
        assert process.wait() == 0, said()
    found, left = watched(workdir), steps_in(workdir / "checkpoints")
    assert left[-1] == steps
    assert set(left) <= found.keys()
    for step, row in found.items():
        assert (row["made/step"], row["made/up"]) == (step, watching.result(step))
    best = max(found.values(), key=lambda row: (row["made/up"], row["step"]))["step"]
    assert named_step(workdir, "best") == best
    assert {best, steps - 1, steps} <= set(left)  # and what was being read at the end
    assert "is left out" not in said()  # what was reached was still there, to its end
    assert "Traceback" not in said()


@pytest.mark.long
def test_killed_at_random_every_checkpoint_is_evaluated_once(forks, tmp_path, stderr):
    kill_at_random(forks, tmp_path, stderr, seed=0, steps=12, kills=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_often_every_checkpoint_is_evaluated_once(seed, forks, tmp_path, stderr):
    kill_at_random(forks, tmp_path, stderr, seed, steps=60, kills=25)
