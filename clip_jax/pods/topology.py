"""Parse the name of a pod: `v5e:16x16`, `v5e:16x16/slices=2`, `H100:64`."""

import functools
import math
import re
from dataclasses import dataclass

from clip_jax.errors import InputError
from clip_jax.metrics import chips

# Name of a family -> name of its chip in chip_specs.csv. TPU families have libtpu's names.
TPUS = {
    "v3": "TPU v3",
    "v4": "TPU v4",
    "v5e": "TPU v5e",
    "v5p": "TPU v5p",
    "v6e": "TPU v6e",
    "tpu7x": "TPU v7x",
}
GPUS = {
    "A100": "A100 SXM 80GB",
    "A100-40GB": "A100 SXM 40GB",
    "H100": "H100 SXM",
    "H200": "H200 SXM",
    "B200": "B200 SXM",
}
NODE = 8  # GPUs per node, joined by NVLink


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A TPU slice, several slices, or GPUs."""

    family: str  # a key of TPUS or GPUS
    dims: tuple[int, ...]  # chips along each axis of a slice, or the number of GPUs
    slices: int = 1  # TPU slices, joined along the data axis by the data-centre network

    def __post_init__(self) -> None:
        if self.slices < 1 or (self.slices > 1 and not self.is_tpu):
            raise InputError(f"slices={self.slices} must be 1 for GPUs, at least 1 for TPUs.")
        if not self.is_tpu and self.devices > NODE and self.devices % NODE:
            raise InputError(f"topology {self}: above {NODE} GPUs, use a multiple of {NODE}.")

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Read a name. Raises InputError, which lists the families, for an unknown one."""
        match = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)(?:/slices=(\d+))?", text)
        family, size, slices = match.groups() if match else ("", "0", None)
        dims = tuple(int(x) for x in size.split("x"))
        known = {name.lower(): name for name in (*TPUS, *GPUS)}
        name = known.get(family.lower(), "")
        if not all(dims) or len(dims) not in ((2, 3) if name in TPUS else (1,)) or not name:
            raise InputError(
                f"topology {text!r} is not known; set --topology to a TPU slice such as "
                f"v5e:16x16, v5p:4x4x8 or v5e:16x16/slices=2 (families {', '.join(TPUS)}) or GPUs "
                f"such as H100:64 ({', '.join(GPUS)})."
            )
        return cls(family=name, dims=dims, slices=int(slices or 1))

    def __str__(self) -> str:
        slices = f"/slices={self.slices}" if self.slices > 1 else ""
        return f"{self.family}:{'x'.join(map(str, self.dims))}{slices}"

    @property
    def is_tpu(self) -> bool:
        return self.family in TPUS

    @functools.cached_property
    def chip(self) -> chips.Chip:
        return chips.chips()[(TPUS | GPUS)[self.family]]

    @property
    def devices(self) -> int:
        """Number of JAX devices; a chip may have several."""
        return math.prod(self.dims) * self.slices * self.chip.devices

    @property
    def islands(self) -> int:
        """Number of groups of consecutive devices that only the slower network joins."""
        return self.slices if self.is_tpu else -(-self.devices // NODE)
