"""Attention: every backend is one function, in value and gradient, each where it may run."""

import dataclasses
import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax import sharding
from clip_jax.config import load_config
from clip_jax.losses import SoftmaxConfig
from clip_jax.models import attention, zoo
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.short_attention import short, vmem_bytes
from clip_jax.optim import OptimConfig
from clip_jax.pods import compile as pod
from clip_jax.pods.compile import Request
from clip_jax.pods.topology import Topology
from clip_jax.pods.work import KERNEL
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Recipe
from tests.conftest import ROOT

MESHES = {
    "8": MeshConfig(),
    "4x2": MeshConfig(data=4, fsdp=2),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def inputs(length, heads, dim, batch=2, seed=0):
    """Queries, keys and values [B, L, S, N, K] and the output's gradient."""
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((batch, length, 3, heads, dim)),
        rng.standard_normal((batch, length, heads, dim)),
    )


def exact(qkv, weight, causal, lengths):
    """Output and gradient in float64, by the formulas."""
    q, k, v = np.moveaxis(qkv, 2, 0)
    length, scale = qkv.shape[1], qkv.shape[-1] ** -0.5
    scores = np.einsum("BQNK,BLNK->BNQL", q, k) * scale
    if causal:
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    if lengths is not None:
        real = np.arange(length) < np.asarray(lengths)[:, None]
        scores = np.where(real[:, None, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("BNQL,BLNK->BQNK", p, v)
    dp = np.einsum("BQNK,BLNK->BNQL", weight, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    dq, dk = np.einsum("BNQL,BLNK->BQNK", ds, k), np.einsum("BNQL,BQNK->BLNK", ds, q)
    return out, np.stack([dq, dk, np.einsum("BNQL,BQNK->BLNK", p, weight)], 2)


@functools.partial(jax.jit, static_argnums=(0, 3))
def both(attend, qkv, weight, causal, lengths):
    """Output and gradient of an attention, which gets its channels in one axis."""
    batch, length, _, heads, _ = qkv.shape
    flat = qkv.reshape(batch, length, -1)
    out, back = jax.vjp(lambda qkv: attend(qkv, heads, causal, lengths), flat)
    gradient = back(weight.reshape(out.shape))[0]
    return out.reshape(weight.shape), gradient.reshape(qkv.shape)


def alone(qkv, heads, causal, lengths):
    """The kernel, interpreted, without a mesh."""
    return short(qkv, lengths, heads, causal, lambda kernel, _: kernel, True)


@jax.custom_vjp
def rounded_back(x):
    """What is given, with a gradient that is rounded to bfloat16, whatever the compiler thinks."""
    return x


rounded_back.defvjp(
    lambda x: (x, None), lambda _, gradient: (jax.lax.reduce_precision(gradient, 8, 7),)
)


def xla_of_tpu(qkv, heads, causal, lengths):
    """XLA's attention in bfloat16, as it is computed on a TPU.

    There the weights' gradient is rounded to bfloat16 as the product leaves it, and the scores',
    which stays in float32, as an operand of products of default precision, by the matrix unit (both
    are looked at below). A CPU rounds neither.
    """
    batch, length, width = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, width // 3 // heads), 2, 0)
    scores = jnp.einsum("BQNK,BLNK->BNQL", q, k, preferred_element_type=jnp.float32)
    scores = rounded_back(scores) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    if lengths is not None:
        scores = jnp.where(jnp.arange(length) < lengths[:, None, None, None], scores, -jnp.inf)
    weights = rounded_back(jax.nn.softmax(scores)).astype(qkv.dtype)
    return jnp.einsum("BNQL,BLNK->BQNK", weights, v).reshape(batch, length, -1)


def errors(attend, length, heads, dim, causal, lengths, dtype, batch=2):
    """Errors of output and gradient against float64, in the largest value: the largest one, and
    the root of the mean square."""
    qkv, weight = inputs(length, heads, dim, batch)
    qkv, weight = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in (qkv, weight))
    if lengths is not None:
        lengths = jnp.asarray(lengths, jnp.int32)
        weight[np.arange(length) >= np.asarray(lengths)[:, None]] = 0
    expected = exact(qkv, weight, causal, lengths)
    arguments = jnp.asarray(qkv, dtype), jnp.asarray(weight, dtype), causal, lengths
    got = [np.asarray(x, np.float64) for x in both(attend, *arguments)]
    if lengths is not None:
        for x in (got[0], expected[0]):
            x[np.arange(length) >= np.asarray(lengths)[:, None]] = 0
    wrong = [np.abs(a - b) / np.abs(b).max() for a, b in zip(got, expected, strict=True)]
    return [x.max() for x in wrong], [np.sqrt((x**2).mean()) for x in wrong]


def assert_as_good_as_xla(length, heads, dim, causal, lengths=None):
    """By root mean square: which of two has the largest error is luck. In bfloat16 the output is
    found by the same arithmetic, in another order: a thousandth for that."""
    case = length, heads, dim, causal, lengths
    for dtype, xla, factor in (
        (jnp.float32, attention.xla, 2.0),
        (jnp.bfloat16, xla_of_tpu, 1.001),
    ):
        (most, ours), (xlas_most, xlas) = (errors(x, *case, dtype) for x in (alone, xla))
        print(
            *case,
            dtype.dtype,
            "output and gradient: at most, root mean square, their ratios to XLA's",
        )
        print(*(f"{x:.2e}" for x in (*most, *ours)))
        print(*(f"{a / b:.3f}" for a, b in zip((*most, *ours), (*xlas_most, *xlas), strict=True)))
        assert dtype != jnp.float32 or max(most) <= 3e-6, case
        assert all(a <= factor * b for a, b in zip(ours, xlas, strict=True)), case


@pytest.mark.long
@pytest.mark.parametrize(
    ("length", "heads", "dim", "causal", "lengths"),
    [(50, 2, 64, False, None), (19, 4, 32, True, (19, 5)), (12, 2, 80, False, (1, 12))],
)
def test_the_short_kernel_is_exact(length, heads, dim, causal, lengths):
    assert_as_good_as_xla(length, heads, dim, causal, lengths)


def shapes_of_the_zoo():
    """Length, head size and whether causal, of both towers of every architecture."""
    shapes = set()
    for config in zoo.ARCHITECTURES.values():
        text, vision = config.text, config.vision
        shapes.add((text.context_length, text.width // text.num_heads, text.causal))
        if not isinstance(vision, ResNetConfig):
            shapes.add((vision.num_tokens, vision.width // vision.num_heads, False))
    return sorted(shapes)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "dim", "causal"), shapes_of_the_zoo())
def test_the_short_kernel_is_exact_for_the_zoo(length, dim, causal):
    assert length <= attention.MAX_LENGTH or length == 1025
    if length <= attention.MAX_LENGTH:
        assert_as_good_as_xla(length, 2, dim, causal)


def shapes_of_the_configs(room: int) -> list[tuple[int, int, int, bool]]:
    """Length, heads, their size and whether causal, of the towers of all configs that fit."""
    shapes = set()
    for path in (ROOT / "configs").glob("*.py"):
        if "def get_config" not in path.read_text():
            continue  # of a ladder
        text, vision = load_config(path).model.text, load_config(path).model.vision
        towers = [(text, text.context_length, text.causal)]
        if not isinstance(vision, ResNetConfig):
            towers.append((vision, vision.num_tokens, False))
        for tower, length, causal in towers:
            shape = length, tower.num_heads, tower.width // tower.num_heads
            if length <= attention.MAX_LENGTH and vmem_bytes(*shape) <= room:
                shapes.add((*shape, causal))
    return sorted(shapes)


def compiling(module: str, *arguments: str) -> str:
    """What a process of its own prints, which compiles for a TPU."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install jax[tpu]")
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {
            "TPU_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": str(ROOT),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_short_kernel_compiles_for_every_config(topology):
    room = attention.VMEM_MIB[Topology.parse(topology).chip.name] * 2**20
    shapes = [",".join(map(str, map(int, shape))) for shape in shapes_of_the_configs(room)]
    assert len(shapes) > 10
    lines = compiling("tests.models.compiled", "short", topology, *shapes).splitlines()
    assert lines == [f"{shape} 2" for shape in shapes]  # forward, backward


@pytest.mark.slow
def test_a_tpu_rounds_the_gradient_of_scores_in_xlas_attention():
    """Both products of [L, L] in float32 are of default precision: what `xla_of_tpu` has."""
    shapes = "197,12,64,0", "577,12,64,0", "77,12,64,1"
    lines = compiling("tests.models.compiled", "xla", "v5e:2x2", *shapes).splitlines()
    assert lines == [f"{shape} 0 default default" for shape in shapes]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dim"),
    [("ViT-SO400M-14-SigLIP", 72), ("ViT-H-14", 80), ("ViT-g-14", 88), ("ViT-bigG-14", 104)],
)
def test_the_short_kernel_compiles_in_a_step(name, dim):
    """One layer of each tower, widths and lengths as they are, and a schedule of each kernel."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install jax[tpu]")
    model = zoo.get(name)
    assert model.vision.width // model.vision.num_heads == dim
    model = dataclasses.replace(
        model, remat="attention", attention="short",
        vision=dataclasses.replace(model.vision, depth=1),
        text=dataclasses.replace(model.text, depth=1, vocab_size=1024),
    )  # fmt: skip
    recipe = Recipe(
        model=model, loss=SoftmaxConfig(), optim=OptimConfig(), steps=10_000, batch_size=64
    )
    where = Topology.parse("v5e:2x2")
    found = pod.compile_step(Request(recipe=recipe, mesh=MeshConfig(fsdp=2), topology=where))
    kernels = [x for x in found.works if x.target == KERNEL]
    assert len(kernels) == 4  # forward and backward of both towers
    assert all(x.cycles for x in kernels), kernels


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_the_short_kernel_for_any_shape(data):
    """Rows that fill no block, heads that fill no register, padding, causal or not."""
    batch, length = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    heads, dim = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([8, 24, 64]))
    causal, is_padded = data.draw(st.booleans()), data.draw(st.booleans())
    lengths = None
    qkv, weight = inputs(length, heads, dim, batch)
    if is_padded:
        lengths = data.draw(st.lists(st.integers(1, length), min_size=batch, max_size=batch))
        weight[np.arange(length) >= np.array(lengths)[:, None]] = 0
        lengths = jnp.array(lengths, jnp.int32)
    arguments = jnp.array(qkv, jnp.float32), jnp.array(weight, jnp.float32), causal, lengths
    _, gradient = both(alone, *arguments)
    _, expected = exact(qkv, weight, causal, lengths)
    assert np.abs(gradient - expected).max() <= 3e-6 * max(np.abs(expected).max(), 1)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_short_kernel_on_a_mesh(mesh):
    """Each device its rows and heads; padding travels along."""
    layout = sharding.layout(make_mesh(MESHES[mesh]), "short")
    qkv, weight = inputs(9, 2, 16, batch=8)
    lengths = jnp.arange(1, 9, dtype=jnp.int32)
    weight[np.arange(9) >= np.asarray(lengths)[:, None]] = 0

    def attend(flat, heads, causal, lengths):  # the model keeps the axes where heads are split
        return layout.attend(
            flat if layout.whole_heads else flat.reshape(qkv.shape), heads, causal, lengths
        )

    arguments = jnp.asarray(qkv, jnp.float32), jnp.asarray(weight, jnp.float32)
    got = both(attend, *arguments, True, lengths)
    for a, b in zip(got, exact(qkv, weight, True, lengths), strict=True):
        real = np.arange(9) < np.asarray(lengths)[:, None]
        assert np.abs(np.asarray(a) - b)[real].max() <= 3e-6 * np.abs(b).max()


@pytest.mark.parametrize(
    ("length", "dim", "causal", "lengths"),
    [(17, 8, False, (17, 4)), (130, 16, True, None)],
)
def test_splash_is_attention(length, dim, causal, lengths):
    """JAX's kernel, interpreted: lengths and head dims off its grid."""
    splash = functools.partial(attention.splash, interpret=True)
    assert max(errors(splash, length, 2, dim, causal, lengths, jnp.float32)[0]) <= 2e-5


@pytest.mark.parametrize(
    ("length", "causal", "lengths"), [(7, False, None), (7, True, None), (7, False, (7, 2))]
)
def test_cudnn_gets_even_lengths(monkeypatch, length, causal, lengths):
    """JAX refuses it odd ones in training; a token more changes nothing."""
    plain = jax.nn.dot_product_attention

    def even(q, k, v, *, implementation, **options):
        assert (implementation, q.shape[1] % 2) == ("cudnn", 0)
        return plain(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", even)
    got, _ = errors(attention.cudnn, length, 2, 8, causal, lengths, jnp.bfloat16)
    monkeypatch.undo()
    expected, _ = errors(attention.xla, length, 2, 8, causal, lengths, jnp.bfloat16)
    np.testing.assert_allclose(got, expected, rtol=0.1)


def test_cudnn_says_what_it_needs():
    with pytest.raises(ValueError, match=r"set --model\.dtype bfloat16"):
        attention.cudnn(jnp.zeros((1, 4, 48), jnp.float32), 2)


TPU = functools.partial(SimpleNamespace, platform="tpu")
GPU = functools.partial(SimpleNamespace, platform="gpu", device_kind="NVIDIA")


@pytest.mark.parametrize(
    ("device", "length", "heads", "dim", "dtype", "expected"),
    [
        (TPU(device_kind="TPU v5 lite"), 257, 16, 64, "bfloat16", "short"),
        (TPU(device_kind="TPU v6 lite"), 577, 16, 64, "bfloat16", "short"),
        (TPU(device_kind="TPU v5"), 257, 16, 80, "bfloat16", "short"),
        (TPU(device_kind="TPU v5"), 257, 16, 20, "bfloat16", "xla"),
        (TPU(device_kind="TPU v5 lite"), 1025, 12, 64, "bfloat16", "splash"),
        (TPU(device_kind="TPU v4"), 577, 16, 64, "bfloat16", "splash"),  # 16 MiB of VMEM
        (TPU(device_kind="TPU v5"), 730, 16, 72, "bfloat16", "short"),
        (TPU(device_kind="TPU v5"), 1024, 16, 72, "bfloat16", "splash"),  # 64 MiB
        (GPU(compute_capability="9.0"), 197, 12, 64, "bfloat16", "cudnn"),
        (GPU(compute_capability="9.0"), 197, 12, 64, "float32", "xla"),
        (GPU(compute_capability="7.5"), 197, 12, 64, "bfloat16", "xla"),
        (SimpleNamespace(platform="cpu"), 197, 12, 64, "bfloat16", "xla"),
        (None, 197, 12, 64, "bfloat16", "xla"),
    ],
)
def test_auto_chooses_by_device_and_length(device, length, heads, dim, dtype, expected):
    assert attention.choose(device, length, heads, dim, dtype) == expected
