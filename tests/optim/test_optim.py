"""Schedules, the decay mask, and what is put around an optimizer."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.convert.state_dict import unflatten
from clip_jax.errors import InputError
from clip_jax.models import lora, zoo
from clip_jax.models.clip import CLIPConfig, parameters
from clip_jax.optim import (
    LAMB,
    Adafactor,
    AdamW,
    Constant,
    CoolDown,
    Cosine,
    InverseSqrt,
    OptimConfig,
    make_optimizer,
    schedule,
)
from clip_jax.optim.wrappers import averaged, capped, scale_layers, with_new_norms
from tests.conftest import CAPPA, COCA, FAMILIES, MAMMUT, RESNET, TINY, by_path

SCHEDULED = OptimConfig(learning_rate=1.0, warmup_steps=10, final_learning_rate=0.1)
PLAIN = {"learning_rate": 0.1, "warmup_steps": 0, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("kind", "steps", "expected"),
    [
        (Cosine(), 110, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 60: 0.55, 110: 0.1}),
        (CoolDown(steps=40, shape="sqrt"), 100, {59: 1, 60: 1, 70: 0.55, 100: 0.1}),
        (CoolDown(steps=40), 100, {60: 1, 80: 0.55, 100: 0.1}),
        (InverseSqrt(timescale=30), 10**6, {9: 1, 10: 1, 100: 0.5}),
        (Cosine(), 10, {0: 0.1, 9: 1, 10: 1}),
        (Cosine(), 5, {0: 0.1, 4: 0.5}),  # shorter than its warm-up
    ],
)
def test_the_warm_up_is_linear_and_the_schedule_follows(kind, steps, expected):
    rate = schedule(dataclasses.replace(SCHEDULED, schedule=kind), steps)
    assert {step: rate(step) for step in expected} == pytest.approx(expected)


SCHEDULES = st.one_of(
    st.just(Cosine()),
    st.just(Constant()),
    st.builds(InverseSqrt, timescale=st.integers(1, 1_000)),
    st.builds(
        CoolDown,
        steps=st.integers(1, 100),
        shape=st.sampled_from(["linear", "sqrt", "power"]),
        power=st.floats(0.25, 4),
    ),
)


@given(SCHEDULES, st.integers(1, 100), st.integers(1, 200), st.floats(0, 1))
def test_learning_rates_rise_to_the_peak_and_never_rise_again(kind, warmup, rest, final):
    """And those of a cool-down fall as the share of it that is left, in its shape."""
    steps = warmup + rest
    if isinstance(kind, CoolDown):
        steps += kind.steps
    config = OptimConfig(
        schedule=kind, learning_rate=1.0, warmup_steps=warmup, final_learning_rate=final
    )
    rates = [*map(schedule(config, steps), range(steps + 1))]
    assert rates[: warmup + 1] == pytest.approx([(i + 1) / warmup for i in range(warmup)] + [1])
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[warmup:]))
    if isinstance(kind, CoolDown | Cosine):
        assert rates[-1] == pytest.approx(final)
    if isinstance(kind, CoolDown):
        begin = steps - kind.steps
        assert rates[warmup : begin + 1] == [1] * (rest + 1)
        power = {"linear": 1, "sqrt": 0.5, "power": kind.power}[kind.shape]
        shares = np.arange(kind.steps + 1) / kind.steps  # of it that are over
        left = 1 - shares**0.5 if kind.shape == "sqrt" else (1 - shares) ** power
        assert rates[begin:] == pytest.approx(final + (1 - final) * left)


def test_a_cool_down_longer_than_the_run_is_refused():
    with pytest.raises(InputError, match=r"optim\.schedule\.steps=95 of cool-down after"):
        schedule(dataclasses.replace(SCHEDULED, schedule=CoolDown(steps=95)), 100)


def two_towers():
    tower = {"kernel": np.full(3, 2.0, np.float32), "bias": np.full(3, 2.0, np.float32)}
    return {"visual": tower, "text": dict(tower), "logit_scale": np.float32(1)}


def one_update(params, grads=None, **options):
    """Parameters and state after an update, by default with a gradient of ones."""
    config = OptimConfig(**PLAIN | options)
    optimizer = make_optimizer(config, {})
    grads = jax.tree.map(np.ones_like, params) if grads is None else grads

    @jax.jit
    def update(params, grads):
        state = optimizer.init(params)
        updates, state = optimizer.update(grads, state, params, learning_rate=config.learning_rate)
        return optax.apply_updates(params, updates), state

    return update(params, grads)


def test_decay_is_decoupled_and_clipping_bounds_the_gradient():
    params = two_towers()
    after, _ = one_update(params, jax.tree.map(np.zeros_like, params), weight_decay=0.5)
    np.testing.assert_allclose(after["text"]["kernel"], 2 - 0.1 * 0.5 * 2, rtol=1e-6)
    np.testing.assert_array_equal(after["text"]["bias"], 2)

    large = jax.tree.map(lambda x: 1e6 * np.ones_like(x), params)
    _, state = one_update(params, large, clip_norm=1.0)
    norm = optax.tree.norm(optax.tree.get(state, "mu"))
    assert float(norm) == pytest.approx(0.1, rel=1e-5)


def test_moments_decay_as_in_the_paper_and_the_first_can_be_stored_in_bfloat16():
    assert (OptimConfig().b1, OptimConfig().b2) == (0.9, 0.98)
    _, state = one_update(two_towers(), first_moment="bfloat16")
    assert optax.tree.get(state, "mu")["text"]["kernel"].dtype == "bfloat16"
    assert optax.tree.get(state, "nu")["text"]["kernel"].dtype == "float32"


def test_towers_have_their_own_rates_and_the_average_follows_the_weights():
    params = two_towers()
    after, state = one_update(
        params, image_learning_rate_scale=0.5, text_learning_rate_scale=0.25, ema_decay=0.75
    )
    moved = jax.tree.map(lambda a, b: float(np.max(a - b)), params, after)
    assert moved["visual"]["kernel"] == pytest.approx(0.05, rel=1e-4)
    assert moved["text"]["kernel"] == pytest.approx(0.025, rel=1e-4)
    assert moved["logit_scale"] == pytest.approx(0.1, rel=1e-4)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, params, after)
    ema = averaged(state, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ema, expected)
    assert averaged(one_update(params)[1], params) is params


@pytest.mark.parametrize("more", [{}, {"skip_norm_ratio": 10.0}, {"locked": ("image",)}])
@pytest.mark.parametrize("start", [np.log(99.0), np.log(150.0)])
def test_the_average_is_of_logit_scales_that_are_capped(start, more):
    """It was of the scales before the step clips them, and began with an initial one above."""
    config = OptimConfig(**PLAIN | more, ema_decay=0.5)
    optimizer, limit = make_optimizer(config, {}), np.float32(np.log(100.0))
    params = two_towers() | {"logit_scale": np.float32(start)}
    state, ema = optimizer.init(params), min(np.float32(start), limit)
    assert averaged(state, params)["logit_scale"] == ema
    for _ in range(3):
        grads = jax.tree.map(lambda x: -np.ones_like(x), params)  # each raises the scale by 0.1
        updates, state = optimizer.update(grads, state, params, learning_rate=0.1)
        params = capped(optax.apply_updates(params, updates), 100.0)
        assert params["logit_scale"] == limit
        ema = (ema + limit) / 2
        assert averaged(state, params)["logit_scale"] == pytest.approx(ema, rel=1e-6)
        assert averaged(state, params)["logit_scale"] <= limit
    assert "logit_scale" not in capped({"visual": {}}, 100.0)


def rates_of(config: CLIPConfig) -> dict[str, np.ndarray]:
    """Return the learning rates of a model's parameters, where each layer's are half the next's."""
    rows = config.dimensions()

    def ones(path: str) -> jax.Array:  # one number, of a stack one for each layer
        sizes = zip(rows[path].split(), parameters(config)[path].value.shape, strict=True)
        return jnp.ones([size if name == "depth" else 1 for name, size in sizes], jnp.float32)

    updates = unflatten({path: ones(path) for path in rows})
    scaled, _ = scale_layers(0.5, rows, config.layers_from).update(updates, optax.EmptyState())
    assert jax.tree.map(np.shape, scaled) == jax.tree.map(np.shape, updates)
    return {path: np.ravel(x) for path, x in by_path(scaled).items()}


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50", "convnext_base"])
def test_layers_have_rates_that_rise_towards_the_end(name):
    """Layers of a transformer are its blocks, and so are those of a ResNet and a ConvNeXt."""
    rates = rates_of(zoo.get(name))
    expected = {
        "logit_scale": 1,
        "text/ln_final/scale": 1,
        "text/text_projection": 1,
        "text/token_embedding": 0.5**13,
        "text/positional_embedding": 0.5**13,
        "text/transformer/resblocks/mlp/c_fc/bias": 0.5 ** np.arange(12, 0, -1),
    }
    if name == "RN50":
        expected |= {
            "visual/bn1/scale": 0.5**17,
            "visual/layer1/0/downsample/0/kernel": 0.5**16,
            "visual/layer4/2/bn3/bias": 0.5,
            "visual/attnpool/c_proj/kernel": 1,
        }
    elif name == "convnext_base":
        expected |= {
            "visual/conv0/kernel": 0.5**37,
            "visual/ln0/bias": 0.5**37,
            "visual/stage0/resblocks/conv/bias": 0.5 ** np.arange(36, 33, -1),
            "visual/ln2/scale": 0.5**30,
            "visual/conv2/bias": 0.5**30,
            "visual/stage2/resblocks/ls/gamma": 0.5 ** np.arange(30, 3, -1),
            "visual/stage3/resblocks/ln/scale": 0.5 ** np.arange(3, 0, -1),
            "visual/ln_post/scale": 1,
        }
    else:
        expected |= {"visual/class_embedding": 0.5**13, "visual/ln_pre/bias": 0.5**13}
        expected |= {"visual/proj": 1, "visual/ln_post/scale": 1}
    for path, rate in expected.items():
        np.testing.assert_array_equal(rates[path], rate, err_msg=path)


@pytest.mark.parametrize(
    ("name", "path", "layers"),
    [("TIPSv2-B-14", "visual/registers", 12), ("AltCLIP", "text/type_embedding", 24)],
)
def test_what_is_before_the_first_layer_has_the_lowest_rate(name, path, layers):
    assert rates_of(zoo.get(name))[path] == 0.5 ** (layers + 1)


# Modules after the last layer, and before the first, of all towers.
LAST = """attn_pool attnpool fc image_projection ln_final ln_post proj proj_bias projection_hidden
    text_projection text_projection_bias vocab_bias vocab_projection"""
FIRST = """bn1 bn2 bn3 class_embedding conv0 conv1 conv2 conv3 ln0 ln_pre positional_embedding
    registers token_embedding type_embedding"""


def test_each_parameter_is_before_in_or_after_the_layers():
    families = {"ResNet": RESNET, "CoCa": COCA, "MaMMUT": MAMMUT, "CapPa": CAPPA, **FAMILIES}
    for family, config in families.items():
        for path in parameters(config):
            tower, _, rest = path.partition("/")
            if tower in config.towers:
                layer, module = config.towers[tower].layer_of(rest), rest.partition("/")[0]
                assert (layer is None) == (module in LAST.split()), (family, path)
                assert layer != 0 or module in FIRST.split(), (family, path)


@pytest.mark.parametrize(("name", "layers"), [("coca_ViT-B-32", 12), ("mammut_ViT-B-32", 6)])
def test_a_decoder_has_layers_of_its_own_or_those_of_the_text_tower(name, layers):
    """MaMMUT's text tower has two blocks in each layer, and its decoder projections alone."""
    rates, tower = rates_of(zoo.get(name)), "decoder" if name.startswith("coca") else "text"
    expected = 0.5 ** np.arange(layers, 0, -1)
    path = f"{tower}/transformer/layers/cross/attn/q/bias"
    np.testing.assert_array_equal(rates[path], expected)
    assert rates["text/token_embedding"] == 0.5 ** ((layers if tower == "text" else 12) + 1)
    assert rates["decoder/vocab_projection"] == 1


def test_a_locked_tower_keeps_its_weights_and_takes_no_memory():
    params = two_towers()
    after, state = one_update(params, weight_decay=0.5, locked=("image",))
    np.testing.assert_array_equal(after["visual"]["kernel"], params["visual"]["kernel"])
    assert not np.array_equal(after["text"]["kernel"], params["text"]["kernel"])
    arrays = jax.tree.leaves(state)
    assert sum(x.size for x in arrays if x.ndim) == 2 * 6  # the text tower's two moments


@pytest.mark.parametrize("kind", [AdamW(), LAMB(), Adafactor()], ids=["AdamW", "LAMB", "Adafactor"])
def test_adapters_have_the_learning_rates_of_their_layer_and_tower(kind):
    own = lora.LoRAConfig(rank=2, targets=("text/*/q", "text/text_projection"))
    rows = {name: dims for name, (_, dims) in lora.shapes(TINY, own).items()}
    params = lora.draw(TINY, own, jax.random.key(0))

    def updates(**options):
        config = OptimConfig(**PLAIN | options, optimizer=kind)
        optimizer = make_optimizer(config, rows, TINY.layers_from)
        grads = jax.tree.map(lambda x: x + 1, params)

        @jax.jit
        def update(params, grads):
            return optimizer.update(grads, optimizer.init(params), params, learning_rate=0.1)[0]

        return by_path(update(params, grads))

    plain, scaled = updates(), updates(layer_decay=0.5, text_learning_rate_scale=0.1)
    for name, x in plain.items():
        factors = 0.1 * np.array([0.25, 0.5] if "resblocks" in name else [1.0])
        expected = x * factors.reshape(-1, *[1] * (x.ndim - 1))
        np.testing.assert_allclose(scaled[name], expected, rtol=1e-5, err_msg=name)
        assert np.all(x < 0), name
    decayed = updates(weight_decay=0.1)  # of A; B is 0
    assert all(np.any(decayed[name] != x) == name.endswith("a") for name, x in plain.items())


@pytest.mark.parametrize("bad", [np.nan, np.inf, 100.0])
def test_an_update_that_is_not_finite_or_unusual_is_skipped_and_counted(bad):
    params = two_towers()
    optimizer = make_optimizer(OptimConfig(**PLAIN, skip_norm_ratio=10.0, ema_decay=0.9), {})
    state = optimizer.init(params)
    ones = jax.tree.map(np.ones_like, params)
    update = jax.jit(functools.partial(optimizer.update, learning_rate=0.1))
    _, early = update(jax.tree.map(lambda x: bad * x, ones), state, params)
    assert bool(early.skipped) == (not np.isfinite(bad))  # nothing is unusual yet
    for _ in range(100):
        _, state = update(ones, state, params)
    updates, after = update(jax.tree.map(lambda x: bad * x, ones), state, params)
    assert all((x == 0).all() for x in jax.tree.leaves(updates))
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)
    updates, after = update(jax.tree.map(lambda x: 9 * x, ones), after, params)
    assert all((x != 0).all() for x in jax.tree.leaves(updates))
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 0)
    _, anew = update(jax.tree.map(lambda x: bad * x, ones), with_new_norms(after), params)
    assert int(anew.skipped) == (1 if np.isfinite(bad) else 2)  # of other losses, unusual or not
