"""What a fit of a table answers, as JSON values and in words."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from clip_jax.errors import InputError
from clip_jax.scaling import plots
from clip_jax.scaling.fit import PUBLISHED, FitCommand, FitConfig, fit, fit_file
from clip_jax.scaling.fit_result import Answer, FitResult, Variant, describe
from clip_jax.scaling.forecast import OF_COMPUTE
from clip_jax.scaling.run_table import RunTable, number, read
from clip_jax.serialize import to_json
from tests.scaling.conftest import POINTS
from tests.scaling.known import KNOWN, measured, table_of

TABLE = read(POINTS)
LAION = FitConfig(where=("upstream_dataset=LAION*",), procedure="cherti", draws=100)
OURS = FitConfig(metric="error", metric_is="error", draws=100)


def strict(result: FitResult) -> dict[str, Any]:
    """A result as JSON without NaN and infinities."""
    return json.loads(json.dumps(result.to_json(), allow_nan=False))


def test_the_eight_published_fits_to_four_digits(tmp_path: Path):
    """From the published points, and from a table with other columns and units."""
    with (tmp_path / "theirs.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["model", "seen", "gflops", "data", *PUBLISHED])
        for row in TABLE.rows:
            seen, gflops = float(row["samples_seen"]) / 1e9, 2 * float(row["gmacs_per_sample"])
            percent = [100 * float(row[metric]) for metric in PUBLISHED]
            name = row["upstream_dataset"]
            table.writerow([row["arch"], f"{seen}B", f"{gflops:.12g}", name, *percent])
    columns = (
        "arch=model",
        "samples_seen=seen",
        "gmacs_per_sample=gflops:GFLOPs",
        *(f"{metric}={metric}:percent" for metric in PUBLISHED),
    )
    theirs = read(tmp_path / "theirs.csv", columns)
    for table, column in ((TABLE, "upstream_dataset"), (theirs, "data")):
        for metric, laws in PUBLISHED.items():
            for models, (alpha, beta) in laws.items():
                data, procedure = ("LAION*", "cherti") if models == "LAION" else ("CLIP-WIT", "all")
                config: Any = {"metric": metric, "procedure": procedure, "draws": 100}
                where = (f"{column}={data}",)
                law: Any = fit(table, FitConfig(where=where, form="power", **config)).law
                assert round(law.alpha, 4) == alpha
                assert float(f"{law.beta:.4g}") == beta


def test_the_published_procedures_predictions_and_files(tmp_path: Path):
    predict = ("ViT-H-14@68B", "ViT-g-14@34B", "ViT-bigG-14@68B", "ViT-B-32@100K", "ViT-H-14@1000B")
    hold_out = ("gmacs_per_sample>=150",)
    config = replace(LAION, predict=predict, hold_out=hold_out, plot=tmp_path / "plots" / "all")
    fitted = fit(TABLE, config)
    result = strict(fitted)
    assert (round(result["alpha"], 4), round(result["beta"], 3)) == (-0.1114, 5.858)
    assert (len(result["points"]), result["irreducible_error"]) == (5, None)
    scores = [round(100 * p["score"], 1) for p in result["predictions"].values()][:3]
    assert scores == [79.7, 79.1, 81.9]  # bigG's size is the zoo's: no such run is in the table
    for prediction in result["predictions"].values():
        low, high = prediction["score_interval"]
        assert 0 <= low <= prediction["score"] <= high <= 1
    # g/14 at 34B was later measured at 78.5%: inside the interval.
    low, high = result["predictions"]["ViT-g-14@34B"]["score_interval"]
    assert low < 0.785 < high
    assert [Path(p).name for p in result["plots"]] == ["all.svg", "all.png"]
    assert all(Path(p).stat().st_size > 10_000 for p in result["plots"])
    (far,) = result["warnings"]
    assert far.startswith("ViT-H-14@1000B has 29 times the compute of the largest run")
    text = describe(fitted)
    assert "power law through 5 points of 29 runs" in text
    assert "ViT-H-14@68B: 79.7% (not validated: " in text


def test_a_plot_reaches_beyond_all_runs_and_predictions(tmp_path: Path):
    largest = TABLE.select(LAION.metric, LAION.where)
    largest = LAION.runs(largest).compute.max()
    for predict in ((), ("ViT-B-32@100K",), ("ViT-B-32@100K", "ViT-H-14@1000B")):
        with (
            mock.patch.object(plots, "figure", autospec=True) as drawn,
            mock.patch.object(plots, "save", autospec=True, return_value=[]),
        ):
            fitted = fit(TABLE, replace(LAION, predict=predict, plot=tmp_path / "plot"))
        farthest = max([largest, *(run.compute for run in fitted.predictions.values())])
        assert farthest < drawn.call_args.kwargs["reach"] < 2 * farthest


def test_the_largest_models_are_predicted_from_the_others():
    """By the default form, from the runs on LAION-2B."""
    config = FitConfig(where=("upstream_dataset=LAION-2B",), evaluated=50_000, draws=100)
    for held, model in (("arch=ViT-H-14", "ViT-H-14"), ("arch=ViT-g-14", "ViT-g-14")):
        fitted = fit(TABLE, replace(config, hold_out=(held,)))
        result = strict(fitted)
        assert result["form"] in ("additive", "interaction")
        (run,) = result["hold_out"]["runs"]
        low, high = run["error_interval"]
        assert low < run["measured"] < high
        assert high - low < 0.06
        assert run["error"] == pytest.approx(run["measured"], rel=0.01)
        assert (run["model"], result["hold_out"]["inside_interval"]) == (model, 1)
        assert f"  {model}@" in describe(fitted)
    # Two sizes say nothing about a third, so there is nothing to test.
    table = table_of(measured(KNOWN["additive"], 0, 0.01, 3, 6))
    with pytest.raises(InputError, match="nothing to predict: of 18 runs, 6 are held out"):
        fit(table, replace(OURS, form="additive", hold_out=("arch=m300",)))


@pytest.mark.parametrize(("scale", "link"), [(300.0, "odds"), (3.0, "error")])
def test_few_scores_from_chance_have_a_law_of_their_odds(scale: float, link: str):
    """Validation cannot choose between scales by ten points."""
    runs = measured(KNOWN["additive"], 0, 0.0, 3, 4)
    runs = runs.where(np.argsort(runs.compute)[:10])
    odds = scale * (runs.compute / runs.compute.min()) ** -0.5
    scores = (1 / (1 + odds)).tolist()
    rows = zip(table_of(runs).rows, scores, strict=True)
    table = RunTable([{**row, "acc1": score} for row, score in rows])
    config = FitConfig(metric="acc1", draws=100)
    assert fit(table, config).link == link
    assert fit(table, replace(config, procedure="frontier")).link == "error"


def table_at_chance(metric: str, guesses: float, value: Callable[[float], float]) -> RunTable:
    """Runs whose errors are those of an additive law of the odds, with chance at `guesses`."""
    runs = measured(KNOWN["additive"], 0, 0.0, 3, 4)
    odds = 3 * (runs.size / runs.size.min()) ** -0.3
    odds += 20 * (runs.samples / runs.samples.min()) ** -0.5
    values = [value(error) for error in (guesses * odds / (1 + odds)).tolist()]
    rows = zip(table_of(runs).rows, values, strict=True)
    return RunTable([{**row, metric: x} for row, x in rows])


@pytest.mark.parametrize(
    ("metric", "chance", "guesses", "value"),
    [("acc1", 0.1, 0.9, lambda error: 1 - error), ("info_nce", 6.93, 6.93, float)],
)
def test_chance_is_given_or_fitted_for_scores_and_losses(metric, chance, guesses, value):
    table = table_at_chance(metric, guesses, value)
    largest = max(table.rows, key=lambda row: number(row, "samples_seen"))
    name = f"{largest['arch']}@{largest['samples_seen']}"
    config = FitConfig(metric=metric, form="additive", draws=100, predict=(name,))
    plain = fit(table, config)
    assert plain.chance in (None, 0.0)
    for stated in (chance, "fitted"):
        fitted = fit(table, replace(config, link="odds", chance=stated))
        assert fitted.chance == pytest.approx(chance, rel=0.01)
        assert f"of the odds with chance at {fitted.chance:.4g}" in describe(fitted)
        answer: Any = fitted.predictions[name].answer.metric
        assert answer.value == pytest.approx(number(largest, metric), rel=1e-3)
    # Without a scale, validation chooses it.
    assert fit(table, replace(config, chance=chance)).link == "odds"


def test_a_chance_that_cannot_be_is_one_message():
    for changes, message in [
        ({"chance": 0.1, "classes": 10}, "set one of them"),
        ({"chance": 0.1, "link": "error"}, "link=error has no chance level"),
        ({"chance": 1.0}, "chance"),
        ({"metric": "info_nce", "classes": 10}, "set chance to the error of random guesses"),
        ({"metric": "info_nce", "link": "odds"}, "set chance to the error of random guesses"),
        ({"metric": "info_nce", "chance": 0.0}, "chance"),
    ]:
        with pytest.raises(InputError, match=message):
            FitConfig(**changes)
    table = table_at_chance("info_nce", 6.93, float)
    with pytest.raises(InputError, match="chance=1 is not above any value of info_nce"):
        fit(table, FitConfig(metric="info_nce", chance=1.0))


def test_families_are_compared_from_one_table():
    config = FitConfig(
        where=LAION.where, compare="upstream_dataset", form="additive", link="error", draws=100
    )
    fitted = fit(TABLE, config)
    result = strict(fitted)
    assert set(result["families"]) == {"LAION-2B", "LAION-400M", "LAION-80M"}
    assert result["form"] == "additive"
    for family in result["families"].values():
        assert len(family["residuals"]) == family["runs"]
        for at in family["curve"]:
            assert at["interval"][0] <= at["error"] <= at["interval"][1]
    # Its exponent may be as large as the search allows, and so may the coefficient.
    samples_scale = result["families"]["LAION-400M"]["parameters"]["samples_scale"]
    assert samples_scale["value"] is None
    assert samples_scale["interval"][0] > 1
    assert len(result["pairs"]) == 3
    small = next(x for x in result["pairs"] if x["families"] == ["LAION-2B", "LAION-80M"])
    # With the largest compute more data are better, surely.
    assert small["segments"][-1]["better"] == 0
    assert small["ratios"][1]["low"] > 1.2
    assert small["paired"]["pairs"] == 9  # B/32, B/16 and L/14 at 3B, 13B and 34B
    text = describe(fitted)
    assert "LAION-80M compared with LAION-2B:" in text
    assert "3e+12: LAION-2B is better" in text
    assert "in 9 pairs of matching runs: +24.7" in text
    few = fit(TABLE, replace(config, where=(), form="saturating"))
    assert few.warnings[0].startswith("CLIP-WIT is left out: 3 points cannot determine")
    assert "irreducible   not determined (95%: 0 to" in describe(few)


def test_one_or_two_sizes_state_nothing_about_size():
    law = KNOWN["additive"]
    predict = ("m30@100B", "ViT-B-32@1B")
    table = table_of(measured(law, 0, 0.01, 1, 6))
    fitted = fit(table, replace(OURS, form="additive", predict=predict))
    result = strict(fitted)
    for name in ("size_alpha", "size_scale", "irreducible"):
        parameter = result["parameters"][name]
        assert (parameter["value"], parameter["lacking"]) == (
            None,
            "runs of at least three model sizes",
        )
    assert "optimal" not in result
    same, other = result["predictions"].values()
    assert same["error"] == pytest.approx(law(30.0, 1e11), rel=0.05)
    assert (other["error"], other["lacking"]) == (None, "runs of at least three model sizes")
    text = describe(fitted)
    assert "size_alpha    not determined; it takes runs of at least three model sizes" in text
    assert "ViT-B-32@1B: not determined; it takes runs of at least three model sizes" in text
    # By default a table of two sizes gets a law of compute.
    assert fit(table_of(measured(law, 0, 0.01, 2, 6)), OURS).form in OF_COMPUTE
    assert fit(table_of(measured(law, 0, 0.01, 3, 6)), OURS).form == "additive"


def test_what_a_law_takes_besides_is_a_column():
    law = KNOWN["repeated"]
    table = table_of(measured(law, noise=0.001))
    config = replace(OURS, form="repeated", predict=("m300@100M", "m300@100M/1M"))
    fitted = fit(table, config)
    result = strict(fitted)
    assert result["parameters"]["fade"]["value"] == pytest.approx(15, rel=0.05)
    new, again = (x["error"] for x in result["predictions"].values())
    assert new == pytest.approx(law(300.0, 1e8), rel=0.01)
    assert again == pytest.approx(law(300.0, 1e8, 1e6), rel=0.01)
    assert result["optimal"]["size_exponent"]["value"] == pytest.approx(0.3 / 0.8, rel=0.03)
    assert "best division of compute: N grows as C^0.3" in describe(fitted)
    with pytest.raises(InputError, match="no column 'global_batch'"):
        fit(table, replace(config, form="batched"))
    rows = table_of(measured(KNOWN["batched"], noise=0.001)).rows
    batches = RunTable([row | {"global_batch": row["unique_samples"]} for row in rows])
    fitted = fit(batches, replace(OURS, form="batched"))
    result = strict(fitted)
    best = result["best_batch"]
    assert best["value"] == pytest.approx(0.02 * best["samples"] ** 0.5, rel=0.05)
    assert best["interval"][0] < best["value"] < best["interval"][1]
    assert "best batch size for" in describe(fitted)
    # The same batch everywhere: nothing about batches is stated.
    alike = RunTable([row for row in batches.rows if row["global_batch"] == 1e4])
    fitted = fit(alike, replace(OURS, form="batched", predict=("m300@1B", "m300@1B/10K")))
    result = strict(fitted)
    best, same = (x["error"] for x in result["predictions"].values())
    assert (best, same) == (None, pytest.approx(KNOWN["batched"](300.0, 1e9, 1e4), rel=0.01))
    assert "best_batch" not in result
    assert result["parameters"]["steps"]["value"] is None


def test_a_batch_size_that_runs_do_not_determine_is_not_used():
    """No run is so short that its steps count."""
    law = replace(KNOWN["batched"], steps=np.array(1e-3))
    rows = table_of(measured(law, noise=0.01)).rows
    table = RunTable([row | {"global_batch": row["unique_samples"]} for row in rows])
    fitted = fit(table, replace(OURS, form="batched", predict=("m300@1B", "m300@1B/10K")))
    result = strict(fitted)
    best, same = (x["error"] for x in result["predictions"].values())
    assert (best, same) == (None, pytest.approx(law(300.0, 1e9, 1e4), rel=0.03))
    assert "m300@1B: not determined; it takes a wider range of " in describe(fitted)
    assert "for the best batch size, or a run to predict with its /BATCH" in describe(fitted)
    assert "best_batch" not in result
    highest = law(3.0, 1e6, 1e3)
    assert all(point["error"] < 2 * highest for point in result["curve"])


def test_a_reader_can_fit_the_points_again():
    runs = measured(KNOWN["power"], 0, 0.05, 1, 20, seeds=4)
    runs = runs.where((np.arange(80) < 40) | (np.arange(80) % 4 == 0))
    result = strict(fit(table_of(runs), replace(OURS, form="power")))
    columns = ("size", "samples", "error", "seeds", "weight")
    size, samples, error, seeds, weight = np.array(
        [[point[name] for name in columns] for point in result["points"]]
    ).T
    assert sorted({*seeds.tolist()}) == [1, 4]
    x, y = np.log(size * samples), np.log(error)
    slope, height = np.polyfit(x, y, 1, w=np.sqrt(weight))
    assert (slope, np.exp(height)) == pytest.approx((result["alpha"], result["beta"]))
    squares = (weight * (y - slope * x - height) ** 2).sum()
    noise = np.sqrt(squares / result["degrees_of_freedom"])
    assert result["noise"] == pytest.approx(noise, rel=1e-3)


def test_held_out_runs_are_named_by_what_they_differ_in():
    rows = table_of(measured(KNOWN["additive"], 0, 0.01, 4, 4, seeds=2)).rows
    rows = [
        row | {"seed": str(i % 2), "lr": 1e-3 * (1 + i % 2), "data": "LAION"}
        for i, row in enumerate(rows)
    ]
    fitted = fit(RunTable(rows), replace(OURS, hold_out=("arch=m300", "samples_seen>=1e10")))
    runs = strict(fitted)["hold_out"]["runs"]
    assert [run["settings"] for run in runs] == [
        {"lr": "0.001", "seed": "0"},
        {"lr": "0.002", "seed": "1"},
    ]
    assert "  m300@10B, lr 0.001, seed 0: " in describe(fitted)


FLOPS = ("training_flops", "student_flops")


def test_the_axis_of_a_law_may_be_samples_hours_or_flops():
    runs = measured(KNOWN["power"], 0, 0.01, 1, 8)
    table = RunTable(
        [
            row | {"seconds/total": 3.6e-3 * count} | dict.fromkeys(FLOPS, count)
            for row, count in zip(table_of(runs).rows, runs.samples.tolist(), strict=True)
        ]
    )
    laws = {
        name: fit(table, replace(OURS, against=name, form="power"))
        for name in ("compute", "samples", "hours", *FLOPS)
    }
    for name, law in laws.items():
        assert law.law.alpha == pytest.approx(laws["compute"].law.alpha)
        assert (
            describe(law)
            .splitlines()[0]
            .endswith(
                {
                    "compute": "pairs seen",
                    "samples": "C in pairs seen",
                    "hours": "C in hours",
                    "training_flops": "C in training FLOPs",
                    "student_flops": "C in training FLOPs without the teacher's",
                }[name]
            )
        )
    assert laws["hours"].law.points[0].compute == pytest.approx(1)
    assert laws["samples"].law.points[0].compute == pytest.approx(1e6)
    predicted = fit(table, replace(OURS, against="samples", form="power", predict=("m30@1B",)))
    error: Any = predicted.predictions["m30@1B"].answer.error
    assert error.value == pytest.approx(KNOWN["power"](30.0, 1e9), rel=0.02)
    with pytest.raises(InputError, match="a law of compute or samples, not of hours"):
        fit(table, replace(OURS, against="hours", predict=("m30@1B",)))


def test_seeds_checkpoints_and_evaluated_images_count():
    runs = measured(KNOWN["power"], 0, 0.03, 1, 10, seeds=4)
    rows = [
        row | {"seed": i % 4, "name": f"r{i // 8}"} for i, row in enumerate(table_of(runs).rows)
    ]
    plain = fit(RunTable(rows), replace(OURS, form="power"))
    assert (len(plain.law.points), plain.law.runs, len(plain.law.residuals)) == (10, 40, 40)
    assert "through 10 points of 40 runs" in describe(plain)
    apart = RunTable([row | {"lr": 1e-3 * (1 + i % 2)} for i, row in enumerate(rows)])
    assert len(fit(apart, replace(OURS, form="power")).law.points) == 20
    many = RunTable([row | {"lr": i} for row in rows for i in range(10)])
    widths = []
    for table, run in ((RunTable(rows), None), (many, "name"), (many, None)):
        law = fit(table, replace(OURS, form="power", run=run)).law
        low, high = law.parameters["alpha"].interval
        widths.append(high - low)
    assert widths[2] < 0.6 * widths[0]
    assert widths[1] > 1.2 * widths[2]
    table = RunTable([row | {"acc": 1 - x} for row in rows if (x := float(row["error"])) < 1])
    wide, narrow = (
        fit(table, FitConfig(metric="acc", form="power", evaluated=x, predict=("m30@1B",)))
        for x in (20, None)
    )
    scores: list[Any] = [x.predictions["m30@1B"].answer.metric for x in (wide, narrow)]
    (wide_low, wide_high), (low, high) = (score.interval for score in scores)
    assert wide_high - wide_low > 1.5 * (high - low)


def test_sensitivity_is_the_answer_by_other_ways_to_fit():
    config = FitConfig(
        where=("upstream_dataset=LAION-2B",),
        predict=("ViT-L-14@12.8B",),
        sensitivity=True,
        draws=100,
    )
    fitted = fit(TABLE, config)
    result = strict(fitted)
    by = {x["variant"]: x for x in result["sensitivity"]}
    assert by["as asked"]["score"] == result["predictions"]["ViT-L-14@12.8B"]["score"]
    for bins in (3, 5, 10, 30):
        assert by[f"cherti, {bins} bins"]["score"] == pytest.approx(0.735, abs=0.015)
    assert by["without ViT-B-32"]["score"] != by["as asked"]["score"]
    assert {"form power", "form saturating", "frontier", "laion"} < set(by)
    text = describe(fitted)
    assert "the same answer by other ways to fit:" in text
    misfits = [name for name, x in by.items() if x["warnings"]]
    assert text.count("; MISFITS") == len(misfits)
    # Without a run to predict: the best division of ten times the largest compute.
    table = table_of(measured(KNOWN["additive"], 0, 0.01, 3, 4))
    fitted = fit(table, replace(OURS, sensitivity=True))
    result = strict(fitted)
    by = {x["variant"]: x for x in result["sensitivity"]}
    assert by["as asked"]["error"] < min(x["error"] for x in result["points"])
    assert by["without m3"]["error"] is None  # two sizes say nothing about a third
    assert "without m3                not determined" in describe(fitted)
    impossible = Variant(name="laion", answer=Answer(error=None), reason="there is none. Choose.")
    text = describe(replace(fitted, sensitivity=(impossible,)))
    assert "laion                     impossible: there is none" in text.splitlines()[-1]


def test_a_data_set_that_the_law_ignores_is_a_misfit():
    """Runs on 80M, 400M and 2B pairs differ by 25%; those on one set do not."""
    config = FitConfig(where=LAION.where, form="additive", link="error", draws=100)
    (warning,) = fit(TABLE, config).warnings
    assert "depend on the size, the samples or other settings of the runs" in warning
    assert fit(TABLE, replace(config, where=("upstream_dataset=LAION-2B",))).warnings == []


def test_more_metrics_and_files_by_one_command(tmp_path: Path):
    command = FitCommand(
        table=POINTS,
        where=("upstream_dataset=LAION-2B",),
        draws=100,
        form="power",
        link="error",
        also=("imagenetv2_acc1", "vtab_acc1"),
        output=tmp_path / "paper",
    )
    fitted = fit_file(command)
    result = strict(fitted)
    assert [x["metric"] for x in result["also"]] == ["imagenetv2_acc1", "vtab_acc1"]
    assert result["also"][0] == strict(fit(TABLE, replace(command, metric="imagenetv2_acc1")))
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted(
        Path(x).name for x in result["files"]
    )
    text = describe(fitted)
    for metric in ("imagenet1k_acc1", "imagenetv2_acc1", "vtab_acc1"):
        assert f"{metric}: power law through" in text


@pytest.mark.parametrize("form", [None, "power", "saturating", "additive"])
def test_degenerate_tables_have_valid_json_or_an_error(form: Any):
    """One run, few points, equal sizes, equal samples, flat and rising errors."""
    answers = 0
    for sizes, counts, error in (
        (1, 1, "known"),
        (1, 2, "known"),
        (1, 6, "known"),
        (4, 1, "known"),
        (2, 2, "known"),
        (2, 2, "flat"),
        (1, 6, "flat"),
        (3, 3, "flat"),
        (3, 3, "rising"),
    ):
        runs = measured(KNOWN["additive"], 0, 0.0, sizes, counts)
        if error != "known":
            rising = 0.01 * runs.samples**0.1 if error == "rising" else 0.5 + 0 * runs.size
            runs = runs._replace(error=rising)
        config = replace(OURS, form=form, predict=("m30@10B", "ViT-B-32@1B"), sensitivity=True)
        try:
            fitted = fit(table_of(runs), config)
            result = strict(fitted)
        except InputError:
            continue
        answers += 1
        assert to_json(result) == json.dumps(result)
        assert describe(fitted)
    assert answers >= 3


@pytest.mark.parametrize("evaluated", [None, 1_000])
@pytest.mark.parametrize("value", [0.0, 1e-200, 0.5, 1.0, 1e200])
def test_a_value_that_is_extreme_or_everywhere_is_fitted_or_named(value: float, evaluated):
    """A score of all runs, and of one; warnings of NumPy are errors in tests."""
    runs = measured(KNOWN["additive"], 0, 0.0, 3, 4)
    alone = np.arange(len(runs.error)) == 5
    for is_value in (alone, alone | True):
        scores = np.where(is_value, value, 1 / (1 + runs.error)).tolist()
        rows = zip(table_of(runs).rows, scores, strict=True)
        table = RunTable([row | {"acc": score} for row, score in rows])
        config = FitConfig(metric="acc", evaluated=evaluated, draws=100)
        if value >= 1:
            with pytest.raises(InputError, match=r"must be between 0 and 1|must be positive"):
                fit(table, config)
            continue
        result = fit(table, config)
        assert describe(result)
        assert strict(result)["points"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "imagenet"}, "no column 'imagenet'; it has arch, "),
        ({"where": ("arch",)}, "must be COLUMN=PATTERN"),
        ({"where": ("dataset=LAION",)}, "no column 'dataset'; it has arch, "),
        ({"where": ("arch=RN50",)}, "no row"),
        ({"predict": ("ViT-L-14",)}, "MODEL@SAMPLES"),
        ({"predict": ("ViT-L-14@many",)}, "not a number of samples"),
        ({"predict": ("ViT-X-14@1B",)}, "no architecture 'ViT-X-14'; did you mean"),
        ({"hold_out": ("samples_seen>1e30",)}, "nothing to predict"),
        ({"hold_out": ("samples_seen>1",)}, "nothing to predict"),
        ({"compare": "arch", "where": ("arch=ViT-H-14",)}, "needs two or more families"),
        ({"compare": "family"}, "no column 'family'; it has arch, "),
        ({"compare": "arch", "predict": ("ViT-H-14@34B",)}, "hold_out, predict, sensitivity and"),
        ({"run": "name"}, "no column 'name'"),
        ({"form": "additive"}, "needs sizes and samples; set procedure=all"),
        ({"metric": "mparams"}, "a score must be between 0 and 1"),
    ],
)
def test_wrong_use_is_told(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        fit(TABLE, replace(LAION, **changes))


def test_losses_are_errors_by_their_names():
    rows = table_of(measured(KNOWN["power"], 0, 0.01, 1, 8)).rows
    table = RunTable([row | {"info_nce": row["error"]} for row in rows])
    law = fit(table, FitConfig(metric="info_nce")).law
    assert law.alpha == pytest.approx(-0.11, abs=0.01)
    values = np.array([row["error"] for row in rows])
    assert values.min() < 1  # such that it could be taken for an accuracy


def test_files_of_a_fit_have_a_name(tmp_path: Path):
    """A folder alone, such as `--output .`, ends in a traceback."""
    for flag in ("plot", "output"):
        command = FitCommand(table=tmp_path / "t.csv", **{flag: Path()})
        with pytest.raises(InputError, match=f"{flag}='.' has no name; set a path such as paper"):
            fit_file(command)
