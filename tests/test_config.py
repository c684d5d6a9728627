"""A config that cannot run is refused before anything starts."""

import pytest

from clip_jax.config import Config
from clip_jax.errors import InputError
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.held_out_pairs import PairsEvalConfig
from clip_jax.evals.suite import SuiteEvalConfig

PAIRS, DIGITS, SUITE = PairsEvalConfig(), DigitsEvalConfig(), SuiteEvalConfig


@pytest.mark.parametrize(
    ("evals", "both"),
    [
        ((PAIRS, DIGITS, SUITE()), None),
        ((PAIRS, PairsEvalConfig(pool=2)), "held-out pairs"),
        ((PAIRS, PairsEvalConfig(name="web"), PairsEvalConfig(name="news")), None),
        ((PairsEvalConfig(name="web"), PAIRS, PairsEvalConfig(name="web")), r"web \(zero-shot\)"),
        ((DIGITS, DigitsEvalConfig(per_number=1)), "the bundled digits"),
        ((SUITE(dataset=("food101",)), SUITE(dataset=("pets", "food101"))), "food101"),
        ((SUITE(dataset=("food101",)), SUITE(dataset=("food101",), tasks=("probe",))), None),
        ((SUITE(), SUITE(dataset=("mnist",))), "mnist"),
        ((SUITE(dataset=("folder:a/x",)), SUITE(dataset=("folder:~/b/x",))), "x"),
        ((SUITE(dataset=("folder:a/x", "folder:b/x")), SUITE(dataset=("folder:b",))), "b"),
        ((SUITE(dataset=("folder:a/x",)), SUITE(dataset=("folder:gs://b/y",))), None),
        ((SUITE(dataset=("folder:a/web",)), PairsEvalConfig(name="web")), "web"),
    ],
)
def test_two_evaluators_with_the_same_metrics_are_refused(evals, both):
    """The second one's `info_nce` would replace the first one's in `result.json`."""
    if both is None:
        assert Config(evals=evals).evals == evals
    else:
        with pytest.raises(InputError, match=rf"evals\.0 and evals\.\d both measure {both}"):
            Config(evals=evals)
