"""dino.txt's head: NumPy's float64 values, which tokens it sees, FLOPs, and what it needs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import flops
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP, count
from clip_jax.models.dino import TOWERS, DinoConfig
from clip_jax.models.image_head import ImageHead, ImageHeadConfig
from clip_jax.models.layers import Layout
from tests.conftest import COCA, FAMILIES, parameters

CONFIG = FAMILIES["dinotxt"]
VISION, HEAD = CONFIG.vision, CONFIG.image_head


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attend(q, k, v):
    """Attention of heads [B, L, N, K]."""
    scores = np.einsum("BLNK,BTNK->BNLT", q, k) / np.sqrt(q.shape[-1])
    return np.einsum("BNLT,BTNK->BLNK", softmax(scores), v)


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def reference(p, x, extra):
    """The head as dino.txt's paper describes it, of states after the tower's norm [B, L, D]."""
    stack = p["transformer"]["resblocks"]
    for i in range(len(stack["ln_1"]["scale"])):
        block = jax.tree.map(lambda a, i=i: a[i], stack)
        y = norm(x, block["ln_1"])
        q, k, v = np.moveaxis(
            np.einsum("BLD,DSNK->BLSNK", y, block["attn"]["in_proj"]["kernel"]), 2, 0
        )
        out = block["attn"]["out_proj"]
        y = np.einsum("BLNK,NKD->BLD", attend(q, k, v), out["kernel"]) + out["bias"]
        x = x + block["ls_1"]["gamma"] * y
        y, mlp = norm(x, block["ln_2"]), block["mlp"]
        gate = linear(y, mlp["c_gate"])
        hidden = gate / (1 + np.exp(-gate)) * linear(y, mlp["c_fc"])
        x = x + block["ls_2"]["gamma"] * linear(hidden, mlp["c_proj"])
    x = norm(x, p["ln_post"])
    halves = [x[:, 0], x[:, extra:].mean(1)]
    if "proj" in p:
        halves = [half @ p["proj"]["kernel"] for half in halves]
    return np.concatenate(halves, axis=1)


def doubles(config):
    """Parameters of the head, and tokens, in float64."""
    params = parameters(config)["image_head"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), params)
    tokens = rng.normal(size=(3, config.vision.attention_tokens, config.vision.width))
    return params, tokens


@pytest.mark.parametrize("embed_dim", [64, 40], ids=["twice the width", "projected"])
def test_the_head_in_float64_is_the_papers(embed_dim):
    config = replace(CONFIG, embed_dim=embed_dim)
    params, tokens = doubles(config)
    expected = reference(params, tokens, VISION.extra_tokens)

    def exact(qkv, heads, causal=False, lengths=None):
        """JAX's own attention has a softmax in float32."""
        q, k, v = jnp.moveaxis(qkv.reshape(*qkv.shape[:2], 3, heads, -1), 2, 0)
        scores = jnp.einsum("BLNK,BTNK->BNLT", q, k) / np.sqrt(q.shape[-1])
        y = jnp.einsum("BNLT,BTNK->BLNK", jax.nn.softmax(scores), v)
        return y.reshape(*qkv.shape[:2], -1)

    head = ImageHead(HEAD, VISION, embed_dim, layout=Layout(attend=exact))
    with jax.enable_x64(True):
        got = head.apply({"params": params}, jnp.asarray(tokens))
    assert np.asarray(got).dtype == np.float64
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=1e-12)


def test_a_models_embedding_is_the_heads_of_the_towers_normalised_tokens():
    model, params = CLIP(CONFIG), parameters(CONFIG)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    tokens = model.image_tokens(params, images, norm=True)
    expected = reference(params["image_head"], np.asarray(tokens), VISION.extra_tokens)
    np.testing.assert_allclose(model.encode_image(params, images), expected, rtol=0, atol=1e-4)
    shares = model.patch_attention(params, images)
    assert shares.shape == (2, 16)
    assert (shares > 0).all()
    assert (shares.sum(1) < 1).all()


def test_the_published_head_has_the_published_sizes():
    """Of `dinov3_vitl16_dinotxt` and `dinov2_vitl14_reg4_dinotxt`: 2,752 hidden, 2,048 wide."""
    config = zoo.get("DINOv3-L-16")
    assert config.vision == TOWERS["DINOv3-L-16"]
    head = ImageHeadConfig()
    assert head.hidden_width(1024) == 2752
    shapes = jax.eval_shape(
        ImageHead(head, TOWERS["DINOv3-L-16"], 2048).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 201, 1024), jnp.float32),
    )["params"]
    block = 4 * 1024**2 + 1024 + 3 * 1024 * 2752 + 2 * 2752 + 1024 + 6 * 1024
    assert count(jax.tree.map(lambda x: x, shapes)) == 2 * block + 2 * 1024


@pytest.mark.parametrize("locked", [(), ("image",)], ids=["trained", "locked"])
def test_xla_counts_the_same_matmuls(locked):
    """The head on a locked tower has a backward pass, and the tower has none."""
    vision = DinoConfig(image_size=64, width=256, depth=3, num_heads=4, registers=2)
    text = replace(CONFIG.text, context_length=24, vocab_size=64, width=256, num_heads=4)
    config = replace(CONFIG, embed_dim=384, vision=vision, text=text, unroll=6)
    model, batch = CLIP(config), 8
    params = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch, 64, 64, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((batch, 24), jnp.int32)

    def loss(params, images, tokens):
        frozen = {"visual": jax.lax.stop_gradient(params["visual"])} if locked else {}
        image = model.encode_image(params | frozen, images)
        logits = image @ model.encode_text(params, tokens).T
        contrast = jax.nn.log_softmax(logits) + jax.nn.log_softmax(logits, axis=0)
        return -jnp.diag(contrast).sum()

    counted = jax.jit(jax.grad(loss)).lower(params, images, tokens).cost_analysis()["flops"]
    assert flops.training(config, batch, locked=locked).total == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"embed_dim": 63}, "needs an even embed_dim, got 63"),
        ({"vision": replace(VISION, pool="mean")}, "needs a vision transformer with vision.pool="),
        ({"vision": replace(VISION, projection=True)}, "and vision.projection=False"),
        ({"decoder": COCA.decoder}, "exclude each other"),
    ],
)
def test_what_does_not_fit_the_head_is_refused(changes, match):
    with pytest.raises(InputError, match=match):
        replace(CONFIG, **changes)


def test_layers_of_the_head_come_after_the_towers():
    assert CONFIG.layers_from("image_head/transformer/resblocks/ln_1/scale") == 2
    assert CONFIG.layers_from("visual/transformer/resblocks/ln_1/scale") == 4
    assert CONFIG.layers_from("image_head/ln_post/scale") == 0
    names = {path.split("/")[0] for path in CONFIG.dimensions()}
    assert names == {"visual", "image_head", "text", "logit_scale"}
