"""One metric against another: known lines are recovered, and what lies outside is marked."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special

from clip_jax.errors import InputError
from clip_jax.scaling.downstream import RelateConfig, describe, fit_line, is_curved, relate
from tests.scaling.conftest import POINTS


def write(path: Path, **columns: Any) -> Path:
    """Write a table with these columns."""
    n = len(next(iter(columns.values())))
    columns = {"arch": ["a"] * n, "samples_seen": [1] * n, "gmacs_per_sample": [1] * n} | columns
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    return path


LOSS = np.geomspace(3.0, 0.5, 12)
TOP1 = special.expit(0.4 - 1.5 * np.log(LOSS))


def test_accuracy_follows_from_a_predicted_loss(tmp_path: Path):
    """The line is exact here, so that only the interval of the loss is left."""
    table = write(tmp_path / "t.csv", info_nce=LOSS, top1=TOP1)
    config = RelateConfig(
        table=table, metric="top1", against="info_nce", at=("1", "0.6:0.55:0.65", "0.25")
    )
    result = relate(config)
    assert result["slope"]["value"] == pytest.approx(-1.5)
    assert result["intercept"] == pytest.approx(0.4)
    single, ranged, far = result["predictions"].values()
    assert single["value"] == pytest.approx(special.expit(0.4))
    np.testing.assert_allclose(single["interval"], single["value"], rtol=1e-6)
    half = 1.5 * np.log(0.65 / 0.55) / 2
    middle = 0.4 - 1.5 * np.log(0.6)
    np.testing.assert_allclose(
        ranged["interval"], special.expit([middle - half, middle + half]), rtol=1e-6
    )
    assert far["value"] == pytest.approx(special.expit(0.4 + 1.5 * np.log(4)))
    assert result["warnings"] == [
        "info_nce 0.25 lies outside the range of the line's runs: extrapolated"
    ]
    text = describe(result)
    assert "logit(top1) = 0.4 -1.5 · ln(info_nce) through 12 runs" in text
    assert "info_nce 1: top1 59.9% (95%: 59.9% to 59.9%)" in text


def test_a_family_lies_above_the_line_of_its_baseline_or_of_all_others(tmp_path: Path):
    shift = np.array([0.0] * 12 + [0.5] * 4)
    x = np.concatenate([np.linspace(-1, 1, 12), np.linspace(-0.5, 0.5, 4)])
    y = -0.7 + 1.3 * x + shift
    table = write(
        tmp_path / "t.csv", acc=special.expit(x), v2=special.expit(y), kind=["a"] * 12 + ["b"] * 4
    )
    config = RelateConfig(table=table, metric="v2", against="acc", compare="kind")
    wanted = special.expit(-0.2) - special.expit(-0.7)
    for baseline in ("a", None):
        result = relate(RelateConfig(**vars(config) | {"baseline": baseline}))
        family = result["families"]["b"]
        assert family["runs"] == 4
        assert family["difference"] == pytest.approx(wanted)
        assert ("a" in result["families"]) == (baseline is None)
        assert "b, 4 runs: +11.8 points from the line" in describe(result)


def test_families_are_listed_in_the_same_order_in_every_process(tmp_path: Path):
    """A set of names has another order in each process."""
    names = [f"family {i}" for i in range(8)]
    columns = {"info_nce": np.tile(LOSS, 2), "top1": np.tile(TOP1, 2), "kind": (3 * names)[::-1]}
    table = write(tmp_path / "t.csv", **columns)
    config = RelateConfig(table=table, metric="top1", against="info_nce", compare="kind")
    assert list(relate(config)["families"]) == names


def test_intervals_hold_a_new_run_and_a_mean_of_runs_in_95_percent():
    rng, inside = np.random.default_rng(0), np.zeros(2)
    for _ in range(2_000):
        u = rng.normal(size=8)
        line = fit_line(u, 1 + 2 * u + rng.normal(size=8))
        for i, n in enumerate((1, 4)):
            middle, half = line.predict(np.array([1.5, 1.0]), n)
            inside[i] += abs(4 + rng.normal(size=n).mean() - middle) < half
    np.testing.assert_allclose(inside / 2_000, 0.95, atol=0.015)


def test_a_bend_is_noticed_and_straight_runs_are_not_called_bent():
    rng = np.random.default_rng(0)
    u = np.linspace(-1, 1, 12)
    noise = 0.1 * rng.normal(size=(500, 12))
    straight = [is_curved(u, u + x) for x in noise]
    assert np.mean(straight) < 0.03
    assert np.mean([is_curved(u, u + u**2 + x) for x in noise]) > 0.99
    assert not is_curved(u[:4], u[:4] ** 2)  # too few to tell


def test_published_robustness_is_above_the_line_for_openai_s_models():
    config = RelateConfig(
        table=POINTS,
        metric="imagenet_robustness_acc1",
        against="imagenet1k_acc1",
        compare="upstream_dataset",
        baseline="LAION-2B",
    )
    result = relate(config)
    assert result["runs"] == 11
    assert result["families"]["CLIP-WIT"]["interval"][0] > 0
    assert {"LAION-400M", "LAION-80M"} < {*result["families"]}
    assert sum("extrapolated" in line for line in result["warnings"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "percent"}, "percent reaches from 1 to 12; it must be above 0 and below 1"),
        ({"against": "no_loss"}, "no_loss reaches from 0 to 0; it must be above 0 and below inf"),
        ({"compare": "family"}, "no column 'family'"),
        ({"where": ("info_nce<0.6",)}, "2 runs do not determine a line"),
        ({"compare": "arch"}, "0 runs do not determine a line"),
        ({"compare": "arch", "baseline": "b"}, "baseline='b' is no family of arch, which are "),
        ({"against": "top1"}, "metric and against are both 'top1'; set two metrics"),
        ({"baseline": "a"}, "set --compare to the column of families"),
        ({"at": ("lots",)}, "at='lots': write VALUE or VALUE:LOW:HIGH"),
        ({"at": ("1:2",)}, "at='1:2': write VALUE or VALUE:LOW:HIGH"),
        ({"at": ("1:2:3",)}, "at='1:2:3': .* must be between LOW and HIGH"),
        ({"at": ("0",)}, "info_nce reaches from 0 to 0; it must be above 0"),
    ],
)
def test_what_has_no_line_is_explained(changes: dict[str, Any], message: str, tmp_path: Path):
    columns = {"info_nce": LOSS, "top1": TOP1, "percent": range(1, 13), "no_loss": [0] * 12}
    values = {"table": write(tmp_path / "t.csv", **columns), "metric": "top1"}
    with pytest.raises(InputError, match=message):
        relate(RelateConfig(**{**values, "against": "info_nce"} | changes))
