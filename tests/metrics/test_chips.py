"""Peaks by JAX's names for devices."""

from clip_jax.metrics import chips


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
    kinds = [kind for chip in chips.chips().values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))  # none names two chips
