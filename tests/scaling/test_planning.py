"""A run for a budget: the choice of a law whose truth is known, settings, time and price."""

import csv
import functools
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clip_jax.cli.commands import main
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.pods.topology import Topology
from clip_jax.scaling import choose, run_table
from clip_jax.scaling.forecast import Laws
from clip_jax.scaling.laws import Additive, Batched, Law, Repeated, Runs
from clip_jax.scaling.links import ERROR
from clip_jax.scaling.planning import ScalePlanConfig, choices, describe, plan
from clip_jax.scaling.run_table import gmacs
from clip_jax.scaling.uncertainty import fit_law
from clip_jax.scaling.validation import Candidate

LAW = Additive(*map(np.array, (0.5, 0.3, 1.0, 40.0, 0.1)))
REPEATED = Repeated(*map(np.array, (0.5, 0.3, 1.0, 40.0, 0.1, 15.0)))
MODELS = ("ViT-S-32", "ViT-M-32", "ViT-B-32", "ViT-B-16", "ViT-L-16")
SIZES = {name: gmacs(zoo.get(name)) for name in MODELS}
SEEN = (1e7, 1e8, 1e9, 1e10)
BATCHES = (1_024, 4_096, 16_384, 65_536)


@functools.cache
def fitted() -> Laws:
    size, samples = map(np.ravel, np.meshgrid([*SIZES.values()], SEEN))
    return laws_of(Runs(size, samples, LAW(size, samples)))


def laws_of(runs: Runs) -> Laws:
    fit = fit_law("additive", runs, "all", draws=100)
    return Laws([fit], [Candidate("additive", ERROR)], False)


def write(path: Path, law: Law = LAW) -> Path:
    """A table of noiseless runs, each of three numbers of distinct pairs."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        names = "arch samples_seen unique_samples gmacs_per_sample global_batch loss top1"
        table.writerow(names.split())
        for name, (seen, batch), share in itertools.product(
            MODELS, zip(SEEN, BATCHES, strict=True), (1, 8, 64)
        ):
            error = law(SIZES[name], seen, seen / share)
            table.writerow((name, seen, seen / share, SIZES[name], batch, error, 1 - error / 2))
    return path


def write_sweep(path: Path) -> Path:
    """Write what `choose` says of trials whose loss is a parabola in log learning rate."""
    trials = path.with_suffix(".csv")
    with trials.open("w", newline="") as file:
        table = csv.writer(file)
        names = "arch width samples_seen gmacs_per_sample seed lr global_batch warmup weight_decay"
        table.writerow((*names.split(), "loss", "top1"))
        rates = [2.0**-n for n in range(5, 15)]
        for width, batch, lr, seed in itertools.product((384, 512), (1_024, 4_096), rates, (0, 1)):
            loss = 1 + math.log(lr / learning_rate(width, batch)) ** 2
            settings = (f"w{width}b{batch}", width, 1e6, 1, seed, lr, batch, 10, 0.1)
            table.writerow((*settings, loss, 1 - loss / 100))
    config = choose.ChooseConfig(table=trials, choose_by="loss", report="top1")
    path.write_text(json.dumps(choose.choose(config)))
    return path


def learning_rate(width: float, batch: float) -> float:
    return 2e-3 * (width / 384) ** -0.7 * (batch / 1_024) ** 0.5


# ------------------------------------------------------------------ the choice


@pytest.mark.parametrize("compute", [1e9, 1e10, 1e11])
def test_the_model_is_the_laws_best_for_the_budget(compute):
    options = choices(fitted(), SIZES, 6e9 * compute)
    truth = {name: LAW(size, compute / size) for name, size in SIZES.items()}
    assert [x["model"] for x in options] == sorted(truth, key=truth.__getitem__)
    for option in options:
        assert option["size"] * option["samples"] == pytest.approx(compute)
        assert option["error"] == pytest.approx(truth[option["model"]], rel=1e-3)
        assert option["interval"][0] <= option["error"] <= option["interval"][1]
    assert sum(option["share"] for option in options) == pytest.approx(1)
    assert options[0]["share"] > 0.9


def test_every_quantity_outside_the_runs_is_marked():
    sizes = SIZES | {"small": SIZES["ViT-S-32"] / 2, "large": SIZES["ViT-L-16"] * 2}
    marks = {x["model"]: x["outside"] for x in choices(fitted(), sizes, 6e9 * 2e10)}
    assert marks["ViT-B-32"] == marks["ViT-B-16"] == []
    assert marks["large"] == ["size 2 × the largest"]
    assert marks["small"] == ["size 0.5 × the smallest", "pairs 1.41 × the largest"]
    far = {x["model"]: x["outside"] for x in choices(fitted(), SIZES, 6e9 * 1e13)}
    assert far["ViT-L-16"] == ["compute 14.6 × the largest", "pairs 14.6 × the largest"]
    near = {x["model"]: x["outside"] for x in choices(fitted(), SIZES, 6e9 * 1e7)}
    assert near["ViT-S-32"] == ["compute 0.352 × the smallest", "pairs 0.352 × the smallest"]


def test_a_prediction_that_the_runs_do_not_determine_is_refused():
    runs = fitted().fit.runs
    assert laws_of(runs.where(runs.size < 8)).fit.fitted.values("size") == 3
    two = laws_of(runs.where(runs.size < 5))
    of_table = {name: SIZES[name] for name in MODELS[:2]}
    assert len(choices(two, of_table, 6e9 * 1e9)) == 2
    with pytest.raises(InputError, match=r"predict no ViT-B-32 of .* at least three model sizes"):
        choices(two, SIZES, 6e9 * 1e9)


# ------------------------------------------------------------------ budgets


def test_budgets_of_all_units_are_the_same_at_the_assumed_mfu():
    """A v5e has 197 TFLOP/s, a v3 two JAX devices on each chip of 123."""
    flops = 100 * 3600 * 0.5 * 197e12
    for budget in (f"{flops:g}", "100chip-hours", "120usd"):
        config = ScalePlanConfig(budget=budget, chip_hour_price=1.2, mfu=0.5)
        assert config.training_flops() == pytest.approx(flops, rel=1e-5)
    v3 = ScalePlanConfig(budget="1chip-hours", topology=Topology.parse("v3:4x4"), mfu=1.0)
    assert v3.training_flops() == pytest.approx(3600 * 123e12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": ""}, "budget='' must be training FLOPs such as 1e21"),
        ({"budget": "300chips"}, "must be training FLOPs such as 1e21, 300chip-hours, or"),
        ({"budget": "0usd", "chip_hour_price": 1.0}, "must be training FLOPs"),
        ({"budget": "5000usd"}, "5000usd with --chip-hour-price, the price of one TPU v5e"),
        ({"form": "repeated"}, "form=repeated needs the number of distinct pairs; set --unique"),
        ({"candidates": ("ViT-B-33",)}, "no architecture 'ViT-B-33'"),
        ({"mfu": 0.0}, "mfu=0.0 must be"),
        ({"budget": "1e400"}, "budget='1e400' must be .*; from 1 to 1e.40 FLOPs"),
        ({"budget": "5usd", "chip_hour_price": 1e-320}, "budget='5usd' must be"),
        ({"budget": "6e12"}, "pays for 352.292 pairs of ViT-S-32, less than one batch of 1,024"),
        ({"batch_size": 10**12}, "batch_size=1000000000000 must be .* at most 1000000000"),
        ({"batch_size": 10**9, "budget": "6e17"}, "less than one batch of 1,000,000,000; raise"),
        ({"unique": "0"}, "'0' is not a number of samples from 1"),
        ({"unique": "0", "form": "repeated"}, "'0' is not a number of samples from 1"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        plan(ScalePlanConfig(table=write(tmp_path / "runs.csv"), metric="loss", **changes))


# ------------------------------------------------------------------ the plan


def planned(tmp_path: Path, **changes):
    table = write(tmp_path / "runs.csv", changes.pop("law", LAW))
    config = {"table": table, "metric": "loss", "budget": "6e20"}
    return plan(ScalePlanConfig(**(config | changes)))


def test_a_plan_has_every_setting_of_the_run(tmp_path):
    sweep = write_sweep(tmp_path / "sweep.json")
    result = planned(tmp_path, sweep=sweep, candidates=("ViT-M-32",), chip_hour_price=2.0)
    samples = 1e11 / SIZES["ViT-M-32"]
    assert result["model"] == "ViT-M-32"  # of the sweep's widths
    assert result["samples"] == pytest.approx(samples)
    assert result["batch_size"] == 65_536  # of the runs of 10B pairs
    assert result["steps"] == round(samples / 65_536)
    chip_hours = 6e20 / (0.4 * 197e12) / 3600
    assert result["chip_hours"] == pytest.approx(chip_hours)
    assert result["hours"] == pytest.approx(chip_hours / 256)
    assert result["price"] == pytest.approx(2 * chip_hours)
    rate = result["learning_rate"]
    assert rate["value"] == pytest.approx(learning_rate(512, 65_536), rel=1e-3)
    assert rate["interval"][0] <= rate["value"] <= rate["interval"][1]
    assert rate["outside"] == ["sweep: batch 65536"]
    assert result["warnings"][-1] == (
        "the plan extrapolates, as if its laws held there: pairs 2.01 × the largest, sweep: batch "
        "65536."
    )
    inside = planned(tmp_path, sweep=sweep, candidates=("ViT-M-32",), batch_size=2_048)
    assert inside["learning_rate"]["outside"] == []
    assert json.loads(json.dumps(result)) == result


def test_a_sweep_without_a_rule_is_refused(tmp_path):
    sweep = write_sweep(tmp_path / "sweep.json")
    one = json.loads(sweep.read_text())
    one["points"] = one["points"][:1]
    sweep.write_text(json.dumps(one))
    with pytest.raises(InputError, match=r"sweep\.json has 2 optima; a rule needs"):
        planned(tmp_path, sweep=sweep)
    with pytest.raises(InputError, match=r"there is no .*gone\.json; `clip-jax scale choose"):
        planned(tmp_path, sweep=tmp_path / "gone.json")
    with pytest.raises(InputError, match=r"sweep\.csv is damaged: .* Run `clip-jax scale choose"):
        planned(tmp_path, sweep=tmp_path / "sweep.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": "wide"}, r"points\[0\]\.width is 'wide'; it must be of type float"),
        ({"width": 0}, "width=0.0 must be more than 0"),
        ({"global_batch": math.inf}, "global_batch=inf must be more than 0"),
        ({"optima": None}, r"points\[0\]\.optima is None; it must be a list"),
        ({"optima": [-1e-3]}, r"optima=\(-0\.001,\) must be more than 0"),
        ({"optima": [math.nan]}, r"optima=\(nan,\) must be more than 0"),
    ],
)
def test_a_damaged_point_of_a_sweep_is_one_message(change, message, tmp_path):
    """Such points end in a traceback, or in a learning rate of NaN."""
    sweep = write_sweep(tmp_path / "sweep.json")
    points = json.loads(sweep.read_text())["points"]
    damaged = {"points": [points[0] | change, *points[1:]]}
    for content, says in ((damaged, message), ({"points": [1]}, r"points\[0\] is 1; it must be")):
        sweep.write_text(json.dumps(content))
        with pytest.raises(InputError, match=rf"sweep\.json is damaged: {says}.* Run `clip-jax"):
            planned(tmp_path, sweep=sweep)


@pytest.mark.parametrize("bound", [None, "0.3", [0.3], math.nan, math.inf, 0, -0.3, True])
def test_a_bound_is_a_number(bound, tmp_path):
    """NaN is no bound at all: the smaller of it and the MFU is the MFU."""
    path = tmp_path / "bound.json"
    path.write_text(json.dumps({"mfu_bound": bound}))
    with pytest.raises(InputError, match=r"bound\.json: mfu_bound is .*, but it must be a number"):
        planned(tmp_path, bound=path)


def test_a_bound_is_of_the_same_chip(tmp_path):
    path = tmp_path / "bound.json"
    path.write_text(json.dumps({"name": "v5e:4x4", "mfu_bound": 0.3}))
    assert planned(tmp_path, bound=path)["mfu"] == 0.3
    assert planned(tmp_path, bound=path, mfu=0.2)["mfu"] == 0.2  # a bound raises no MFU
    v5p = Topology.parse("v5p:4x4x4")
    with pytest.raises(InputError, match=r"v5e:4x4, with the chip TPU v5e, but .* chip TPU v5p"):
        planned(tmp_path, bound=path, topology=v5p)
    path.write_text(json.dumps({"name": "v9:4x4", "mfu_bound": 0.3}))
    with pytest.raises(InputError, match=r"bound\.json: topology 'v9:4x4' is not known"):
        planned(tmp_path, bound=path)


def test_a_law_that_more_compute_does_not_improve_plans_nothing(tmp_path):
    """All models are equally good then, and the first of the table would be planned."""
    worse = Additive(*map(np.array, (-0.1, -0.1, 0.5, 0.5, 0.0)))
    with pytest.raises(InputError, match=r"more compute does not improve loss: its error is 4\.\d"):
        planned(tmp_path, law=worse)
    with pytest.raises(InputError, match=r"does not improve top1: .* Set --metric-is score"):
        planned(tmp_path, metric="top1", metric_is="error")


def test_repetition_is_counted_by_its_law_or_named(tmp_path):
    """With few distinct pairs, a larger model that sees fewer pairs is better."""
    few = {"unique": "1M", "budget": "3e18"}
    plain = planned(tmp_path, **few)
    assert plain["epochs"] == pytest.approx(plain["samples"] / 1e6)
    seen = f"each pair is seen {plain['epochs']:.1f} times. Beyond 4 epochs"
    assert plain["warnings"][-1].startswith(seen)
    repeated = planned(tmp_path, **few, form="repeated", law=REPEATED)
    assert not any("each pair" in line for line in repeated["warnings"])
    truth = {name: REPEATED(size, 5e8 / size, 1e6) for name, size in SIZES.items()}
    assert repeated["model"] == min(truth, key=truth.__getitem__) == "ViT-L-16"
    assert repeated["size"] > plain["size"]
    assert repeated["error"] == pytest.approx(truth["ViT-L-16"], rel=5e-3)
    enough = planned(tmp_path, unique="10B", budget="3e18")["warnings"]
    assert not any("each pair" in line for line in enough)


def write_batches(path: Path, law: Batched) -> Path:
    """A table of noiseless runs, each with four batch sizes."""
    names = "arch samples_seen gmacs_per_sample global_batch loss"
    rows = [
        dict(zip(names.split(), (x, seen, size, batch, law(size, seen, batch)), strict=True))
        for (x, size), seen, batch in itertools.product(SIZES.items(), SEEN, BATCHES)
    ]
    run_table.write(run_table.RunTable(rows), path)
    return path


def test_a_law_of_the_batch_size_gives_the_batch(tmp_path):
    law = Batched(*map(np.array, (0.5, 0.3, 1.0, 40.0, 0.1, 8.0, 5.0)))
    table = write_batches(tmp_path / "batches.csv", law)
    config = ScalePlanConfig(table=table, metric="loss", form="batched", budget="3e19")
    result = plan(config)
    best = float(law.best_batch(result["samples"]))
    assert result["batch_size"] % 256 == 0
    assert result["batch_size"] == pytest.approx(best, rel=0.05)
    assert result["error"] == pytest.approx(law(result["size"], result["samples"]), rel=1e-2)
    assert plan(replace(config, batch_size=1_024))["error"] > result["error"]


def test_a_batch_that_the_runs_do_not_determine_is_refused(tmp_path):
    """Two batch sizes determine no other; runs that a larger batch always helps no best one."""
    law = Batched(*map(np.array, (0.5, 0.3, 1.0, 40.0, 0.1, 8.0, 0.0)))
    table = write_batches(tmp_path / "batches.csv", law)
    config = ScalePlanConfig(table=table, metric="loss", form="batched", budget="3e19")
    with pytest.raises(InputError, match="no best batch size: set --batch-size, or add a wider"):
        plan(config)
    config = replace(config, where=("global_batch<16384",))
    with pytest.raises(InputError, match="add runs of at least three batch sizes or"):
        plan(config)
    assert plan(replace(config, batch_size=1_024))["batch_size"] == 1_024


def test_the_command_prints_a_plan(tmp_path, capsys):
    table = str(write(tmp_path / "runs.csv"))
    args = ["scale", "plan", table, "--metric", "loss", "--unique", "400M"]
    assert main([*args, "--budget", "5Kusd", "--chip-hour-price", "1.2"]) == 0
    text = capsys.readouterr().out
    assert (
        "training FLOPs by loss of 60 runs, additive law; best size for new pairs, in GMACs: "
        in text
    )
    assert "plan: ViT-L-16 on 2.9B pairs, 7.2 epochs of 400M\nbatch size: 16,384, " in text
    assert "learning rate: none is known (--sweep)" in text
    assert "v5e:16x16 at 40% MFU (--mfu, --bound): 16.3 h, 4,167 chip-hours, price 5,000" in text
    bound = tmp_path / "bound.json"
    with pytest.raises(InputError, match="clip-jax plan --json"):
        plan(ScalePlanConfig(table=Path(table), metric="loss", bound=bound))
    bound.write_text('{"mfu_bound": 0.2}')
    assert main([*args, "--budget", "300chip-hours", "--bound", str(bound)]) == 0
    assert (
        "v5e:16x16 at 20% MFU (--mfu, --bound): 1.17 h, 300 chip-hours" in capsys.readouterr().out
    )
    assert main([*args, "--budget", "1e20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training_flops"] == pytest.approx(1e20)


def test_a_score_a_foreign_table_and_a_chip_of_two_devices(tmp_path):
    table = write(tmp_path / "runs.csv")
    table.write_text(table.read_text().replace("global_batch", "other"))
    config = ScalePlanConfig(table=table, metric="top1", budget="6e20")
    with pytest.raises(InputError, match="no column global_batch; set --batch-size"):
        plan(config)
    sweep = write_sweep(tmp_path / "sweep.json")
    config = replace(config, sweep=sweep, batch_size=2_048, topology=Topology.parse("v3:4x4"))
    result = plan(replace(config, candidates=("ViT-S-32",)))
    assert result["error"] == pytest.approx(LAW(result["size"], result["samples"]) / 2, rel=1e-3)
    assert result["learning_rate"]["value"] == pytest.approx(learning_rate(384, 2_048), rel=1e-3)
    assert result["hours"] == pytest.approx(result["chip_hours"] / 16)
    option = result | {"error": 0.3, "interval": [0.2, 0.4]}
    assert " 70.0% (95%: 60.0% to 80.0%), best in" in describe(result | {"options": [option]})
