"""A person's own file: what is wrong in it is said with its place, and never passes for success."""

import json
from dataclasses import replace
from unittest import mock

import pytest

from clip_jax.cli.commands import main
from clip_jax.config import Config, check_resumable, differences, load_config, of_run, with_order
from clip_jax.data.order.mixture import MemberConfig, MixtureConfig, PhaseConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.errors import InputError
from clip_jax.losses import SoftmaxConfig
from clip_jax.models import zoo
from clip_jax.optim import Constant, OptimConfig
from clip_jax.serialize import to_dict
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import sys\nsys.exit(0)\n", ":2: SystemExit: 0"),
        ("import nowhere_at_all\n", ":1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("x = 1\ndef get_config(:\n", ":2: SyntaxError: invalid syntax"),
        ("x = '\x00'\n", ": "),
        ("x = 1\n", "has no get_config()"),
        ("get_config = 3\n", ": TypeError: 'int' object is not callable"),
        ("def get_config():\n    return 1\n", "returned int, not a Config"),
        ("from clip_jax.models import zoo\ndef get_config():\n    zoo.get('B')\n", ":3: no arch"),
    ],
)
def test_an_error_in_a_config_file_is_said_with_its_line(text, says, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith((f"clip-jax: {path}", f"clip-jax: get_config() of {path}"))
    assert says in line


def test_a_bug_of_ours_under_a_config_file_stays_a_bug(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from clip_jax.models import zoo\ndef get_config():\n    zoo.get('RN50')\n")
    with mock.patch.object(zoo, "ARCHITECTURES", None), pytest.raises(TypeError):
        load_config(path)


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe{}", b"[]", b'{"steps": "many"}', b'{"steps": 0}', b"[" * 100_000]
)
def test_a_damaged_config_json_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        load_config(path)


BEFORE = json.loads((ROOT / "tests/golden/run_configs.json").read_text())  # of version e1a3b50


@pytest.mark.parametrize("name", BEFORE)
def test_a_run_of_the_version_before_resumes(name, tmp_path):
    config = load_config(ROOT / f"configs/{name}.py")
    (tmp_path / "config.json").write_text(json.dumps(BEFORE[name]))
    check_resumable(tmp_path, config)
    assert load_config(tmp_path / "config.json") == config == of_run(to_dict(config))
    with pytest.raises(InputError, match=r"  seed: 0 in .*, 7 given"):
        check_resumable(tmp_path, replace(config, seed=7))


@pytest.mark.parametrize(
    ("data", "order", "other"),
    [
        ({"order": "blocks"}, "blocks", "global"),
        ({"order": "stretches"}, "blocks", "global"),  # its name before
        ({}, "global", "blocks"),
    ],
)
def test_the_order_that_a_run_began_with_is_kept(data, order, other, tmp_path):
    """Also where the data have moved since, and where there was but one order."""
    config = Config()
    assert with_order(tmp_path, config).data.order == "auto"
    before = to_dict(config)
    del before["data"]["order"]
    before["data"] |= data
    (tmp_path / "config.json").write_text(json.dumps(before))
    resumed = with_order(tmp_path, config)
    assert resumed.data.order == order
    check_resumable(tmp_path, resumed)
    changed = replace(config, data=replace(config.data, order=other))
    with pytest.raises(InputError, match=f"data.order: {order} in .*, {other} given"):
        check_resumable(tmp_path, changed)


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
            check_resumable(tmp_path, now)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(endless)))
    check_resumable(tmp_path, replace(endless, steps=10_001))
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
        check_resumable(tmp_path, allowed)
    for other in (
        config((1.0, 3.0), (8, (1.0, 1.0)), paths=("a", "d")),
        config((1.0, 2.0), (8, (1.0, 1.0))),
        config((1.0, 3.0), (8, (1.0, 2.0))),
        config((1.0, 3.0), (8, (1.0, 1.0)), (15, (0.0, 1.0))),
        config((1.0, 3.0, 1.0), (8, (1.0, 1.0, 0.0))),
        config((1.0,), (8, (1.0,))),
    ):
        with pytest.raises(InputError, match=r"another config:\n  data\.source\."):
            check_resumable(tmp_path, other)
