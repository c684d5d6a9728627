"""What may change where a run resumes."""

import json
from dataclasses import replace

import pytest

from clip_jax.checkpoints.resume import check_resumable, differences
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.config import Config
from clip_jax.config_files import complete, load_config, of_run, with_order
from clip_jax.data.order.mixture import MemberConfig, MixtureConfig, PhaseConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.errors import InputError
from clip_jax.losses import SoftmaxConfig
from clip_jax.optim import Constant, OptimConfig
from clip_jax.serialize import to_dict
from tests.conftest import ROOT


def resume(workdir, config):
    before = complete(read_run_config(workdir))
    check_resumable(workdir, before, to_dict(config), config.samples_after)


BEFORE = json.loads((ROOT / "tests/golden/run_configs.json").read_text())  # of version 4beb54a


@pytest.mark.parametrize("name", BEFORE)
def test_a_run_of_the_version_before_resumes(name, tmp_path):
    config = load_config(ROOT / f"configs/{name}.py")
    (tmp_path / "config.json").write_text(json.dumps(BEFORE[name]))
    resume(tmp_path, config)
    assert load_config(tmp_path / "config.json") == config == of_run(to_dict(config))
    with pytest.raises(InputError, match=r"  seed: 0 in .*, 7 given"):
        resume(tmp_path, replace(config, seed=7))


@pytest.mark.parametrize(("order", "other"), [("blocks", "global"), ("global", "blocks")])
def test_the_order_that_a_run_began_with_is_kept(order, other, tmp_path):
    """Also where the data have moved since."""
    config = Config()
    assert with_order(config, tmp_path).data.order == "auto"
    before = to_dict(config)
    before["data"]["order"] = order
    (tmp_path / "config.json").write_text(json.dumps(before))
    resumed = with_order(config, tmp_path)
    assert resumed.data.order == order
    resume(tmp_path, resumed)
    changed = replace(config, data=replace(config.data, order=other))
    with pytest.raises(InputError, match=f"data.order: {order} in .*, {other} given"):
        resume(tmp_path, changed)


def test_a_resumed_run_has_the_same_config_but_may_be_longer_if_its_schedule_has_no_end(tmp_path):
    cosine, endless = Config(), Config(optim=OptimConfig(schedule=Constant()))
    other_loss = replace(cosine, objective=(SoftmaxConfig(mask_same_caption=True),))
    for before, now, message in (
        (endless, replace(endless, steps=9_999), "steps: 10000 in .*, 9999 given"),
        (cosine, replace(cosine, steps=10_001), "steps: 10000 in .*, 10001 given"),
        (cosine, other_loss, r"objective\.0\.mask_same_caption: False in .*, True given"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(to_dict(before)))
        with pytest.raises(InputError, match=message):
            resume(tmp_path, now)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(endless)))
    resume(tmp_path, replace(endless, steps=10_001, report_every=7, wandb_project="clip"))
    assert differences({"a": 1}, {"a": 1, "b": 2}) == [("b", None, 2)]


def test_a_resumed_mixture_may_only_have_more_members_from_a_phase_to_come(tmp_path):
    """Other paths and weights were accepted, and changed what had been read."""

    def config(weights, *phases, paths=("a", "b", "c")):
        members = tuple(
            MemberConfig(source=TarConfig(path=path), weight=weight)
            for path, weight in zip(paths, weights, strict=False)
        )
        mixed = tuple(PhaseConfig(from_sample=at, weights=x) for at, x in phases)
        return Config(
            batch_size=8, data=DataConfig(source=MixtureConfig(members=members, phases=mixed))
        )

    (tmp_path / "checkpoints/2").mkdir(parents=True)  # at sample 16
    before = config((1.0, 3.0), (8, (1.0, 1.0)))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(before)))
    added = config((1.0, 3.0, 0.0), (8, (1.0, 1.0, 0.0)), (16, (1.0, 1.0, 1.0)))
    for allowed in (before, added, config((1.0, 3.0), (8, (1.0, 1.0)), (24, (0.0, 1.0)))):
        resume(tmp_path, allowed)
    for other in (
        config((1.0, 3.0), (8, (1.0, 1.0)), paths=("a", "d")),
        config((1.0, 2.0), (8, (1.0, 1.0))),
        config((1.0, 3.0), (8, (1.0, 2.0))),
        config((1.0, 3.0), (8, (1.0, 1.0)), (15, (0.0, 1.0))),
        config((1.0, 3.0, 1.0), (8, (1.0, 1.0, 0.0))),
        config((1.0,), (8, (1.0,))),
    ):
        with pytest.raises(InputError, match=r"another config:\n  data\.source\."):
            resume(tmp_path, other)
