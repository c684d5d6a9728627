"""Names of pods."""

import dataclasses
from unittest import mock

import pytest

from clip_jax import chips
from clip_jax.pods import topology as names
from clip_jax.pods.topology import Topology, families


@pytest.mark.parametrize(
    ("name", "devices", "islands", "chip"),
    [
        ("v5e:16x16", 256, 1, "TPU v5e"),
        ("v5e:16x16/slices=2", 512, 2, "TPU v5e"),
        ("tpu7x:4x4x4", 128, 1, "TPU v7x"),  # two devices a chip
        ("H100:4", 4, 1, "H100 SXM"),
        ("A100-40GB:64", 64, 8, "A100 SXM 40GB"),
    ],
)
def test_a_name_is_read_and_written(name, devices, islands, chip):
    topology = Topology.parse(name)
    assert str(topology) == name
    assert (topology.devices, topology.islands, topology.chip.name) == (devices, islands, chip)


@pytest.mark.parametrize(
    ("accelerator_type", "name"),
    [  # of Cloud TPU's documentation
        ("v3-8", "v3:2x2"),
        ("v4-8", "v4:2x2x1"),
        ("v4-64", "v4:2x4x4"),
        ("v5litepod-1", "v5e:1x1"),
        ("v5litepod-8", "v5e:2x4"),
        ("v5litepod-256", "v5e:16x16"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-4096", "v5p:8x16x16"),
        ("v6e-32", "v6e:4x8"),
    ],
)
def test_an_accelerator_type_of_cloud_tpu_is_a_slice(accelerator_type, name):
    topology = Topology.parse(accelerator_type)
    assert (str(topology), topology.accelerator_type) == (name, accelerator_type)


@pytest.mark.parametrize("name", ["v5e:16x16/slices=2", "v5p:4x4x12", "tpu7x:4x4x4", "H100:8"])
def test_others_have_no_accelerator_type(name):
    assert not Topology.parse(name).accelerator_type


@pytest.mark.parametrize(
    "name",
    [
        "v9:4x4",
        "v5litepod-12",
        "v5p-7",
        "v9-8",
        "v5e:3",
        "H100:0",
        "H100:8x8",
        "H100:12",
        "H100:8/slices=2",
        "v5e:4x4/x",
    ],
)
def test_what_is_none_is_refused(name):
    with pytest.raises(ValueError, match=r"v5e:16x16|slices=2|a multiple of 8|v5litepod-8"):
        Topology.parse(name)


def test_a_chip_that_the_compiler_lacks_is_compiled_as_another():
    newest = dataclasses.replace(chips.table()["TPU v6e"], name="TPU v99", topology="v99")
    with mock.patch.object(names, "families", autospec=True, return_value={"v99": newest}):
        topology = Topology.parse("v99:2x4/slices=2")
        assert (str(topology), topology.compiled_as) == ("v99:2x4/slices=2", "v6e:2x4")


@pytest.mark.parametrize("chip", [x for x in families().values() if x.platform == "gpu"])
def test_every_gpu_is_described_to_the_compiler(chip):
    topology = Topology.parse(f"{chip.topology}:8")
    assert topology.usable_bytes == pytest.approx(0.75 * topology.chip.hbm_bytes, rel=0.08)
