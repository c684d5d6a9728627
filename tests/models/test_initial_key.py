"""Random keys of initial weights: their numbers are random, and the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from clip_jax.models.initial_key import initial_key
from clip_jax.sharding import MeshConfig, make_mesh


def streams(count: int) -> list[np.ndarray]:
    """Numbers of keys that are related as those of one model's parameters are."""
    root = initial_key(0)
    layers = jax.random.split(jax.random.fold_in(root, 7), count // 2)
    others = [jax.random.fold_in(root, i) for i in range(count - len(layers))]
    return [np.asarray(jax.random.bits(key, (4096,))) for key in (*layers, *others)]


def test_each_bit_is_one_in_half_of_all_numbers():
    bits = np.unpackbits(np.stack(streams(64)).view(np.uint8)).reshape(-1, 32)
    z = (bits.mean(0) - 0.5) * 2 * len(bits) ** 0.5
    assert abs(z).max() < 4.5


def test_numbers_of_related_keys_are_not_correlated():
    values = np.stack(streams(64)) / 2.0**32 - 0.5
    between = np.corrcoef(values)[np.triu_indices(64, 1)] * 4096**0.5
    within = np.array([np.corrcoef(x[:-1], x[1:])[0, 1] for x in values]) * 4095**0.5
    for z in (between, within):
        assert abs(z).max() < 4.5
        assert z.std() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_numbers_are_distributed_as_jax_says(seed):
    key = initial_key(seed)
    assert stats.kstest(jax.random.normal(key, (20_000,)), "norm").pvalue > 0.01
    assert stats.kstest(jax.random.uniform(key, (20_000,)), "uniform").pvalue > 0.01
    assert len(np.unique(jax.random.bits(key, (20_000,)))) > 19_990


def test_seeds_and_places_in_an_array_have_their_own_numbers():
    draws = [jax.random.bits(initial_key(seed), (64, 8)) for seed in range(100)]
    assert len(np.unique(draws)) > 64 * 8 * 100 - 10


def test_numbers_are_the_same_on_a_mesh():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    draw = jax.jit(
        lambda: jax.random.bits(initial_key(3), (8, 6, 4)),
        out_shardings=NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor")),
    )
    np.testing.assert_array_equal(draw(), jax.random.bits(initial_key(3), (8, 6, 4)))


def test_keys_of_a_split_are_those_under_vmap():
    keys = jax.random.split(initial_key(0), 3)
    together = jax.vmap(lambda key: jax.random.bits(key, (5,)))(keys)
    one_by_one = jnp.stack([jax.random.bits(key, (5,)) for key in keys])
    np.testing.assert_array_equal(together, one_by_one)
