"""What a fit of a table answers, as JSON values and in words."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.scaling.fit import PUBLISHED, FitConfig, describe, fit
from clip_jax.scaling.run_table import gmacs, read
from tests.scaling.conftest import POINTS
from tests.scaling.known import KNOWN, measured, table_of

TABLE = read(POINTS)
LAION = FitConfig(where=("upstream_dataset=LAION*",), draws=100)


def test_the_eight_published_fits_to_four_digits():
    """From the published points, by the paper's own procedure."""
    for metric, laws in PUBLISHED.items():
        for models, (alpha, beta) in laws.items():
            data, through = ("LAION*", "frontier") if models == "LAION" else ("CLIP-WIT", "all")
            where = (f"upstream_dataset={data}",)
            law = fit(TABLE, FitConfig(metric=metric, where=where, through=through, draws=100))
            assert round(law["alpha"], 4) == alpha
            assert float(f"{law['beta']:.4g}") == beta


def test_fit_answers_with_what_scripts_rely_on(tmp_path: Path):
    config = replace(
        LAION,
        predict=(
            "ViT-H-14@68B",
            "ViT-g-14@34B",
            "ViT-bigG-14@68B",
            "ViT-B-32@100K",
            "ViT-H-14@1000B",
        ),
        hold_out=1e12,
        plot=tmp_path / "plots" / "imagenet",
    )
    result = json.loads(json.dumps(fit(TABLE, config)))  # JSON values throughout
    assert (round(result["alpha"], 4), round(result["beta"], 3)) == (-0.1114, 5.858)
    assert (len(result["points"]), result["irreducible_error"]) == (5, None)
    scores = [round(100 * p["score"], 1) for p in result["predictions"].values()][:3]
    assert scores == [79.7, 79.1, 81.9]  # bigG's size is the zoo's: no such run is in the table
    for prediction in result["predictions"].values():
        low, high = prediction["score_interval"]
        assert 0 <= low <= prediction["score"] <= high <= 1
    assert result["hold_out"]["mean_relative_error"] < 0.03
    assert result["hold_out"]["inside_interval"] == len(result["hold_out"]["runs"]) == 4
    assert [Path(p).name for p in result["plots"]] == ["imagenet.svg", "imagenet.png"]
    assert all(Path(p).stat().st_size > 10_000 for p in result["plots"])
    (far,) = result["warnings"]
    assert far.startswith("ViT-H-14@1000B has ")
    assert "times the compute of the largest run" in far
    text = describe(result)
    assert "ViT-H-14@68B: 79.7%" in text
    assert "4 of them inside the 95% interval" in text


def test_families_are_compared_from_one_table():
    config = replace(LAION, compare="upstream_dataset", through="all")
    result = json.loads(json.dumps(fit(TABLE, config)))
    assert set(result["families"]) == {"LAION-2B", "LAION-400M", "LAION-80M"}
    for family in result["families"].values():
        assert len(family["residuals"]) == family["runs"]
        for at in family["curve"]:
            assert at["interval"][0] < at["error"] < at["interval"][1]
    assert len(result["pairs"]) == 3
    small = next(x for x in result["pairs"] if x["families"] == ["LAION-2B", "LAION-80M"])
    # Of more data the law is steeper: with the largest compute it is better, surely.
    assert small["ratios"][1]["low"] > 1
    assert small["crossing"]["better"] == 0
    assert small["paired"]["pairs"] == 9  # B/32, B/16 and L/14 at 3B, 13B and 34B
    text = describe(result)
    assert "LAION-80M compared with LAION-2B:" in text
    assert "in 9 pairs of matching runs" in text
    few = fit(TABLE, replace(config, where=(), form="saturating"))
    assert few["warnings"][0].startswith("CLIP-WIT is left out: 3 points (all) cannot determine")
    assert "irreducible   not determined by these runs" in describe(few)
    parameters = [family["parameters"]["irreducible"] for family in few["families"].values()]
    assert min(x["interval"][0] for x in parameters) == 0  # and no error is negative


def test_what_a_law_takes_besides_is_a_column():
    law = KNOWN["repeated"]
    table = table_of(measured(law, noise=0))
    config = FitConfig(
        metric="error", metric_is="error", form="repeated", draws=100,
        predict=("m300@100M", "m300@100M/1M"),
    )  # fmt: skip
    result = fit(table, config)
    assert result["parameters"]["fade"]["value"] == pytest.approx(15, rel=0.05)
    new, again = (x["error"] for x in result["predictions"].values())
    assert new == pytest.approx(law(300.0, 1e8), rel=0.01)
    assert again == pytest.approx(law(300.0, 1e8, 1e6), rel=0.01)
    optimal = result["optimal"]
    assert optimal["size_exponent"]["value"] == pytest.approx(0.3 / 0.8, rel=0.03)
    for at in optimal["divisions"]:
        assert at["size"]["value"] * at["samples"]["value"] == pytest.approx(at["compute"])
    assert "best division of compute: N grows as C^0.3" in describe(result)
    with pytest.raises(InputError, match="no column 'global_batch'"):
        fit(table, replace(config, form="batched"))


def test_a_budget_names_a_model_and_its_samples():
    law = KNOWN["additive"]
    table = table_of(measured(law, 0, 0.005, 12, 6))
    config = FitConfig(metric="error", metric_is="error", form="additive", draws=100)
    small, large = (fit(table, replace(config, budget=6e9 * c))["budget"] for c in (1e9, 1e11))
    sizes = np.geomspace(3, 300, 12)
    assert small["model"] == f"m{sizes[np.argmin(law(sizes, 1e9 / sizes))]:g}"
    shares = {option["model"]: option["share_of_draws"] for option in small["options"]}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[small["model"]] > 0.5
    # A larger budget buys a larger model.
    assert float(large["model"][1:]) > float(small["model"][1:])
    config = replace(LAION, where=("upstream_dataset=LAION-2B",), form="additive")
    small, large = (fit(TABLE, replace(config, budget=budget))["budget"] for budget in (1e20, 1e23))
    for budget in (small, large):
        assert len(budget["options"]) == 5  # the models in the table
        spent = budget["samples"] * gmacs(zoo.get(budget["model"])) * 6e9
        assert spent == pytest.approx(budget["training_flops"], rel=2e-3)
    chosen = fit(TABLE, replace(config, budget=1e23, candidates=("ViT-bigG-14", "ViT-B-32")))
    assert "1e+23 training FLOPs: ViT-bigG-14 on" in describe(chosen)


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
        ({"hold_out": 1e30}, "nothing to predict"),
        ({"compare": "arch", "where": ("arch=ViT-H-14",)}, "needs two or more families"),
        ({"compare": "family"}, "no column 'family'; it has arch, "),
        ({"compare": "arch", "predict": ("ViT-H-14@34B",)}, "hold_out, predict, budget and plot"),
    ],
)
def test_wrong_use_is_told(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        fit(TABLE, replace(LAION, **changes))
