"""A pod by its name: `v5e:16x16`, `v5e:16x16/slices=2`, `H100:64`."""

import functools
import math
import re
from dataclasses import dataclass

from clip_jax.errors import InputError
from clip_jax.metrics import chips

# A family's name here -> the chip's in the table. Of the TPUs it is libtpu's own name too.
TPUS = {
    "v3": "TPU v3", "v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e",
    "tpu7x": "TPU v7x",
}  # fmt: skip
GPUS = {
    "A100": "A100 SXM 80GB", "A100-40GB": "A100 SXM 40GB", "H100": "H100 SXM", "H200": "H200 SXM",
    "B200": "B200 SXM",
}  # fmt: skip
NODE = 8  # GPUs that NVLink joins


@dataclass(frozen=True, kw_only=True)
class Topology:
    """What a run is planned for."""

    family: str  # of TPUS or GPUS
    dims: tuple[int, ...]  # chips along each axis of a slice; of GPUs their number
    slices: int = 1  # of TPUs, joined by the data-centre network along the data axis

    def __post_init__(self) -> None:
        if self.slices < 1 or (self.slices > 1 and not self.is_tpu):
            raise InputError(f"slices={self.slices}: give 1 or more of a TPU, 1 of {self.family}.")
        if not self.is_tpu and self.devices > NODE and self.devices % NODE:
            raise InputError(f"{self}: beyond {NODE} GPUs give a multiple of {NODE}.")

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Read a name. Raises InputError, which says what there is."""
        match = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)(?:/slices=(\d+))?", text)
        family, size, slices = match.groups() if match else ("", "0", None)
        dims = tuple(int(x) for x in size.split("x"))
        known = {name.lower(): name for name in (*TPUS, *GPUS)}
        name = known.get(family.lower(), "")
        if not all(dims) or len(dims) not in ((2, 3) if name in TPUS else (1,)) or not name:
            raise InputError(
                f"topology {text!r} is none that can be planned; give a TPU slice such as "
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
        """JAX devices, of which a chip may be several."""
        return math.prod(self.dims) * self.slices * self.chip.devices

    @property
    def islands(self) -> int:
        """Groups of devices, in order, between which there is only the slower network."""
        return self.slices if self.is_tpu else -(-self.devices // NODE)
