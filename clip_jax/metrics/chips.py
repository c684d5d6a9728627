"""Peak performance of accelerators: `chip_specs.csv`, looked up by JAX's `device_kind`."""

import csv
import functools
from pathlib import Path
from typing import NamedTuple


class Chip(NamedTuple):
    """One kind of chip. Rates are per chip; one chip may be several JAX devices."""

    name: str
    peak_flops: float  # dense bf16 FLOP/s
    devices: int  # JAX devices on one chip
    hbm_bytes: float
    hbm_bandwidth: float  # bytes/s
    interconnect_bandwidth: float | None  # bytes/s, both directions together; None: not known
    clock: float | None  # Hz, of TPUs: from the peak and the size of the matrix units
    device_kinds: tuple[str, ...]  # JAX's `device.device_kind`


@functools.cache
def chips() -> dict[str, Chip]:
    """Read the table of chips, by name (`TPU v5e`, `H100 SXM`)."""
    table = Path(__file__).with_name("chip_specs.csv")
    with table.open(encoding="utf-8") as file:
        return {row["chip"]: _chip(row) for row in csv.DictReader(file)}


def _chip(row: dict[str, str]) -> Chip:
    interconnect = row["interconnect_gbps_bidir_per_chip"]
    return Chip(
        name=row["chip"],
        peak_flops=float(row["bf16_dense_tflops_per_chip"]) * 1e12,
        devices=int(row["jax_devices_per_chip"]),
        hbm_bytes=float(row["hbm_gb"]) * 1e9,
        hbm_bandwidth=float(row["hbm_gbps"]) * 1e9,
        interconnect_bandwidth=float(interconnect) * 1e9 if interconnect else None,
        clock=float(row["clock_ghz"]) * 1e9 if row["clock_ghz"] else None,
        device_kinds=tuple(row["device_kinds"].split(";")),
    )


def find(device_kind: str) -> Chip | None:
    """Find the chip behind JAX's `device.device_kind`; None where the table has none (CPU).

    Names must match exactly: a "TPU v4 lite", an "H200 NVL" or a slice of a card is another chip.
    """
    return next((chip for chip in chips().values() if device_kind in chip.device_kinds), None)


def peak_flops(device_kind: str) -> float | None:
    """Return the dense bf16 peak of one JAX device in FLOP/s; None if it is unknown (CPU)."""
    chip = find(device_kind)
    return None if chip is None else chip.peak_flops / chip.devices
