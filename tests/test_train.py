"""The run: what it leaves behind, how it resumes, what it refuses and how it fails."""

import contextlib
import dataclasses
import json
import shutil
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from PIL import Image

from clip_jax import step as step_module
from clip_jax import train as training
from clip_jax.checkpoints.claim import Claim
from clip_jax.checkpoints.manager import (
    CheckpointConfig,
    Checkpoints,
    Restored,
    position_of,
    restore_params,
)
from clip_jax.checkpoints.retention import named_step, steps_in
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.config_files import with_weights
from clip_jax.convert import tensor_files
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.state_dict import Row
from clip_jax.convert.weight_files import WeightFiles
from clip_jax.data.batch_plan import SigLIP2Lengths
from clip_jax.data.order.mixture import MemberConfig, MixtureConfig
from clip_jax.data.sources.text_table import TableConfig
from clip_jax.errors import InputError
from clip_jax.evals.digits import DigitsEvaluator
from clip_jax.evals.evaluator import Evaluations
from clip_jax.evals.ranks import NotFinite
from clip_jax.inference.average import fitting
from clip_jax.inference.loading import load, load_on_mesh
from clip_jax.losses import DistillationConfig, LiveTeacher
from clip_jax.metrics.reports import Reports
from clip_jax.metrics.timers import Goodput, Timers
from clip_jax.models.lora import LoRAConfig
from clip_jax.optim import Constant, CoolDown, OptimConfig
from clip_jax.processes import ProcessesConfig
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program
from clip_jax.train import (
    Diverged,
    Parent,
    Preempted,
    Run,
    agree,
    branch,
    check_data,
    check_patches,
    check_processes_agree,
    open_data,
    set_up,
    train,
    warn_of_loops,
)
from tests.clock import HandClock
from tests.conftest import (
    STARTS,
    losses,
    parameter_shapes,
    rows,
    small_step,
    starting_from,
    tiny_digits,
    train_shared,
    write_states,
    write_tiny_model,
)
from tests.data import conftest as made

STEPS = 6


def tiny(**changes):
    """A run of six steps, saved at the fourth and the last, evaluated at the third and the last."""
    evals = (dataclasses.replace(tiny_digits().evals[0], every_steps=3, max_prompts=1),)
    checkpoint = CheckpointConfig(every_steps=4)
    return tiny_digits(**{"steps": STEPS, "evals": evals, "checkpoint": checkpoint} | changes)


def optim(**changes):
    return OptimConfig(**{"learning_rate": 2e-3, "warmup_steps": 2, "weight_decay": 0.1} | changes)


def state_of(workdir, step):
    """A step's checkpoint as plain arrays."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        items = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    return items["state"]


def final_state(workdir):
    """The last step's checkpoint as plain arrays."""
    return state_of(workdir, STEPS)


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("fact", "value", "says"),
    [
        ("config", {"seed": 1}, r"config\.seed: 0 in 0, 1 in 2"),
        ("resume step", 0, "resume step: 300 in 0, 0 in 2"),
    ],
)
def test_what_processes_do_not_agree_on_is_named(fact, value, says):
    facts = {"config": {"seed": 0}, "code": "abc", "data": "def", "resume step": 300}
    check_processes_agree([facts, facts])
    with pytest.raises(ValueError, match=says):
        check_processes_agree([facts, facts, facts | {fact: value}])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    train_shared(tiny(), workdir)
    return workdir


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A run's random numbers, of steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("weights")
    write_states(tiny(steps=2), workdir)
    return workdir


def test_a_run_leaves_its_numbers_pictures_and_checkpoints(finished):
    reports = [row for row in rows(finished) if "loss" in row]
    assert [row["step"] for row in reports] == list(range(1, STEPS + 1))
    assert reports[-1].keys() >= {
        "samples_seen",
        "loss",
        "image_to_text_accuracy",
        "text_to_image_accuracy",
        "grad_norm",
        "param_norm",
        "logit_scale",
        "learning_rate",
        "images_per_second",
        "images_per_second_per_device",
        "model_flops_per_step",
        "input_wait",
    }
    assert "mfu" not in reports[-1]  # no published peak for a CPU
    assert [row["step"] for row in rows(finished) if "zero_shot/seen/top1" in row] == [3, STEPS]
    result = json.loads((finished / "result.json").read_text())
    assert result["samples_seen"] == STEPS * 16
    assert 0 <= result["zero_shot/seen/top1"] <= result["zero_shot/seen/top5"] <= 1
    assert "zero_shot/unseen/top1" in result
    assert (finished / "evals/predictions.png").read_bytes()[1:4] == b"PNG"
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir()) == [4, 6]


def test_a_stopped_and_damaged_run_ends_bit_for_bit_the_same(finished, tmp_path, capfd):
    def signalled(self: Checkpoints, step: int) -> bool:
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return False

    with (
        mock.patch.object(Checkpoints, "reached_preemption", autospec=True, side_effect=signalled),
        pytest.raises(Preempted, match="stopped by SIGTERM at step 5, which is saved in"),
    ):
        train_shared(tiny(), tmp_path)
    damaged = ("config.json", "result.json", "metrics.jsonl", "starts.json")
    for path in [*(tmp_path / "checkpoints/5/state/d").iterdir(), *map(tmp_path.joinpath, damaged)]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\n")
    capfd.readouterr()
    train_shared(tiny(), tmp_path)
    lines = capfd.readouterr().err.strip().splitlines()
    assert sum("the checkpoint of step 5 is damaged" in line for line in lines) == 1
    assert any(str(tmp_path / "damaged/5") in line for line in lines)
    for name in damaged[:3]:
        assert sum(str(tmp_path / name) in line for line in lines[:-1]) == 1, lines
        assert (tmp_path / f"{name}.damaged").exists()
    assert any("resuming from step 4" in line for line in lines)
    assert_identical(final_state(finished), final_state(tmp_path))
    assert lines[-1].count("clip-jax evaluate") == 1  # the last line says what to run next


@pytest.mark.usefixtures("small_steps")
def test_a_branch_is_the_unbroken_run_with_its_schedule(tmp_path):
    """A cool-down from a run of constant learning rate, against the same schedule from the
    beginning; with a batch that doubles on the way."""
    parent, unbroken, workdir = (tmp_path / name for name in ("parent", "unbroken", "branch"))
    evals = tiny_digits().evals  # at every twelfth step, and at the last
    values = [("zero_shot/seen/top1", 0.5)]
    with mock.patch.object(DigitsEvaluator, "run", autospec=True, return_value=values):
        stopped = train(tiny(optim=optim(schedule=Constant()), stop_after=4, evals=evals), parent)
    assert (stopped["step"], stopped["zero_shot/seen/top1"]) == (4, 0.5)
    cooled = tiny(optim=optim(schedule=CoolDown(steps=2)), double_batch_at=(5,), evals=())
    train(cooled, unbroken)
    branch = dataclasses.replace(cooled, branch_from=f"{parent}@4")
    train(branch, workdir)
    assert_identical(final_state(unbroken), final_state(workdir))
    loss = losses(unbroken)
    assert losses(workdir) == {step: loss[step] for step in (5, 6)}
    assert loss == pytest.approx({step: np.log(32 if step == 6 else 16) for step in loss})
    assert {row["step"]: row["samples_seen"] for row in rows(workdir)} == {5: 5 * 16, 6: 7 * 16}
    assert "optim.schedule" in (workdir / "branch.json").read_text()
    for name, changes, message in (
        ("more", {"double_batch_at": (2,)}, "has seen 64 samples, which batch_size=16"),
        ("less", {"branch_from": f"{unbroken}@6", "steps": 8, "double_batch_at": ()}, "seen 112"),
        ("no step", {"branch_from": f"{parent}@3"}, "not of 3; choose one"),
        ("other", {"batch_size": 32}, r"a branch of .* cannot differ from it in:\n  batch_size"),
    ):
        with pytest.raises(InputError, match=message):
            train(dataclasses.replace(branch, **changes), tmp_path / name)


def save_as_earlier_versions(workdir, step):
    """Write a run's locked image tower into a checkpoint and into its average, and only there."""
    position = position_of(workdir, step)
    tower = restore_params(workdir, step, {"visual": parameter_shapes(tiny().model)["visual"]})
    state = state_of(workdir, step)
    state["params"] |= tower
    state["opt_state"]["ema"] |= tower
    state = jax.tree.map(jnp.asarray, jax.device_get(state))  # on one device
    for folder in (workdir / "locked", workdir / "checkpoints" / str(step)):
        shutil.rmtree(folder)
    checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig())
    position = {name: x for name, x in position.items() if "checksum" not in name}
    checkpoints.save(step, state, position)
    checkpoints.close()


@pytest.mark.usefixtures("small_steps")
def test_a_locked_tower_is_saved_once_and_keeps_its_bits(weights, tmp_path):
    """In a resumed run, in a branch, and in a run that an earlier version has begun."""
    locked = optim(locked=("image",), ema_decay=0.5)
    config = tiny(init_from=str(weights), optim=locked, evals=())
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    train_shared(config, unbroken)
    train_shared(dataclasses.replace(config, stop_after=4), resumed)
    earlier = shutil.copytree(resumed, tmp_path / "earlier")
    save_as_earlier_versions(earlier, 4)
    for workdir in (resumed, earlier):
        train_shared(config, workdir)
    state, tower = final_state(unbroken), load(weights).params["visual"]
    assert state["params"].keys() == state["opt_state"]["ema"].keys() == {"text", "logit_scale"}
    for workdir in (resumed, earlier):
        assert_identical(final_state(workdir), state)
        for step in (4, STEPS):
            assert_identical(load(f"{workdir}@{step}").params["visual"], tower)
        assert_identical(load(workdir).params["text"], state["opt_state"]["ema"]["text"])
    branched = tmp_path / "branched"
    train_shared(dataclasses.replace(config, branch_from=f"{resumed}@4"), branched)
    assert_identical(final_state(branched), state)
    assert_identical(load(branched).params["visual"], tower)
    drawn, branched = tmp_path / "drawn", tmp_path / "branch_of_drawn"
    random = tiny(optim=locked, evals=(), stop_after=4)
    train_shared(random, drawn)
    train_shared(dataclasses.replace(random, stop_after=None, branch_from=f"{drawn}@4"), branched)
    assert_identical(load(branched).params["visual"], load(drawn).params["visual"])


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("adapters", [None, LoRAConfig(rank=2)])
def test_a_run_of_longer_texts_than_its_weights_records_what_it_stretched(
    adapters, tmp_path, capsys
):
    """A resumed run keeps the record, for which it does not read the weights."""
    base, workdir = tmp_path / "base", tmp_path / "run"
    model = tiny().model
    write_tiny_model(base, config=model)
    length = model.text.context_length
    text = dataclasses.replace(model.text, context_length=length + 5, kept_positions=3)
    longer = dataclasses.replace(model, text=text)
    config = tiny(model=longer, init_from=str(base), lora=adapters, evals=())
    train(dataclasses.replace(config, stop_after=4), workdir)
    shown = f"text positions are those of {length} tokens, stretched after the first 3"
    assert shown in capsys.readouterr().err
    if adapters is None:
        shutil.rmtree(base)
    train(config, workdir)
    assert shown not in capsys.readouterr().err
    text_of_run = read_run_config(workdir)["model"]["text"]
    assert text_of_run["stretched_from"] == length
    after = load(workdir)
    assert after.config.text.stretched_from == length
    assert after.tokenize("a").shape == (1, length + 5)
    again = tiny(model=longer, init_from=str(workdir), evals=(), steps=1)
    train(again, tmp_path / "again")  # not stretched again: the record is that of its weights
    assert read_run_config(tmp_path / "again")["model"]["text"] == text_of_run


def test_a_loop_over_layers_is_warned_of_where_its_collectives_may_mix():
    model = tiny().model
    config = tiny(model=dataclasses.replace(model, text=dataclasses.replace(model.text, depth=3)))
    divided = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    assert warn_of_loops(config, divided) is None
    with mock.patch.object(jax, "process_count", autospec=True, return_value=2):
        assert "--model.unroll 3, or" in (warn_of_loops(config, divided) or "")
        assert warn_of_loops(config, make_mesh(MeshConfig(), jax.devices()[:2])) is None
        unrolled = dataclasses.replace(config.model, unroll=3)
        assert warn_of_loops(dataclasses.replace(config, model=unrolled), divided) is None


def test_a_branch_begins_without_training_time(tmp_path):
    """Else a branch that dies before its first checkpoint counts the steps that it repeats twice:
    only what exceeds the time at the checkpoint is lost."""
    position = {"samples": 4 * 16, "seconds/steps": 500.0}
    parent = Restored(4, "state", position)
    program = mock.Mock(spec=Program, state=mock.Mock())
    with mock.patch.object(training, "restore_step", autospec=True, return_value=parent):
        begun = branch(tiny(), program, Parent(epath.Path(tmp_path), 4), {})
    assert (begun.step, begun.state) == (4, "state")
    kept = begun.position["seconds/steps"]
    assert kept == 0.0
    timers = Timers(HandClock())
    timers.total["init"] = 1.0
    assert Goodput(timers, {"seconds/steps": 100.0}, kept).values()["seconds/lost"] == 100.0


@pytest.mark.usefixtures("small_steps")
def test_siglip2s_lengths_stretch_the_rest_of_the_learning_rate_schedule(tmp_path):
    """Two steps of squares, then four of drawn lengths in the last two steps of the schedule."""
    model = tiny().model
    model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, max_patches=9))
    lengths = SigLIP2Lengths(patches=(4, 9), fixed_share=0.5, stretch=2)
    data = dataclasses.replace(tiny().data, seed=2)  # which draws both lengths
    config = tiny(model=model, lengths=lengths, optim=optim(warmup_steps=0), evals=(), data=data)
    train(config, tmp_path)
    reports = [row for row in rows(tmp_path) if "loss" in row]
    steps = np.array([0, 1, 2, 2.5, 3, 3.5])
    expected = 2e-3 * (1 + np.cos(np.pi * steps / 4)) / 2
    np.testing.assert_allclose([row["learning_rate"] for row in reports], expected, rtol=1e-6)
    tokens = [row.get("tokens") for row in reports]
    assert tokens[:2] == [None, None]
    assert {*tokens[2:]} == {4, 9}
    pairs = np.diff([0, *(row["samples_seen"] for row in reports)])
    assert pairs.tolist() == [8 if length == 9 else 16 for length in tokens]
    assert all((row.get("valid_share", 0) > 0.5) == ("tokens" in row) for row in reports)


def test_starts_without_progress_are_counted_and_refused(tmp_path):
    config = tiny(processes=ProcessesConfig(max_starts=2))
    pipeline, evaluations = open_data(config, 0, 1), Evaluations(config.evals, STEPS)

    def starts(step: int, config=config) -> None:
        agree(config, epath.Path(tmp_path), pipeline, evaluations, step)

    for step in (0, 2, 2):
        starts(step)
    with pytest.raises(InputError, match=r"the last 2 starts in .* all began at step 2"):
        starts(2)
    starts(2, dataclasses.replace(config, processes=ProcessesConfig(max_starts=10)))


@pytest.mark.parametrize(("size", "patch"), [(16, 7), (384, 14)])
def test_a_new_run_sees_all_pixels(size, patch, tmp_path):
    """But for SigLIP's SO400M at 384 pixels, published so. A run that has begun goes on."""
    model = tiny().model
    vision = dataclasses.replace(model.vision, image_size=size, patch_size=patch)
    config = tiny(model=dataclasses.replace(model, vision=vision))
    message = r"last 2 pixels would be ignored\. Set the size to 21"
    expected = pytest.raises(InputError, match=message)
    with contextlib.nullcontext() if size == 384 else expected:
        (check_patches if size == 384 else train)(config, epath.Path(tmp_path))
    (tmp_path / "checkpoints/2").mkdir(parents=True)
    check_patches(config, epath.Path(tmp_path))


def test_a_run_on_other_data_is_refused(tmp_path, capsys):
    """A table that grew was accepted: its order is another one from the first sample on."""
    pairs, workdir = made.make_pairs(60), epath.Path(tmp_path / "run")
    workdir.mkdir()

    def opened(rows):
        source = made.table(tmp_path, rows)
        config = tiny(data=dataclasses.replace(tiny().data, source=source), evals=())
        return config, open_data(config, 0, 1)

    config, data = opened(pairs[:40])
    check_data(workdir, data)  # nothing has been trained
    (workdir / "checkpoints/2").mkdir(parents=True)
    check_data(workdir, data)
    assert "has no data.json" in capsys.readouterr().err
    agree(config, workdir, data, Evaluations((), STEPS), 0)
    check_data(workdir, data)
    assert not capsys.readouterr().err
    for others in (pairs, pairs[20:]):
        with pytest.raises(InputError, match="was trained on other data"):
            check_data(workdir, opened(others)[1])
    members = tuple(MemberConfig(source=x.data.source) for x in (config, config))
    data = dataclasses.replace(config.data, source=MixtureConfig(members=members))
    opened(pairs[:40])
    check_data(workdir, open_data(dataclasses.replace(config, data=data), 0, 1))
    (workdir / "data.json").write_text('{"fingerprints": 3}')
    with pytest.raises(InputError, match=r"data\.json"):
        check_data(workdir, opened(pairs[:40])[1])


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_metric_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(name, tmp_path):
    config = tiny(checkpoint=CheckpointConfig(every_steps=1), evals=())

    def third_is_broken(state, batch, *, recipe, mesh):
        after, metrics = small_step(state, batch, recipe=recipe, mesh=mesh)
        return after, metrics | {name: jnp.where(state.step == 2, jnp.nan, metrics[name])}

    message = r"^diverged at step 3: .*Samples 32 to 47: \d\d/.* step 2 is intact"
    with (
        mock.patch.object(step_module, "train_step", third_is_broken),
        pytest.raises(Diverged, match=message),
    ):
        train(config, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.usefixtures("small_steps")
def test_an_evaluation_of_embeddings_that_are_not_finite_fails_and_the_run_goes_on(tmp_path):
    """Its step is never the best; the evaluation of another step is not marked as failed."""
    metric = "zero_shot/seen/top1"
    outcomes = [[(metric, 0.5)], NotFinite("3 of 4 rows"), [(metric, 0.25)], NotFinite("4 of 4")]
    evals = (dataclasses.replace(tiny().evals[0], every_steps=2),)
    checkpoint = CheckpointConfig(every_steps=8, keep=1, best=metric)
    config = tiny(steps=8, evals=evals, checkpoint=checkpoint)
    with mock.patch.object(DigitsEvaluator, "run", autospec=True, side_effect=outcomes):
        result = train(config, tmp_path)
    evaluated = {
        row["step"]: row.get(metric, row.get("failed"))
        for row in rows(tmp_path)
        if {metric, "failed"} & row.keys()
    }
    assert evaluated == {2: 0.5, 4: "3 of 4 rows", 6: 0.25, 8: "4 of 4"}
    assert (result["step"], result["failed"]) == (8, "4 of 4")
    assert steps_in(tmp_path / "checkpoints") == [2, 8]
    assert named_step(tmp_path, "best") == 2


@pytest.mark.usefixtures("small_steps")
def test_the_last_checkpoint_is_whole_before_the_result_names_its_step(tmp_path):
    """A ladder takes a run with such a result for finished, and begins branches there."""
    order = mock.Mock()
    with (
        mock.patch.object(Checkpoints, "wait", autospec=True, side_effect=order.wait),
        mock.patch.object(Reports, "write_down", autospec=True, side_effect=order.result),
    ):
        train(tiny(steps=3, evals=()), tmp_path)
    assert [name for name, *_ in order.mock_calls][:4] == ["result", "result", "wait", "result"]


@pytest.mark.usefixtures("small_steps")
def test_unreadable_samples_are_replaced_counted_and_logged_once(tmp_path):
    Image.new("RGB", (24, 20)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not an image")
    lines = ["image,caption", *(f"a.png,number {i}" for i in range(40))]
    lines[8], lines[12] = "b.png,broken", "a.png,"
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    source = TableConfig(path=str(tmp_path / "pairs.csv"))
    data = dataclasses.replace(tiny().data, source=source, max_bad_share=0.2)
    train(tiny(steps=5, data=data, evals=()), tmp_path / "run")  # 80 samples: each of the 40 twice
    skipped = rows(tmp_path / "run", "skipped.jsonl")
    assert len(skipped) == 4
    assert {"step", "position", "key", "reason"} <= skipped[0].keys()
    assert {row["reason"] for row in skipped if "empty" in row["reason"]}


@pytest.mark.parametrize("changes", [{}, {"skip_norm_ratio": 10.0}])
def test_a_run_is_loaded_and_evaluated_with_its_averaged_weights(changes, tmp_path):
    config = tiny(steps=1, optim=optim(warmup_steps=0, ema_decay=0.5, **changes))
    state = write_states(config, tmp_path)
    optimizer = state.opt_state.inner if changes else state.opt_state
    assert_identical(load(tmp_path).params, optimizer.ema)
    program = Program(config.recipe, make_mesh(config.mesh))
    parts = {"config": config, "program": program, "state": state, "tower": {}}
    run = mock.Mock(spec=Run, workdir=tmp_path, **parts)
    assert_identical(Run.encoder.fget(run).params, optimizer.ema)


def test_a_run_prepares_images_as_the_model_that_it_continues(tmp_path):
    """And so evaluation, export and averages with that model do."""
    write_tiny_model(tmp_path / "base", config=tiny().model)
    base = read_weights(tmp_path / "base")
    squash = dataclasses.replace(base.preprocess, resize_mode="squash", interpolation="bilinear")
    write_weights(dataclasses.replace(base, preprocess=squash), tmp_path / "squash", "clip-jax")
    config = with_weights(tiny(init_from=str(tmp_path / "squash"), init_architecture=True, steps=1))
    (tmp_path / "run").mkdir()
    state, mesh = write_states(config, tmp_path / "run"), make_mesh(config.mesh)
    program = Program(config.recipe, mesh)
    parts = {"config": config, "program": program, "state": state, "tower": {}}
    run = mock.Mock(spec=Run, workdir=tmp_path, **parts)
    assert Run.encoder.fget(run).preprocess == squash
    for model in (load(tmp_path / "run"), load_on_mesh(tmp_path / "run", mesh)):
        assert model.image_preprocess == squash
    weights = [read_weights(tmp_path / name) for name in ("squash", "run")]
    assert len(fitting(weights, [tmp_path / "squash", tmp_path / "run"])) == 2


def test_a_teacher_of_another_architecture_than_its_weights_is_refused(weights, tmp_path):
    smaller = dataclasses.replace(tiny().model, embed_dim=8)
    wrong = LiveTeacher(weights=str(weights), model=smaller)
    with pytest.raises(InputError, match="correct the teacher's model, or set it to None"):
        train(tiny(objective=(DistillationConfig(teachers=(wrong,)),)), tmp_path / "other")


@pytest.mark.parametrize("kind", STARTS)
def test_a_start_opens_weights_once_and_reads_each_value_once(kind, tmp_path):
    write_tiny_model(tmp_path / "weights", config=tiny().model)
    config = starting_from(str(tmp_path / "weights"), kind, tmp_path / "images")
    opened, read = [], []
    map_file, to_ours = tensor_files.map_file, Row.to_ours

    def counted_map(path):
        opened.append(path.name)
        return map_file(path)

    def counted_read(row, arrays, shape):
        read.append(sum(x.nbytes for x in arrays))
        return to_ours(row, arrays, shape)

    with (
        mock.patch.object(tensor_files, "map_file", autospec=True, side_effect=counted_map),
        mock.patch.object(Row, "to_ours", counted_read),
        WeightFiles() as weight_files,
    ):
        workdir, claim = epath.Path(tmp_path / "run"), mock.Mock(spec=Claim)
        run = set_up(config, workdir, claim, weight_files)
    run.checkpoints.close()
    run.reports.close(Preempted)
    assert opened == ["model.safetensors"]
    tensors = tensor_files.read_tensors(tmp_path / "weights/model.safetensors")
    assert sum(read) == sum(x.nbytes for x in tensors.values())
