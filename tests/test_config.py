"""A config that cannot run is refused before anything starts."""

import contextlib

import pytest

from clip_jax.config import Config
from clip_jax.data.batch_plan import TokenBudget
from clip_jax.errors import InputError
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.held_out_pairs import PairsEvalConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import (
    CaptionConfig,
    DistillationConfig,
    LiveTeacher,
    SoftmaxConfig,
    StoredTeacher,
)
from clip_jax.models.lora import LoRAConfig
from clip_jax.optim import OptimConfig
from clip_jax.optim.wrappers import TOWERS
from tests.conftest import COCA, NAFLEX, TINY

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


LIVE = DistillationConfig(teachers=(LiveTeacher(weights="x", model=TINY),))
STORED = DistillationConfig(teachers=(StoredTeacher(embed_dim=8),))


@pytest.mark.parametrize(
    ("tower", "changes", "says"),
    [
        ("image", {}, None),
        ("text", {}, None),
        ("image", {"objective": (SoftmaxConfig(captions="both", mask_same_caption=True),)}, None),
        ("image", {"branch_from": "run@3"}, None),
        ("image", {"init_from": None}, "stored=image needs the weights of that tower"),
        ("text", {"init_towers": ("image",)}, "stored=text needs the weights of that tower"),
        (
            "image",
            {"model": COCA, "objective": (CaptionConfig(),)},
            "caption_states, decoder",
        ),
        ("text", {"objective": (SoftmaxConfig(captions="both"),)}, "text:synthetic needs more"),
        ("text", {"objective": (SoftmaxConfig(mask_same_caption=True),)}, "mask_same_caption need"),
        ("text", {"objective": (LIVE,)}, r"distillation\.teachers needs more"),
        ("image", {"objective": (STORED,)}, r"distillation\.teachers needs more"),
        ("image", {"lora": LoRAConfig()}, "lora needs more"),
        ("image", {"optim": OptimConfig(locked=("text",))}, "leaves nothing to train"),
        (
            "image",
            {"model": NAFLEX, "lengths": TokenBudget(patches=(4, 12), multiple=8)},
            "lengths needs images",
        ),
    ],
)
def test_a_run_with_a_stored_tower_needs_no_more_of_it(tower, changes, says):
    with pytest.raises(InputError, match=says) if says else contextlib.nullcontext():
        config = Config(**{"model": TINY, "init_from": "x", "stored": tower} | changes)
        trained = {path.split("/")[0] for path in config.recipe.dimensions()}
        assert trained == {"visual", "text", "logit_scale"} - {TOWERS[tower]}
