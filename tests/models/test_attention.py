"""Attention: every backend is one function, in value and gradient, each where it may run."""

import functools
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import sharding
from clip_jax.models import attention, short_attention
from clip_jax.sharding import make_mesh
from tests.conftest import MESHES
from tests.models.exact_attention import check_padding, errors, interpreted, xla_of_tpu


@pytest.mark.parametrize(
    ("dtype", "xla", "factor"),
    [(jnp.float32, attention.xla, 2.0), (jnp.bfloat16, xla_of_tpu, 1.001)],
)
def test_the_short_kernel_is_as_exact_as_xla(dtype, xla, factor):
    """By root mean square: which of two has the largest error is luck. In bfloat16 the output is
    found by the same arithmetic, in another order: a thousandth for that."""
    with mock.patch.object(short_attention, "_TOGETHER", 19**2):  # a row at a time
        (_, ours), (_, theirs) = (
            errors(x, 19, 2, 64, True, (19, 5), dtype) for x in (interpreted, xla)
        )
    assert all(a <= factor * b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("batch", "length", "heads", "dim", "causal", "lengths"),
    [
        (1, 257, 2, 64, False, None),
        (1, 131, 4, 64, True, (129,)),  # three tokens past a full register, two of padding
        (1, 130, 1, 80, False, (130,)),
        (1, 17, 4, 96, False, None),  # four heads in three registers
        (2, 12, 2, 80, False, (1, 12)),
        (3, 17, 1, 128, True, (17, 4, 9)),  # a head fills a register
        (2, 33, 2, 64, False, None),  # two rows at once
        (1, 33, 8, 16, True, None),  # many heads share a register
        (1, 21, 3, 24, True, (20,)),  # none
    ],
)
def test_the_short_kernel_for_any_shape(batch, length, heads, dim, causal, lengths):
    most, _ = errors(interpreted, length, heads, dim, causal, lengths, batch=batch)
    assert max(most) <= 3e-6


def test_the_short_kernel_for_two_blocks_of_rows_and_of_lanes():
    """A row at a time, which is less to compile."""
    lengths = (19, 1, 2, 3, 18, 19, 7, 19, 5)
    with mock.patch.object(short_attention, "_TOGETHER", 19**2):
        most, _ = errors(interpreted, 19, 4, 64, False, lengths, batch=9)
    assert max(most) <= 3e-6


@pytest.mark.parametrize(
    ("batch", "length", "heads", "dim", "causal", "lengths"),
    [(3, 19, 4, 64, False, (19, 1, 7)), (2, 33, 8, 16, True, None), (1, 17, 2, 128, True, (9,))],
)
def test_the_short_kernel_without_vmem_for_eight_rows(batch, length, heads, dim, causal, lengths):
    by_row = functools.partial(interpreted, room=0)
    with mock.patch.object(short_attention, "_by_token", autospec=True, side_effect=AssertionError):
        most, _ = errors(by_row, length, heads, dim, causal, lengths, batch=batch)
    assert max(most) <= 3e-6


@pytest.mark.parametrize("mesh", ["8", "2x2x2"])
def test_the_short_kernel_on_a_mesh(mesh):
    """Each device its rows and heads; padding travels along."""
    layout = sharding.layout(make_mesh(MESHES[mesh]), "short")

    def attend(flat, heads, causal, lengths):  # the model keeps the axes where heads are split
        qkv = flat if layout.whole_heads else flat.reshape(8, 9, 3, heads, 16)
        return layout.attend(qkv, heads, causal, lengths)

    most, _ = errors(attend, 9, 2, 16, True, tuple(range(1, 9)), batch=8)
    assert max(most) <= 3e-6


@pytest.mark.parametrize(("causal", "lengths"), [(False, None), (True, None), (False, (7, 2))])
def test_cudnn_gets_even_lengths(causal, lengths):
    """JAX refuses it odd ones in training; a token more changes nothing."""
    plain = jax.nn.dot_product_attention

    def even(q, k, v, *, implementation, **options):
        assert (implementation, q.shape[1] % 2) == ("cudnn", 0)
        return plain(q, k, v, **options)

    with mock.patch.object(jax.nn, "dot_product_attention", autospec=True, side_effect=even):
        got, _ = errors(attention.cudnn, 7, 2, 8, causal, lengths, jnp.bfloat16)
    expected, _ = errors(attention.xla, 7, 2, 8, causal, lengths, jnp.bfloat16)
    np.testing.assert_allclose(got, expected, rtol=0.1)
    with pytest.raises(ValueError, match=r"set --model\.dtype bfloat16"):
        attention.cudnn(jnp.zeros((1, 4, 48), jnp.float32), 2)


def cudnn_by_xla(qkv, heads, causal, lengths):
    """The backend `cudnn`, with XLA's attention in place of the kernel, which needs a GPU."""
    plain = jax.nn.dot_product_attention

    def called(*parts, implementation, **options):
        return plain(*parts, **options)

    with mock.patch.object(jax.nn, "dot_product_attention", autospec=True, side_effect=called):
        return attention.cudnn(qkv, heads, causal, lengths)


@pytest.mark.parametrize(
    ("attend", "shape", "lengths", "bound", "dtype"),
    [
        (attention.xla, (19, 2, 64), (19, 1, 7), 3e-6, jnp.float32),
        (interpreted, (19, 2, 64), (19, 1, 7), 3e-6, jnp.float32),
        (interpreted, (21, 2, 72), (20, 21, 1), 3e-6, jnp.float32),  # So400m's heads, row by row
        (cudnn_by_xla, (7, 2, 8), (7, 1, 4), 2e-2, jnp.bfloat16),
    ],
    ids=["xla", "short", "short, any heads", "cudnn"],
)
def test_padding_is_not_attended_to(attend, shape, lengths, bound, dtype):
    check_padding(attend, shape, lengths, bound, dtype)


TPU = functools.partial(SimpleNamespace, platform="tpu")
GPU = functools.partial(SimpleNamespace, platform="gpu", device_kind="NVIDIA")


@pytest.mark.parametrize("lengths", [None, (5, 3)])
def test_weights_are_those_of_the_backends(lengths):
    """The mean over heads of the output's weights, which values of the unit matrix show."""
    qkv = np.random.default_rng(0).standard_normal((2, 5, 3, 2, 5), np.float32)
    qkv[:, :, 2] = np.eye(5)[:, None]
    lengths = None if lengths is None else jnp.array(lengths)
    q, k, _ = attention.split_heads(jnp.asarray(qkv), 2)
    expected = attention.xla(jnp.asarray(qkv), 2, False, lengths).mean(2)
    found = attention.weights(q, k, lengths)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1, :3], expected[1, :3], rtol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "length", "heads", "dim", "dtype", "expected"),
    [
        (TPU(device_kind="TPU v5 lite"), 257, 16, 64, "bfloat16", "short"),
        (TPU(device_kind="TPU v6 lite"), 577, 16, 64, "bfloat16", "short"),
        (TPU(device_kind="TPU v5"), 257, 16, 80, "bfloat16", "short"),
        (TPU(device_kind="TPU v5"), 257, 16, 20, "bfloat16", "xla"),
        (TPU(device_kind="TPU v5 lite"), 1025, 12, 64, "bfloat16", "splash"),
        (TPU(device_kind="TPU v4"), 577, 16, 64, "bfloat16", "splash"),  # 16 MiB of VMEM
        (TPU(device_kind="TPU v4"), 257, 16, 64, "bfloat16", "short"),  # one row at a time
        (TPU(device_kind="TPU v4"), 257, 16, 64, "float32", "xla"),
        (TPU(device_kind="TPU v5"), 730, 16, 72, "bfloat16", "short"),
        (TPU(device_kind="TPU v5"), 1024, 16, 72, "bfloat16", "splash"),  # 64 MiB
        (TPU(device_kind="TPU v5"), 576, 12, 64, "bfloat16", "short"),
        (TPU(device_kind="TPU v5 lite"), 1024, 12, 64, "bfloat16", "short"),
        (GPU(compute_capability="9.0"), 197, 12, 64, "bfloat16", "cudnn"),
        (GPU(compute_capability="9.0"), 197, 12, 64, "float32", "xla"),
        (GPU(compute_capability="7.5"), 197, 12, 64, "bfloat16", "xla"),
        (SimpleNamespace(platform="cpu"), 197, 12, 64, "bfloat16", "xla"),
        (None, 197, 12, 64, "bfloat16", "xla"),
    ],
)
def test_auto_chooses_by_device_and_length(device, length, heads, dim, dtype, expected):
    assert attention.choose(device, length, heads, dim, dtype) == expected


@pytest.mark.parametrize("room", [0, short_attention.VMEM])
def test_a_batch_of_no_rows(room):
    qkv, weight = jnp.zeros((0, 5, 3 * 128)), jnp.zeros((0, 5, 128))
    out, back = jax.vjp(lambda x: interpreted(x, 2, False, None, room), qkv)
    assert (out.shape, back(weight)[0].shape) == (weight.shape, qkv.shape)


def test_a_sequence_that_does_not_fit_is_refused():
    v4 = TPU(device_kind="TPU v4")
    attention.check_short(v4, 257, 16, 64, "bfloat16")
    with pytest.raises(ValueError, match=r"577 tokens .* TPU v4 has 16; set --model.attention"):
        attention.check_short(v4, 577, 16, 64, "bfloat16")
