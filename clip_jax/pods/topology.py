"""Parse the name of a pod: `v5e:16x16`, `v5e:16x16/slices=2`, `v5litepod-256`, `H100:64`."""

import contextlib
import functools
import math
import re
from dataclasses import dataclass
from importlib import resources

from jax.sharding import AbstractDevice

from clip_jax.chips import Chip, table
from clip_jax.errors import InputError

GPU_SHARE = 0.75  # XLA_PYTHON_CLIENT_MEM_FRACTION's default: share of a card that JAX takes


@functools.cache
def families() -> dict[str, Chip]:
    """Return the chips that can be planned for, by their names in `--topology`."""
    return {chip.topology: chip for chip in table().values() if chip.topology}


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A TPU slice, several slices, or GPUs."""

    family: str  # a key of `families`
    dims: tuple[int, ...]  # chips along each axis of a slice, or the number of GPUs
    slices: int = 1  # TPU slices, joined along the data axis by the data-centre network

    def __post_init__(self) -> None:
        if self.slices < 1 or (self.slices > 1 and not self.is_tpu):
            raise InputError(f"slices={self.slices} must be 1 for GPUs, at least 1 for TPUs.")
        node = self.chip.chips_per_host
        if not self.is_tpu and self.devices > node and self.devices % node:
            raise InputError(f"topology {self}: above {node} GPUs, use a multiple of {node}.")

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Read a name, also one of Cloud TPU. Raises InputError, which lists the families, for an
        unknown one."""
        if cloud := re.fullmatch(r"(v\w+)-(\d+)", text.strip().lower()):
            return cls._of_cloud(*cloud.groups())
        match = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)(?:/slices=(\d+))?", text)
        family, size, slices = match.groups() if match else ("", "0", None)
        dims = tuple(int(x) for x in size.split("x"))
        chip = {name.lower(): chip for name, chip in families().items()}.get(family.lower())
        axes = (2, 3) if chip and chip.platform == "tpu" else (1,)
        if chip is None or not all(dims) or len(dims) not in axes:
            tpus, gpus = (
                ", ".join(name for name, chip in families().items() if chip.platform == platform)
                for platform in ("tpu", "gpu")
            )
            raise InputError(
                f"topology {text!r} is not known; set --topology to a TPU slice such as "
                f"v5e:16x16, v5p:4x4x8 or v5e:16x16/slices=2 (families {tpus}), a Cloud TPU "
                f"accelerator type such as v5litepod-256, or GPUs such as H100:64 ({gpus})."
            )
        return cls(family=chip.topology, dims=dims, slices=int(slices or 1))

    @classmethod
    def _of_cloud(cls, kind: str, size: str) -> "Topology":
        """Read an accelerator type of Cloud TPU: `v5litepod-8` is 2x4 chips, `v5p-8` 2x2x1.

        The number counts TensorCores, of which a chip may have two. A slice is as nearly square, or
        cubic, as a power of two can be.
        """
        chips = {chip.accelerator_type: chip for chip in families().values()}
        chip = chips.get(kind)
        number, rest = divmod(int(size), chip.cores) if chip and chip.cores else (0, 0)
        if chip is None or not chip.axes or rest or number.bit_count() != 1:
            raise InputError(
                f"topology {kind}-{size} is not known: an accelerator type is one of "
                f"{', '.join(filter(None, chips))} and a power of two, such as v5litepod-8; other "
                "slices are called like v5p:16x16x12."
            )
        doublings = number.bit_length() - 1
        dims = tuple(2 ** ((doublings + i) // chip.axes) for i in range(chip.axes))
        return cls(family=chip.topology, dims=(2, 2, 1) if dims == (1, 2, 2) else dims)

    def __str__(self) -> str:
        return self._named(self.family, self.slices)

    def _named(self, family: str, slices: int) -> str:
        size = "x".join(map(str, self.dims))
        return f"{family}:{size}" + (f"/slices={slices}" if slices > 1 else "")

    @property
    def accelerator_type(self) -> str:
        """Return Cloud TPU's name of a slice, such as `v5p-8`; empty if it has none."""
        name = f"{self.chip.accelerator_type}-{self.chips * (self.chip.cores or 0)}"
        with contextlib.suppress(InputError):
            if self.slices == 1 and self.parse(name) == self:
                return name
        return ""

    @property
    def compiled_as(self) -> str:
        """Return the name of one slice by which the compiler knows it."""
        return self._named(self.chip.compiled_as, slices=1)

    @property
    def is_tpu(self) -> bool:
        return self.chip.platform == "tpu"

    @property
    def chip(self) -> Chip:
        return families()[self.family]

    @property
    def abstract_device(self) -> AbstractDevice:
        """Return a device of this kind, for which a program can be traced, but not compiled."""
        return AbstractDevice(self.chip.device_kinds[0], None, self.chip.platform)

    @property
    def card(self) -> str:
        """Return the description of a GPU that XLA needs to compile for it."""
        name = f"{self.chip.compiled_as.lower()}.txtpb"
        return (resources.files("clip_jax") / "pods" / "gpus" / name).read_text()

    @property
    def usable_bytes(self) -> float:
        """Return how much memory of one device a run may use, in bytes."""
        if self.is_tpu:
            # The compiler's own limit, 15.75 GiB on a v5e, exceeds the nominal 16 GB of the chip.
            return self.chip.device.hbm_bytes
        [size] = re.findall(r"device_memory_size: (\d+)", self.card)
        return GPU_SHARE * int(size)

    @property
    def chips(self) -> int:
        return math.prod(self.dims) * self.slices

    @property
    def devices(self) -> int:
        """Number of JAX devices; a chip may have several."""
        return self.chips * self.chip.devices

    @property
    def devices_per_host(self) -> int:
        """Number of JAX devices on a host of a TPU slice, or joined by NVLink."""
        return self.chip.chips_per_host * self.chip.devices

    @property
    def islands(self) -> int:
        """Number of groups of consecutive devices that only the slower network joins."""
        return self.slices if self.is_tpu else -(-self.devices // self.devices_per_host)
