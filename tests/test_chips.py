"""The table of chips."""

import pytest

from clip_jax import chips


def test_peaks_of_devices_and_none_of_what_is_only_called_alike():
    for device_kind, tflops in {
        "TPU v3": 61.5,  # of one of the chip's two cores
        "TPU v4": 275,
        "TPU v5 lite": 197,
        "TPU v5": 459,
        "TPU v5p": 459,
        "NVIDIA H100 80GB HBM3": 989,
    }.items():
        assert chips.peak_flops(device_kind) == tflops * 1e12
    for device_kind in ("TPU v4 lite", "NVIDIA H100 PCIe", "cpu"):
        assert chips.peak_flops(device_kind) is None


def test_no_name_is_that_of_two_chips():
    table = chips.table().values()
    for names in (
        [kind for chip in table for kind in chip.device_kinds],
        [chip.topology for chip in table if chip.topology],
    ):
        assert len(names) == len(set(names))
    topologies = {chip.topology for chip in table}
    assert {chip.compiled_as for chip in table} <= topologies


@pytest.mark.parametrize("chip", [x for x in chips.table().values() if x.platform == "tpu"])
def test_the_peak_of_a_tpu_is_that_of_its_matrix_units(chip):
    """Each multiplier adds a product in every cycle."""
    multipliers = chip.cores * chip.matrix_units * chip.matrix_unit_size**2
    assert 2 * multipliers * chip.clock == pytest.approx(chip.peak_flops, rel=0.01)


def test_a_device_has_its_share_of_a_chip():
    chip, v5e = chips.table()["TPU v7x"], chips.table()["TPU v5e"]
    assert chip.device.hbm_bytes == 96e9
    assert chip.device.interconnect_bandwidth == 600e9
    assert chip.device.network_bandwidth is None  # not known
    assert v5e.device == v5e
