"""A config that cannot run is refused before anything starts."""

import contextlib

import pytest

from clip_jax import flops
from clip_jax.config import Config, StageConfig
from clip_jax.data.batch_plan import SigLIP2Lengths, TokenBudget
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


TWO = {"model": COCA, "objective": (SoftmaxConfig(), CaptionConfig(weight=0.0)), "steps": 10}
SIZES, LENGTHS = TokenBudget(patches=(4, 12), multiple=8), SigLIP2Lengths(patches=(4, 12))


@pytest.mark.parametrize(
    ("stages", "changes", "says"),
    [
        ([(0.5, (1, 1), None)], {}, None),
        ([(0.0, (0, 1), None), (0.5, (1, 1), None)], {}, None),
        ([(0.5, None, 12)], {"model": NAFLEX, "objective": (SoftmaxConfig(),)}, None),
        ([(1.0, None, None)], {}, r"stages\.begin=1.0"),
        ([(0.5, (1,), None)], {}, r"stages\.0\.weights=\(1,\) must .* \(contrastive, caption\)"),
        ([(0.2, (1, 1), None), (0.5, (0, 0), None)], {}, r"stages\.1\.weights=.* not 0"),
        ([(0.5, None, None), (0.2, None, None)], {}, r"begin=\[0.5, 0.2\] must increase"),
        ([(0.5, None, None), (0.51, None, None)], {}, r"they begin at \[0, 5, 5\] of 10 steps"),
        ([(0.5, None, 12)], {}, r"stages\.0\.max_patches=12 needs a NaFlex model"),
        (
            [(0.5, None, 12)],
            {"model": NAFLEX, "objective": (SoftmaxConfig(),), "lengths": SIZES},
            r"max_patches=12 needs a NaFlex model and no lengths",
        ),
    ],
)
def test_stages_follow_each_other_and_fit(stages, changes, says):
    names = "begin", "weights", "max_patches"
    with pytest.raises(InputError, match=says) if says else contextlib.nullcontext():
        made = tuple(StageConfig(**dict(zip(names, x, strict=True))) for x in stages)
        config = Config(**{**TWO, **changes}, stages=made)
        assert [config.batches.at(step).stage for step in (0, 4, 5, 9)] == [1, 1, 2, 2]
        assert config.batches.at(9).max_patches == stages[-1][2]
        recipe = config.recipe_of(config.batches.at(9))
        weights = made[-1].weights or [term.weight for term in config.objective]
        assert [term.weight for term in recipe.objective] == [*weights]


def test_a_stage_begins_at_its_share_of_a_stretched_schedule():
    stages = tuple(StageConfig(begin=begin) for begin in (0.5, 0.8, 0.9, 0.95))
    config = Config(model=NAFLEX, steps=1_275, batch_size=16, stages=stages, lengths=LENGTHS)
    assert config.first_steps == (0, 500, 800, 900, 1_088)
    assert config.schedule_step(1_088) == pytest.approx(950, abs=0.2)


def test_flops_of_a_stage_leave_out_what_it_does_not_compute():
    stages = (StageConfig(begin=0.5, weights=(1, 1)),)
    config = Config(**TWO, stages=stages)
    first, second = config.flops_after(1), config.flops_after(6) - config.flops_after(5)
    written = flops.of_step(config.recipe_of(config.batches.at(9))).decoder
    assert second - first == written > 0


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
