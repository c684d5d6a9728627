"""Ranks of methods at several scales: SciPy's correlations, their bootstrap, and the table."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from clip_jax.cli import commands
from clip_jax.errors import InputError
from clip_jax.scaling import rank_correlation
from clip_jax.scaling.rank_correlation import RanksConfig, describe, ranks

SCALES = ("small", "medium", "large")
VALUES = {  # DataComp, table 3: ImageNet accuracies of ways to filter
    "No filtering": (0.025, 0.176, 0.459),
    "Basic": (0.038, 0.226, 0.516),
    "Text-based": (0.046, 0.255, 0.561),
    "Image-based": (0.043, 0.268, 0.572),
    "LAION-2B": (0.031, 0.230, 0.553),
    "CLIP score": (0.051, 0.273, 0.578),
    "Image and CLIP": (0.039, 0.297, 0.631),
}


@pytest.fixture
def table(tmp_path) -> Path:
    """A row per method and scale; one method has two seeds, and one a single scale."""
    with (tmp_path / "table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("scale", "filter", "samples_seen", "top1"))
        for method, values in VALUES.items():
            for name, samples, value in zip(SCALES, (1, 10, 100), values, strict=True):
                for off in (-0.01, 0.01) if method == "Basic" else (0.0,):
                    rows.writerow((name, method, samples, value + off))
        rows.writerow(("large", "Alone", 100, 0.7))
        rows.writerow(("large", "Unfinished", 100, ""))
    return tmp_path / "table.csv"


def test_correlations_are_scipys(table):
    result = ranks(RanksConfig(table=table, metric="top1", methods="filter"))
    assert [pair["scales"] for pair in result["pairs"]] == [
        ["small", "medium"],
        ["small", "large"],
        ["medium", "large"],
    ]
    small, medium, _ = np.array([*VALUES.values()]).T
    first = result["pairs"][0]
    assert first["methods"] == 7
    assert first["spearman"]["value"] == pytest.approx(stats.spearmanr(small, medium).statistic)
    assert first["kendall"]["value"] == pytest.approx(stats.kendalltau(small, medium).statistic)
    assert (first["best"], first["rank_of_best"]) == ("CLIP score", 2)
    for name in ("spearman", "kendall"):
        low, high = first[name]["interval"]
        assert -1 <= low < first[name]["value"] < high <= 1
    # The same order at both scales says nothing about how sure it is.
    assert result["pairs"][2]["spearman"] == {"value": 1.0, "interval": None}


def test_the_methods_are_listed_with_values_and_ranks(table):
    result = ranks(RanksConfig(table=table, metric="top1", methods="filter"))
    alone, best = result["methods"][:2]
    assert alone["method"] == "Alone"
    assert alone["ranks"] == {"small": None, "medium": None, "large": 1}
    assert best["method"] == "Image and CLIP"
    assert best["ranks"] == {"small": 4, "medium": 1, "large": 2}
    text = describe(result)
    assert "small and medium, 7 methods: Spearman 0.71 (95%: " in text
    assert "CLIP score, the best at small, is number 2 at medium" in text
    assert "medium and large, 7 methods: Spearman 1.00 (95%: unknown)" in text
    assert "Basic           0.038 (5)  0.226 (6)  0.516 (7)" in text
    assert "Alone                   -          -    0.7 (1)" in text


def test_of_an_error_the_lowest_is_the_best(table):
    config = RanksConfig(table=table, metric="top1", metric_is="error", methods="filter")
    result = ranks(config)
    assert result["pairs"][0]["best"] == "No filtering"
    assert result["pairs"][0]["rank_of_best"] == 1
    assert result["methods"][0]["ranks"]["large"] == 1


def test_draws_with_repeated_methods_are_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=(2, 9)).astype(float)
    draws = rng.integers(9, size=(20, 9))
    ours = [f(x, y, draws) for f in (rank_correlation.spearman, rank_correlation.kendall)]
    for i, draw in enumerate(draws):
        wanted = (f(x[draw], y[draw]).statistic for f in (stats.spearmanr, stats.kendalltau))
        np.testing.assert_allclose([each[i] for each in ours], [*wanted], atol=1e-12)
    assert np.isnan(rank_correlation.kendall(x, y, np.zeros((1, 9), int))).all()


def test_scales_may_be_conditions(table, capsys):
    args = ["scale", "ranks", str(table), "--metric", "top1", "--methods", "filter"]
    args += ["--scales", "samples_seen<=1", "samples_seen>50", "--json"]
    assert commands.main(args) == 0
    (pair,) = json.loads(capsys.readouterr().out)["pairs"]
    assert pair["scales"] == ["samples_seen<=1", "samples_seen>50"]
    assert pair["methods"] == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "data"}, "no column 'data'; it has scale, filter"),
        ({"scales": ("size",)}, "no column 'size'"),
        ({"metric": "top5"}, "no column 'top5'"),
        ({"scales": ("scale=small", "scale=tiny")}, r"share 3 methods .* scale=tiny \(0\)"),
        ({"where": ("filter=Basic",)}, r"no two scales share 3 methods of filter"),
    ],
)
def test_wrong_use_is_explained(table, changes, message):
    values = {"table": table, "metric": "top1", "methods": "filter"} | changes
    with pytest.raises(InputError, match=message):
        ranks(RanksConfig(**values))


def test_scales_are_named():
    with pytest.raises(InputError, match="scales is empty"):
        RanksConfig(table=Path("a.csv"), metric="top1", methods="filter", scales=())
