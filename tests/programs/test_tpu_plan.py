"""`plan`'s compiles for TPUs that are not there, by libtpu in a process of its own."""

import dataclasses

from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.pods.compile import Request, compile_step
from clip_jax.pods.topology import Topology
from clip_jax.sharding import MeshConfig
from tests.pods.conftest import MODEL, recipe
from tests.workflow.my_parts.hard_negatives import HardNegativeConfig
from tests.workflow.my_parts.mixer import MlpMixerConfig

MINE = MlpMixerConfig(image_size=16, patch_size=4, width=32, depth=1, token_width=16, mlp_width=64)


def request(
    topology: str, model: CLIPConfig = MODEL, *, schedules: bool = False, **mesh: int
) -> Request:
    return Request(
        recipe=recipe(model),
        mesh=MeshConfig(**mesh),
        topology=Topology.parse(topology),
        schedules=schedules,
    )


def test_a_7x_runs_the_kernel_and_sums_gradients():
    """A tile of a 7x may have 16 rows of bfloat16, where a block of the kernel has eight. Two bytes
    of each parameter at least cross the links, and not much more than four."""
    vision = dataclasses.replace(MODEL.vision, width=128)
    model = dataclasses.replace(MODEL, vision=vision, dtype="bfloat16")
    asked = request("tpu7x:2x2x1", model)
    asked = dataclasses.replace(asked, recipe=dataclasses.replace(asked.recipe, batch_size=256))
    facts, kinds = compile_step(asked), ("all-reduce", "reduce-scatter")
    assert ("image", "short") in facts.attention
    assert facts.calls()["tpu_custom_call"] == 2 * vision.depth
    summed = sum(x.bytes for x in facts.collectives if x.kind in kinds and "data" in x.axes)
    assert 0.5 <= summed / facts.parameters < 1.5


def test_between_slices_there_is_the_network_and_parts_of_a_user_are_imported():
    """By the process that compiles."""
    model = dataclasses.replace(MODEL, vision=MINE)
    asked = request("v4:2x2x1/slices=2", model, schedules=True, fsdp=2)
    losses = (HardNegativeConfig(),)
    asked = dataclasses.replace(asked, recipe=dataclasses.replace(asked.recipe, objective=losses))
    facts = compile_step(asked)
    assert (facts.fits, facts.mesh, facts.form) == (True, (4, 2, 1), "dense")
    assert sum(x.received_from_slices for x in facts.collectives) > 0
    timed = [x for x in facts.works if x.flops and x.part != "collectives" and not x.hidden]
    assert timed
    assert all(x.schedule for x in timed)
    assert any(work.part == "token mixing" for work in facts.works)


def test_a_resnets_kernels_are_gathered_over_fsdp_and_their_gradients_stay_split():
    tower = ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, num_heads=4)
    model = dataclasses.replace(MODEL, vision=tower)
    facts = compile_step(request("v5e:2x4", model, fsdp=4))
    assert facts.fits
    assert sum(x.received_from_slices for x in facts.collectives) == 0
    assert any(work.cycles for work in facts.works if work.flops)
    assert all(work.schedule is None for work in facts.works)
    ours = [x for x in facts.collectives if x.part.startswith("image tower")]
    assert {x.axes for x in ours if x.kind == "all-gather"} == {("fsdp",)}
    split = [x.bytes for x in ours if x.kind == "reduce-scatter" and x.axes == ("fsdp",)]
    sums = [x.bytes for x in ours if x.kind == "all-reduce" and "fsdp" in x.axes]
    assert max(sums) < 0.05 * max(split)  # of BatchNorm's statistics


def test_a_step_that_does_not_fit_says_what_it_needs():
    text = dataclasses.replace(MODEL.text, vocab_size=2**22, width=1_024)
    model = dataclasses.replace(MODEL, text=text)
    facts = compile_step(request("v5e:2x4", model, fsdp=2))
    assert not facts.fits
    assert facts.peak_bytes > facts.parameters + facts.optimizer > 16e9
    assert not facts.works
