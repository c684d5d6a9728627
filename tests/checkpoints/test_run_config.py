"""A `config.json` of an older version gets today's names."""

import copy

import pytest

from clip_jax.checkpoints import run_config
from clip_jax.checkpoints.run_config import is_renamed, upgrade

UPGRADES = list(run_config.UPGRADES)  # of the package, without those of `table`
RENAMED = {
    "rate": "learning_rate",
    "data.window": "data.shuffle_blocks",
    "data.source.members.part": "data.source.members.shard",
    "evals.looks": None,
    "caption": "captioning",
}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(run_config, "RENAMED", RENAMED)
    monkeypatch.setattr(run_config, "UPGRADES", [lambda config: config.setdefault("steps", 1)])


def test_fields_get_their_new_names():
    before = {
        "rate": 0.1,
        "data": {"window": 3, "seed": 0, "source": {"members": [{"part": 1}, {"part": 2, "x": 3}]}},
        "evals": [{"looks": 5, "pool": 6}, {"pool": 7}],
        "caption": {"weight": 2.0},
    }
    after = {
        "learning_rate": 0.1,
        "data": {
            "seed": 0,
            "shuffle_blocks": 3,
            "source": {"members": [{"shard": 1}, {"x": 3, "shard": 2}]},
        },
        "evals": [{"pool": 6}, {"pool": 7}],
        "captioning": {"weight": 2.0},
        "steps": 1,
    }
    assert upgrade(before) == after
    assert upgrade(copy.deepcopy(after)) == after


@pytest.mark.parametrize("config", [{"data": None}, {"data": [1, "x"]}, {"evals": 3}])
def test_a_damaged_config_is_left_as_it_is(config):
    assert upgrade(copy.deepcopy(config)) == config | {"steps": 1}


@pytest.mark.parametrize(
    ("path", "now"),
    [
        ("rate", (True, "learning_rate")),
        ("rates", (False, "rates")),
        ("evals.looks", (True, None)),
        ("caption.weight", (True, "captioning.weight")),
    ],
)
def test_a_field_of_a_renamed_group_is_renamed(path, now):
    assert is_renamed(path) == now


@pytest.mark.parametrize("config", [{"model": {"remat": "dots"}}, {"model": {"remat": "full"}}, {}])
def test_what_a_run_saves_keeps_its_meaning(config, monkeypatch):
    monkeypatch.setattr(run_config, "UPGRADES", UPGRADES)
    saved = config.get("model", {}).get("remat")
    model = upgrade(copy.deepcopy(config)).get("model", {})
    assert model.get("remat") == ("hidden" if saved == "dots" else saved)
