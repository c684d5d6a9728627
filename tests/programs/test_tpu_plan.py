"""`plan`'s compiles for TPUs that are not there, by libtpu in a process of its own."""

import dataclasses

import pytest

from clip_jax.losses import SoftmaxConfig
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig
from clip_jax.pods.compile import Facts, Request, compile_step
from clip_jax.pods.topology import Topology
from clip_jax.sharding import MeshConfig
from clip_jax.step import Recipe

MODEL = CLIPConfig(
    embed_dim=20,
    vision=ViTConfig(image_size=24, patch_size=8, width=32, depth=2, num_heads=2, mlp_ratio=3.0),
    text=TextConfig(vocab_size=521, context_length=12, width=40, depth=2, num_heads=4),
    dtype="float32",
)


RESNET = dataclasses.replace(
    MODEL, vision=ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, num_heads=4)
)


def request(topology: str, batch_size: int = 64, model: CLIPConfig = MODEL, **mesh: int) -> Request:
    recipe = Recipe(
        model=model, loss=SoftmaxConfig(), optim=OptimConfig(), steps=10_000, batch_size=batch_size
    )
    return Request(recipe=recipe, mesh=MeshConfig(**mesh), topology=Topology.parse(topology))


def summed_over_data(facts: Facts) -> float:
    """Bytes of gradients that cross the links, as a share of the parameters' bytes."""
    kinds = ("all-reduce", "reduce-scatter")
    summed = sum(x.bytes for x in facts.exchanges if x.kind in kinds and "data" in x.axes)
    return summed / facts.parameters


@pytest.mark.parametrize("topology", ["v4:2x2x2", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
def test_the_sums_of_gradients_are_found(topology):
    """Two bytes of each parameter at least cross the links, and not much more than four."""
    assert 0.5 <= summed_over_data(compile_step(request(topology))) < 1.5


@pytest.mark.parametrize(
    ("topology", "mesh"), [("v5e:2x4", (4, 2, 1)), ("v4:2x2x1/slices=2", (4, 2, 1))]
)
def test_a_step_compiles_for_a_tpu_that_is_not_there(topology, mesh):
    asked = request(topology, fsdp=2)
    facts = compile_step(asked)
    assert facts.fits
    assert facts.mesh == mesh
    assert facts.peak_bytes > facts.parameters + facts.optimizer + facts.batch
    assert all(work.cycles for work in facts.works if work.flops)
    between = sum(x.received_from_slices for x in facts.exchanges)
    assert (between > 0) == (asked.topology.slices > 1)


def test_a_step_that_does_not_fit_says_what_it_needs():
    facts = compile_step(request("v5e:2x4", batch_size=2**24, fsdp=2))
    assert not facts.fits
    assert facts.peak_bytes > 16e9
    assert not facts.works
