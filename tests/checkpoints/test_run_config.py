"""A `config.json` of an older version gets today's names."""

import copy

import pytest

from clip_jax.checkpoints.run_config import upgrade


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        ({"model": {"remat": "dots"}}, {"model": {"remat": "hidden"}}),
        ({"model": {"remat": "full"}}, {"model": {"remat": "full"}}),
        ({}, {}),
        ({"model": None}, {"model": None}),  # damaged
        ({"model": [1, "x"]}, {"model": [1, "x"]}),
    ],
)
def test_what_a_run_saves_keeps_its_meaning(saved, now):
    assert upgrade(copy.deepcopy(saved)) == now
    assert upgrade(copy.deepcopy(now)) == now
