"""Peaks by JAX's names for devices."""

import pytest

from clip_jax import chips


@pytest.mark.parametrize(
    ("device_kind", "tflops"),
    [
        ("TPU v3", 61.5),  # a device is one of the chip's two cores
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("TPU v4 lite", None),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_peak_of_a_device(device_kind: str, tflops: float | None):
    assert chips.peak_flops(device_kind) == (None if tflops is None else tflops * 1e12)


def test_mfu_is_work_over_what_the_devices_could_do():
    assert chips.mfu(275e12 * 8 * 0.1, 0.2, 8, "TPU v4") == pytest.approx(0.5)
    assert chips.mfu(1e12, 1.0, 1, "cpu") is None


def test_no_device_kind_names_two_chips():
    kinds = [kind for chip in chips.chips().values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
