"""JAX's splash attention kernel in interpret mode, whose programs are too large for unit tests."""

import functools

from clip_jax import sharding
from clip_jax.models import attention
from clip_jax.sharding import make_mesh
from tests.conftest import MESHES
from tests.models.exact_attention import check_padding, errors


def test_splash_on_a_mesh_is_causal_attention_of_any_size():
    """Rows and heads are sharded. Their length and size are no multiples of the kernel's blocks."""
    layout = sharding.layout(make_mesh(MESHES["2x2x2"]), "splash")

    def attend(flat, heads, causal, lengths):  # the model keeps the axes where heads are split
        qkv = flat if layout.whole_heads else flat.reshape(8, 9, 3, heads, 16)
        return layout.attend(qkv, heads, causal, lengths)

    most, _ = errors(attend, 9, 2, 16, True, tuple(range(1, 9)), batch=8)
    assert max(most) <= 2e-5


def test_splash_does_not_attend_to_padding():
    """One row has whole blocks of padding, the other a single valid key."""
    splash = functools.partial(attention.splash, interpret=True)
    check_padding(splash, (514, 1, 64), (257, 1), 2e-5)
