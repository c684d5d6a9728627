"""What the compiled step exchanges between devices, read from XLA's text.

Allowed are gathers of parameters under `fsdp`, and of the loss's features [B, E] and vectors [B].
A gradient of a split parameter is summed to where its shard lies.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import sharding
from clip_jax.losses import SoftmaxConfig, forms
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.layers import Layout
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig, make_optimizer
from clip_jax.scaling import hlo
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import init_state, jit_step, state_shardings, train_step

BATCH, STEPS = 48, 10
# No two dims alike, so that a shape says what it is of.
CONFIG = CLIPConfig(
    embed_dim=20,
    vision=ViTConfig(image_size=24, patch_size=8, width=32, depth=2, num_heads=2, mlp_ratio=3.0),
    text=TextConfig(vocab_size=520, context_length=12, width=40, depth=2, num_heads=4),
    dtype="float32",
)
RESNET = dataclasses.replace(
    CONFIG, vision=ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, num_heads=4)
)
Text = str


def shapes(config: CLIPConfig, mesh) -> tuple[Any, dict[str, Any], Any]:
    model, optimizer = CLIP(config), make_optimizer(OptimConfig(warmup_steps=1), STEPS)
    placed = state_shardings(model, optimizer, mesh)
    state = jax.eval_shape(functools.partial(init_state, jax.random.key(0), model, optimizer))
    size = config.vision.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((BATCH, size, size, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((BATCH, config.text.context_length), jnp.int32),
    }
    return state, batch, placed


def compiled_step(mesh, config: CLIPConfig = CONFIG, form: str = "dense") -> Text:
    state, batch, placed = shapes(config, mesh)
    optim = OptimConfig(warmup_steps=1)
    step = jit_step(CLIP(config), optim, STEPS, SoftmaxConfig(form=form), mesh, placed)
    return step.lower(state, batch).compile().as_text()


def faults(text: Text, mesh, config: CLIPConfig = CONFIG) -> list[str]:
    """Say which exchanges of a compiled step are not allowed."""
    state, _, placed = shapes(config, mesh)
    tensor = mesh.shape["tensor"]
    split, whole, unsplit, shards = set(), set(), set(), set()  # in any order, without depth
    for x, place in zip(jax.tree.leaves(state.params), jax.tree.leaves(placed.params), strict=True):
        if "fsdp" in place.spec:  # as it lies, but for fsdp
            sizes = {"fsdp": mesh.shape["fsdp"], "tensor": tensor}
            spec = [*place.spec, *[None] * len(x.shape)]
            pairs = list(zip(x.shape, spec, strict=False))
            shard = tuple(d // sizes.get(axis, 1) for d, axis in pairs)
            copy = tuple(d // tensor if axis == "tensor" else d for d, axis in pairs)
            shards |= {_dims(shard), _dims(shard[1:])}
            unsplit |= {_dims(copy), _dims(copy[1:])}
        for dims in (x.shape, x.shape[1:]):  # as the compiler may split it over tensor, too
            (split if "fsdp" in place.spec else whole).add(_dims(dims))
            parts = [d // tensor if d % tensor == 0 else d for d in dims]
            for i in range(len(dims)):
                mixed = (*dims[:i], parts[i], *dims[i + 1 :])
                (split if "fsdp" in place.spec else whole).add(_dims(mixed))
    features = {_dims((BATCH, config.embed_dim)), _dims((BATCH,))}
    found = []
    for x in hlo.collectives(text, mesh.shape):
        for shape in x.shapes:
            dims = _dims(shape.dims)
            batch_axes = set(x.axes) <= set(sharding.BATCH_AXES)
            if x.kind == "all-gather" and not (
                (dims in split and x.axes == ("fsdp",)) or (dims in features and batch_axes)
            ):
                found.append(f"gather of {shape.dims} over {x.axes}: {x.source}")
            copied = split if "fsdp" in x.axes else unsplit - shards
            if x.kind == "all-reduce" and "data" in x.axes and dims in copied - whole:
                found.append(f"replicated gradient {shape.dims} over {x.axes}: {x.source}")
    return found


def _dims(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(d for d in dims if d > 1))


@pytest.mark.parametrize(
    ("sizes", "form"), [((2, 4, 1), "dense"), ((2, 2, 2), "ring")], ids=["2x4", "2x2x2 ring"]
)
def test_only_parameters_and_features_are_gathered_and_gradients_stay_split(sizes, form):
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    text = compiled_step(mesh, form=form)
    assert faults(text, mesh) == []
    found = hlo.collectives(text, mesh.shape)
    blocks = [x for x in found if x.kind == "all-gather" and "transformer/while" in x.source]
    assert blocks
    assert all(x.times == CONFIG.text.depth for x in blocks)  # a layer at a time


@pytest.mark.slow
def test_a_resnet_too():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    assert faults(compiled_step(mesh, RESNET), mesh, RESNET) == []


def wrong_tokens(mesh, monkeypatch) -> Text:
    """Activations copied to all devices."""
    good = sharding.layout(mesh)
    everywhere = NamedSharding(mesh, P())
    place = functools.partial(jax.lax.with_sharding_constraint, shardings=everywhere)
    monkeypatch.setattr(sharding, "layout", lambda *_: good._replace(place=place))
    return compiled_step(mesh)


def left_alone(mesh, monkeypatch) -> Text:
    """Nothing said about activations: the compiler follows the parameters."""
    monkeypatch.setattr(sharding, "layout", lambda *_: Layout())
    return compiled_step(mesh)


def wrong_logits(mesh, monkeypatch) -> Text:
    """The similarity matrix whole on every device."""
    compare = forms.compare

    def copied(*args: Any) -> Any:
        pairs = compare(*args)
        whole = NamedSharding(mesh, P())
        rows = NamedSharding(mesh, P(sharding.BATCH_AXES))
        cosine = jax.lax.with_sharding_constraint(pairs.cosine, rows)
        return pairs._replace(cosine=jax.lax.with_sharding_constraint(cosine, whole))

    monkeypatch.setattr(forms, "compare", copied)
    return compiled_step(mesh)


def wrong_gradients(mesh, monkeypatch) -> Text:
    """The updated state not pinned to where the old one lies."""
    state, batch, placed = shapes(CONFIG, mesh)
    step = functools.partial(
        train_step, model=CLIP(CONFIG), optim=OptimConfig(warmup_steps=1), steps=STEPS,
        loss=SoftmaxConfig(form="dense"), mesh=mesh,
    )  # fmt: skip
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), placed)
    jitted = jax.jit(step, in_shardings=(whole, sharding.batch_sharding(mesh)))
    return jitted.lower(state, batch).compile().as_text()


@pytest.mark.parametrize(
    ("construct", "fault"),
    [
        (wrong_tokens, f"gather of ({BATCH}, "),
        (left_alone, "gather of "),
        (wrong_logits, f"gather of ({BATCH}, {BATCH})"),
        (wrong_gradients, "replicated gradient"),
    ],
    ids=["tokens", "left alone", "logits", "gradients"],
)
def test_the_wrong_exchanges_are_found(construct: Callable[..., Text], fault, monkeypatch):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    found = faults(construct(mesh, monkeypatch), mesh)
    assert any(line.startswith(fault) for line in found), found
