"""FLOPs against open_clip's profile, the scaling paper's table, and what XLA counts."""

import csv
import functools
import math
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from clip_jax import flops
from clip_jax.config import Config
from clip_jax.losses import DistillationConfig, LiveTeacher, SoftmaxConfig
from clip_jax.models import zoo
from clip_jax.models.bert import BertConfig
from clip_jax.models.cappa import CapPaConfig
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.conv_stem import ConvStemConfig
from clip_jax.models.decoder import CoCaConfig
from clip_jax.models.layers import Layout
from clip_jax.models.lora import LoRAConfig, draw, join
from clip_jax.models.text_lengths import TextLengths
from clip_jax.models.vit import ViTConfig, choose_patches
from clip_jax.optim import OptimConfig
from clip_jax.step import StepConfig
from tests.conftest import CAPPA, COCA, MAMMUT, RESNET, TINY

GOLDEN = Path(__file__).parent / "golden"


def config_of(name: str) -> CLIPConfig | None:
    """The scaling paper calls bigG "G"; two of its sizes are not in open_clip's own list."""
    if name == "ViT-e-14-336":
        e = zoo.get("ViT-e-14")
        return replace(e, vision=replace(e.vision, image_size=336))
    return zoo.ARCHITECTURES.get(name.replace("ViT-G", "ViT-bigG"))


# Towers that the zoo does not have: an architecture that is added must be removed from this list.
MISSING = """
    coca_roberta-ViT-B-32 mt5-base-ViT-B-32 mt5-xl-ViT-H-14 nllb-clip-base nllb-clip-base-siglip
    nllb-clip-large nllb-clip-large-siglip swin_base_patch4_window7_224 vit_medium_patch16_gap_256
    vit_relpos_medium_patch16_cls_224
"""


@pytest.mark.parametrize(
    ("file", "unit", "convention", "missing"),
    [
        ("model_profile.csv", "gflops", "matmul", MISSING),  # open_clip's
        ("laion_profile.csv", "gflops", "laion", ""),  # of arXiv:2506.04598
        ("arch_info_gmacs.csv", "gmacs", "fvcore", ""),  # of Cherti et al.
    ],
)
def test_every_row_of_the_published_tables(file, unit, convention, missing):
    """Equal to the two decimals that are printed: at most 0.1% where the number is above 5."""
    rows = {row["model"]: row for row in csv.DictReader((GOLDEN / file).read_text().splitlines())}
    assert {name for name in rows if config_of(name) is None} == set(missing.split())
    for name in rows.keys() - set(missing.split()):
        config = config_of(name)
        ours = flops.forward(config, convention)
        text = ours.text
        if isinstance(config.text, BertConfig):  # of as many tokens as there are positions
            text = 2 * config.text.operations(config.embed_dim, config.text.num_positions).macs
        total = ours.total - ours.text + text
        for got, part in ((total, ""), (ours.image, "image_"), (text, "text_")):
            if part + unit in rows[name]:
                published = float(rows[name][part + unit])
                assert got / 1e9 == pytest.approx(published, abs=0.0051), (name, part)


def wide(config: CLIPConfig) -> CLIPConfig:
    """So wide that all but the matmuls is little."""
    vision, decoder = config.vision, config.decoder
    if isinstance(vision, ViTConfig):
        size = {"image_size": 64, "patch_size": 16, "width": 512, "depth": 3, "num_heads": 8}
        vision = replace(vision, **size, pool_queries=16, pool_heads=6)
    if isinstance(decoder, CoCaConfig):
        decoder = replace(decoder, depth=3, num_heads=6)
    elif isinstance(decoder, CapPaConfig):
        decoder = replace(decoder, width=384, depth=3, num_heads=6)
    size = {"context_length": 24, "vocab_size": 64, "width": 384, "depth": 6, "num_heads": 6}
    text = replace(config.text, **size)
    return replace(config, embed_dim=384, vision=vision, text=text, decoder=decoder)


SIGLIP = replace(
    TINY,
    vision=replace(TINY.vision, pool="map", class_token=False, pre_norm=False),
    text=replace(TINY.text, causal=False, pool="last"),
)
WIDE_RESNET = replace(RESNET, vision=replace(RESNET.vision, layers=(1, 2, 1, 1), width=32))


@pytest.mark.parametrize(
    ("config", "locked"),
    [
        (TINY, ()),
        (SIGLIP, ("image",)),
        (WIDE_RESNET, ("image",)),
        (COCA, ()),
        (MAMMUT, ()),
        (CAPPA, ()),
    ],
    ids=["class token", "map pooling", "ResNet", "CoCa", "MaMMUT", "CapPa"],
)
def test_xla_counts_the_same_matmuls_in_an_unrolled_step(config, locked):
    # XLA counts the body of a scan once, so the scan must be unrolled.
    config = wide(config)
    model, batch = CLIP(replace(config, unroll=6)), 8
    params = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch, 64, 64, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((batch, 24), jnp.int32)

    def loss(params, images, tokens):
        written = 0.0
        if config.decoder is None:
            image, text = model.encode_image(params, images), model.encode_text(params, tokens)
        else:
            image, seen = model.encode_image_and_tokens(params, images)
            text, states = model.encode_text_and_write(params, tokens, seen)
            written = jax.nn.logsumexp(model.vocabulary_logits(params, states), axis=-1).sum()
        if "image" in locked:
            image = jax.lax.stop_gradient(image)
        logits = image @ text.T
        contrast = jax.nn.log_softmax(logits) + jax.nn.log_softmax(logits, axis=0)
        return written - jnp.diag(contrast).sum()

    counted = jax.jit(jax.grad(loss)).lower(params, images, tokens).cost_analysis()["flops"]
    assert flops.training(config, batch, locked=locked).total == pytest.approx(counted, rel=0.03)


def test_the_patches_of_a_stem_of_convolutions_are_its_matmuls():
    vision = ConvStemConfig(image_size=32, patch_size=16, width=64, depth=1, num_heads=2)
    stem, patches = vision.stem(Layout()), jax.ShapeDtypeStruct((1, 4, 16, 16, 3), jnp.float32)
    init = functools.partial(stem.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), patches)
    program = jax.make_jaxpr(functools.partial(stem.apply, train=False))(variables, patches)
    products = re.findall(r":f32\[([\d,]+)\] = dot_general", str(program))
    kernels = [math.prod(x.shape[:-1]) for x in jax.tree.leaves(variables["params"]) if x.ndim == 4]
    assert len(products) == len(kernels) == 3
    sizes = [math.prod(map(int, product.split(","))) for product in products]
    macs = sum(size * kernel for size, kernel in zip(sizes, kernels, strict=True))
    assert macs == 4 * vision.patch_macs


def test_each_option_takes_what_it_says():
    config = zoo.get("ViT-B-16")
    plain = flops.forward(config)
    step = flops.training(config, 1024, locked=("image",))
    assert (step.image, step.text) == (1024 * plain.image, 3 * 1024 * plain.text)
    assert step.loss == 2 * 2 * 1024**2 * 512
    assert flops.training(config, 1024).loss == 3 * 2 * 1024**2 * 512
    resnet = zoo.get("RN50")  # of whose pool one query is used
    pool = flops.training(resnet, 1).image / flops.forward(resnet).image / 3
    assert pool == pytest.approx(1 - 0.0521, abs=1e-4)


def test_a_step_is_counted_as_its_config_says():
    """49 patches at 0.6 leave 20, by the tower and by the count; a locked tower sees them all."""
    plain = zoo.get("ViT-B-32")
    flip = replace(plain, vision=replace(plain.vision, patch_dropout=0.6))
    keys = jax.eval_shape(functools.partial(jax.random.split, num=2), jax.random.key(0))
    choose = functools.partial(choose_patches, patches=49, count=flip.vision.kept_patches)
    assert jax.eval_shape(choose, keys)[0].shape == (2, 20)

    def step(model, *locked):
        return flops.of_step(Config(model=model, batch_size=8, optim=OptimConfig(locked=locked)))

    blocks = 12 * 21 * (12 * 768**2 + 2 * 21 * 768)  # 20 patches and the class token
    assert step(flip).image == 3 * 8 * 2 * (49 * 32**2 * 3 * 768 + blocks + 768 * 512)
    assert step(flip).text == step(plain).text
    assert 0.38 < step(flip).image / step(plain).image < 0.46
    assert step(flip, "image") == step(plain, "image")
    assert step(plain, "image").image == step(plain).image // 3


def test_weights_that_adapters_change_have_no_gradient():
    """But attention's products have both; and a tower without adapters has no backward pass."""
    config, batch = wide(SIGLIP), 8
    model, lora = CLIP(replace(config, unroll=6)), LoRAConfig(rank=1, targets=("visual/*",))
    base = jax.eval_shape(model.init, jax.random.key(0))
    adapters = jax.eval_shape(functools.partial(draw, config, lora), jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch, 64, 64, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((batch, 24), jnp.int32)

    def loss(adapters, base, images, tokens):
        params = join(base, adapters, config, lora)
        images, texts = model.encode_image(params, images), model.encode_text(params, tokens)
        contrast = images @ texts.T
        return jnp.diag(jax.nn.log_softmax(contrast) + jax.nn.log_softmax(contrast, axis=0)).sum()

    lowered = jax.jit(jax.grad(loss)).lower(adapters, base, images, tokens)
    run = Config(model=config, batch_size=batch, lora=lora, init_from="x")
    assert flops.of_step(run).total == pytest.approx(lowered.cost_analysis()["flops"], rel=0.03)
    full = flops.of_step(replace(run, lora=None, init_from=None))
    assert flops.of_step(run).text == full.text // 3
    assert 2 / 3 < flops.of_step(run).image / full.image < 0.7


def test_synthetic_captions_and_teachers_are_encoded_too():
    def step(**fields):
        term = DistillationConfig(teachers=(LiveTeacher(weights="x", model=TINY),), **fields)
        return flops.of_step(Config(model=TINY, batch_size=8, objective=(SoftmaxConfig(), term)))

    one, both, pair = step(), step(captions="both"), flops.forward(TINY)
    assert (both.image, both.text) == (one.image, 2 * one.text)
    assert one.teacher == 8 * pair.total
    assert both.teacher == 8 * (pair.image + 2 * pair.text)


def test_several_texts_of_an_image_are_encoded_and_compared():
    def step(**fields):
        return flops.of_step(Config(model=TINY, batch_size=8, objective=(SoftmaxConfig(**fields),)))

    one, several = step(), step(captions="parts", texts_per_image=4)
    assert several == one._replace(text=4 * one.text, loss=4 * one.loss)


def test_a_stored_tower_costs_nothing():
    """The other tower costs what it does beside a locked one; its loss has one gradient less."""
    locked = Config(model=TINY, optim=OptimConfig(locked=("image",)))
    stored = replace(locked, stored="image", init_from="x")
    assert flops.of_step(stored) == flops.of_step(locked)._replace(image=0)
    assert flops.of_step(replace(stored, optim=OptimConfig())) == flops.of_step(stored)


def test_texts_by_length_cost_what_their_groups_cost():
    lengths = TextLengths(tokens=(4, 10), shares=(0.25, 0.75))
    full = StepConfig(model=TINY, batch_size=64)
    counts = flops.of_step(replace(full, text_lengths=lengths))
    short = replace(TINY, text=replace(TINY.text, context_length=4))
    of_short = flops.of_step(replace(full, model=short)).text
    assert counts.text == round(0.25 * of_short + 0.75 * flops.of_step(full).text)
    assert counts._replace(text=0) == flops.of_step(full)._replace(text=0)
