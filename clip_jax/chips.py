"""Accelerators: the table `chips.csv`, which has every fact about a chip in its row."""

import csv
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of chip. None: not known, or the chip has no such part."""

    name: str
    platform: Literal["tpu", "gpu"]
    device_kinds: tuple[str, ...]  # JAX's `device.device_kind`
    topology: str  # name in `--topology`, of TPUs libtpu's; "": no plans
    accelerator_type: str  # name of Cloud TPU, as in `v5litepod-8`; "": none, or not known
    axes: int | None  # dimensions of a TPU slice
    compiled_as: str  # `topology` of the chip that the compiler is to compile for
    libtpu_config: str | None  # libtpu's `chip_config_name`; None: its default
    devices: int  # JAX devices on one chip
    chips_per_host: int  # of a TPU slice; of GPUs those that NVLink joins
    peak_flops: float  # dense bf16 FLOP/s
    clock: float | None  # Hz, of TPUs: from the peak and the size of the matrix units
    cores: int | None
    matrix_units: int | None  # of a core; each takes a row of operands per cycle
    matrix_unit_size: int | None  # rows and columns of multipliers
    vmem_bytes: int | None  # of a core
    hbm_bytes: float
    hbm_bandwidth: float  # bytes/s
    interconnect_bandwidth: float | None  # bytes/s, both directions together
    network_bandwidth: float | None  # bytes/s between slices, in one direction

    @property
    def device(self) -> "Chip":
        """Return the share of one JAX device in the chip's memory and rates."""

        def share(total: float | None) -> float | None:
            return None if total is None else total / self.devices

        return dataclasses.replace(
            self,
            devices=1,
            peak_flops=self.peak_flops / self.devices,
            hbm_bytes=self.hbm_bytes / self.devices,
            hbm_bandwidth=self.hbm_bandwidth / self.devices,
            interconnect_bandwidth=share(self.interconnect_bandwidth),
            network_bandwidth=share(self.network_bandwidth),
        )


@functools.cache
def table() -> dict[str, Chip]:
    """Read the table of chips, by name (`TPU v5e`, `H100 SXM`)."""
    path = Path(__file__).with_name("chips.csv")
    with path.open(encoding="utf-8") as file:
        return {row["chip"]: _chip(row) for row in csv.DictReader(file)}


def _chip(row: dict[str, str]) -> Chip:
    def count(column: str, unit: int = 1) -> int | None:
        return int(row[column]) * unit if row[column] else None

    def rate(column: str, unit: float = 1e9) -> float | None:
        return float(row[column]) * unit if row[column] else None

    return Chip(
        name=row["chip"],
        platform="tpu" if row["platform"] == "tpu" else "gpu",
        device_kinds=tuple(row["device_kinds"].split(";")),
        topology=row["topology"],
        accelerator_type=row["accelerator_type"],
        axes=count("axes"),
        compiled_as=row["compiled_as"] or row["topology"],
        libtpu_config=row["libtpu_config"] or None,
        devices=int(row["jax_devices"]),
        chips_per_host=int(row["chips_per_host"]),
        peak_flops=float(row["bf16_dense_tflops"]) * 1e12,
        clock=rate("clock_ghz"),
        cores=count("cores"),
        matrix_units=count("matrix_units_per_core"),
        matrix_unit_size=count("matrix_unit_size"),
        vmem_bytes=count("vmem_mib_per_core", 2**20),
        hbm_bytes=float(row["hbm_gb"]) * 1e9,
        hbm_bandwidth=float(row["hbm_gbps"]) * 1e9,
        interconnect_bandwidth=rate("interconnect_gbps_bidir"),
        network_bandwidth=rate("network_gbps_one_way"),
    )


def find(device_kind: str) -> Chip | None:
    """Find the chip behind JAX's `device.device_kind`; None where the table has none (CPU).

    Names must match exactly: a "TPU v4 lite", an "H200 NVL" or a slice of a card is another chip.
    """
    return next((chip for chip in table().values() if device_kind in chip.device_kinds), None)


def peak_flops(device_kind: str) -> float | None:
    """Return the dense bf16 peak of one JAX device in FLOP/s; None if it is unknown (CPU)."""
    chip = find(device_kind)
    return None if chip is None else chip.device.peak_flops
