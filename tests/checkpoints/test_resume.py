"""What may change where a run resumes."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from clip_jax.checkpoints.resume import branch_point, check_resumable, differences
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.config import Config, StageConfig
from clip_jax.config_files import as_begun, complete, load_config, of_run
from clip_jax.data.order.mixture import MemberConfig, MixtureConfig, MixtureSource, PhaseConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.errors import InputError
from clip_jax.losses import SoftmaxConfig
from clip_jax.optim import Constant, OptimConfig
from clip_jax.serialize import to_dict
from tests.conftest import ROOT
from tests.data.conftest import Numbers


def resume(workdir, config):
    before = complete(read_run_config(workdir))
    check_resumable(workdir, before, to_dict(config), config.samples_after)


@given(st.text(min_size=1), st.integers(1, 10**9))
@example("gs://bucket/user@example.com/parent", 20_000)
def test_a_branch_point_is_any_path_and_a_step(run, step):
    assert branch_point(f"{run}@{step}") == (run, step)


@pytest.mark.parametrize("text", ["runs/a", "@5", "runs/a@", "runs/a@0", "runs/a@-5", "runs/a@1.5"])
def test_what_is_no_branch_point_is_refused(text):
    with pytest.raises(InputError, match=r"must be RUN@STEP"):
        branch_point(text)


BEFORE = json.loads((ROOT / "tests/golden/run_configs.json").read_text())  # of version 4beb54a


@pytest.mark.parametrize("name", BEFORE)
def test_a_run_of_the_version_before_resumes(name, tmp_path):
    config = load_config(ROOT / f"configs/{name}.py")
    (tmp_path / "config.json").write_text(json.dumps(BEFORE[name]))
    resume(tmp_path, config)
    assert of_run(to_dict(config)) == config
    # What a step recomputes changes no result, so a config may choose it anew.
    stored = load_config(tmp_path / "config.json")
    assert replace(stored, model=replace(stored.model, remat=config.model.remat)) == config
    with pytest.raises(InputError, match=r"  seed: 0 in .*, 7 given"):
        resume(tmp_path, replace(config, seed=7))


@pytest.mark.parametrize(("order", "other"), [("blocks", "global"), ("global", "blocks")])
def test_the_order_that_a_run_began_with_is_kept(order, other, tmp_path):
    """Also where the data have moved since."""
    config = Config()
    assert as_begun(config, tmp_path).data.order == "auto"
    before = to_dict(config)
    before["data"]["order"] = order
    (tmp_path / "config.json").write_text(json.dumps(before))
    resumed = as_begun(config, tmp_path)
    assert resumed.data.order == order
    resume(tmp_path, resumed)
    changed = replace(config, data=replace(config.data, order=other))
    with pytest.raises(InputError, match=f"data.order: {order} in .*, {other} given"):
        resume(tmp_path, changed)


def test_the_record_of_stretched_positions_is_that_of_the_run(tmp_path):
    """A resumed run does not read the weights that it began with."""
    config = Config()
    before = to_dict(config)
    before["model"]["text"] |= {"stretched_from": 30, "kept_positions": 7}
    (tmp_path / "config.json").write_text(json.dumps(before))
    resumed = as_begun(config, tmp_path)
    assert to_dict(resumed) == before
    resume(tmp_path, config)  # a ladder's point, which has no record


def test_a_resumed_run_has_the_same_config_but_may_be_longer_if_its_schedule_has_no_end(tmp_path):
    cosine, endless = Config(), Config(optim=OptimConfig(schedule=Constant()))
    other_loss = replace(cosine, objective=(SoftmaxConfig(mask_same_caption=True),))
    staged = replace(endless, stages=(StageConfig(begin=0.5),))
    for before, now, message in (
        (endless, replace(endless, steps=9_999), "steps: 10000 in .*, 9999 given"),
        (cosine, replace(cosine, steps=10_001), "steps: 10000 in .*, 10001 given"),
        (staged, replace(staged, steps=10_001), "steps: 10000 in .*, 10001 given"),
        (cosine, other_loss, r"objective\.0\.mask_same_caption: False in .*, True given"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(to_dict(before)))
        with pytest.raises(InputError, match=message):
            resume(tmp_path, now)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(endless)))
    resume(tmp_path, replace(endless, steps=10_001, report_every=7, wandb_project="clip"))


WEIGHTS = st.sampled_from([0.0, 1.0, 3.0])
PATHS = st.sampled_from(["a", "b", "c"])


@st.composite
def mixtures(draw):
    """Draw a mixture: paths with weights, and phases as (first sample, weights)."""
    members = draw(st.lists(st.tuples(PATHS, WEIGHTS), min_size=1, max_size=3))
    starts = draw(st.lists(st.sampled_from([8, 15, 16, 24]), max_size=2).map(sorted))
    weights = st.lists(WEIGHTS, min_size=len(members), max_size=len(members)).filter(any)
    assume(any(weight for _, weight in members))
    return members, [(start, draw(weights)) for start in starts]


@st.composite
def pairs_of_mixtures(draw):
    """Draw two mixtures, of which the second often extends the first."""
    before = members, phases = draw(mixtures())
    if draw(st.booleans()):
        return before, draw(mixtures())
    added = draw(st.lists(st.tuples(PATHS, WEIGHTS), max_size=1))
    weights = [x for _, x in members] + [x for _, x in added]
    later = [(start, [*old, *(0.0 for _ in added)]) for start, old in phases]
    start = draw(st.sampled_from([15, 16, 24]))
    later += [(start, weights)] * (
        draw(st.booleans()) and start >= max([0, *(x for x, _ in phases)])
    )
    if draw(st.booleans()):
        added = [(path, 0.0) for path, _ in added]
    return before, ([*members, *added], later)


def mixed(members, phases):
    return MixtureConfig(
        members=tuple(MemberConfig(source=TarConfig(path=path), weight=x) for path, x in members),
        phases=tuple(PhaseConfig(from_sample=at, weights=tuple(x)) for at, x in phases),
    )


def first_samples(members, phases, count):
    """Return (path, number) of the first samples that a run reads."""
    source = MixtureSource(mixed(members, phases), [Numbers(5_000) for _ in members])
    order = source.order(seed=0)
    samples = (source.key(order[at]).split("/") for at in range(count))
    return [(members[int(member)][0], number) for member, number in samples]


@example((([("a", 1.0), ("b", 3.0)], []), ([("a", 1.0), ("b", 3.0)], [(15, [0.0, 1.0])])))
@example((([("a", 1.0), ("b", 3.0)], []), ([("a", 1.0), ("b", 3.0)], [(16, [0.0, 1.0])])))
@example((([("a", 1.0)], []), ([("a", 1.0), ("b", 1.0)], [])))
@given(pairs=pairs_of_mixtures())
def test_a_mixture_that_may_resume_has_read_the_same_samples(pairs):
    """After 16 samples, a run may add members of weight 0 and phases that start later. Any other
    change would alter the samples that it has read."""
    (old, old_phases), (new, new_phases) = pairs
    before, now = (
        to_dict(Config(batch_size=8, data=DataConfig(source=mixed(*each)))) for each in pairs
    )
    added = new[len(old) :]
    is_longer = (
        new[: len(old)] == old
        and not any(weight for _, weight in added)
        and new_phases[: len(old_phases)] == [(at, x + [0.0] * len(added)) for at, x in old_phases]
        and all(at >= 16 for at, _ in new_phases[len(old_phases) :])
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "checkpoints/2").mkdir(parents=True)
            check_resumable(Path(folder), before, now, lambda steps: 8 * steps)
    except InputError:
        assert not is_longer
    else:
        assert is_longer
        assert first_samples(*pairs[0], 16) == first_samples(*pairs[1], 16)


VALUES = st.booleans() | st.integers(0, 3) | st.text("ab", max_size=1)
TREES = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=8,
)


@given(old=TREES, new=TREES)
def test_differences_lead_from_one_config_to_the_other(old, new):
    """Each of them names one field, with its two values."""
    listed = differences(old, new)
    assert differences(old, old) == []
    assert {name: (y, x) for name, x, y in listed} == {
        name: (x, y) for name, x, y in differences(new, old)
    }
    for name, x, y in listed:
        assert x != y
        assert at(old, name) == x
        assert at(new, name) == y
    assert (not listed) == (old == new)


def at(tree, name):
    for part in filter(None, name.split(".")):
        tree = tree[int(part)] if isinstance(tree, list) else tree.get(part)
    return tree
