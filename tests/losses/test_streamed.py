"""The ÷N trap in jax: the reason for the shape of `losses/streamed.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@jax.custom_vjp
def local_loss(x: jax.Array) -> jax.Array:
    return lax.psum((x**2).sum(), "data")


local_loss.defvjp(lambda x: (local_loss(x), x), lambda x, cotangent: (2 * x * cotangent,))


def test_custom_vjp_inside_a_shard_map_divides_by_the_shards() -> None:
    """Here for whoever moves it inside; if this fails, jax has changed and `streamed` may too."""
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    loss = jax.shard_map(local_loss, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
    value, slope = jax.jit(jax.value_and_grad(lambda w: loss(w * x)))(3.0)
    assert value == 9 * 140
    assert slope == pytest.approx(6 * 140 / 8)
