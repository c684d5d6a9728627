"""The least time that a training step can take: what compute, memory and links cost at their peaks.

The parts overlap at best, so the longest of them bounds the step, and with it the MFU.
"""

from typing import Literal, NamedTuple

from clip_jax.models.clip import CLIPConfig
from clip_jax.scaling import flops
from clip_jax.scaling.chips import Chip

# What a float32 matmul costs in bf16 passes of the matrix unit.
PASSES: dict[str, int] = {"default": 1, "high": 3, "highest": 6}
# Per chip and direction, bytes/s, between slices: Google's pages on v5e and v6e give it per pod of
# 256 chips (6.4 and 25.6 Tbit/s). Not known of the others.
NETWORK = {"TPU v5e": 3.125e9, "TPU v6e": 12.5e9}


class Bounds(NamedTuple):
    """Seconds of one step by part; None: not known."""

    compute: float
    memory: float | None
    interconnect: float | None
    network: float | None

    @property
    def step(self) -> float:
        """The step takes no less."""
        return max(x for x in self if x is not None)


def executed_flops(
    config: CLIPConfig,
    batch_size: int,
    *,
    precision: str,
    form: Literal["dense", "blocked", "ring"],
    accumulation: int = 1,
    locked: tuple[flops.Tower, ...] = (),
) -> float:
    """Count what the devices compute in one step, with what is computed again, in bf16 passes.

    Args:
      config: the architecture with its remat policy.
      batch_size: pairs in the global batch.
      precision: of the similarity's matmuls.
      form: of the loss; blocked and ring compute the logits again for the gradient.
      accumulation: more than one chunk encodes every pair twice.
      locked: towers that take no gradient, and so recompute nothing.
    """
    vision, dropout = config.vision, getattr(config.vision, "patch_dropout", 0.0)
    training = flops.training(config, batch_size, patch_dropout=dropout, locked=locked)
    forward = flops.forward(config, patch_dropout=dropout)
    matmuls = flops.forward(config, "no_attention", patch_dropout=dropout)
    ratios = {"image": getattr(vision, "mlp_ratio", None), "text": config.text.mlp_ratio}
    again = 0.0
    for tower in ("image", "text"):
        if tower not in locked:
            whole, plain = getattr(forward, tower), getattr(matmuls, tower)
            again += recomputed(config.remat, whole, plain, ratios[tower])
    if accumulation > 1:
        again += forward.total
    loss = training.loss * PASSES[precision] * (1 if form == "dense" else 4 / 3)
    return float(training.image + training.text + batch_size * again + loss)


def recomputed(remat: str, whole: int, plain: int, mlp_ratio: float | None) -> int | float:
    """Count what a tower computes again backward.

    `whole` is its forward pass, `plain` the same without attention's products; `mlp_ratio` is None
    for a ResNet. What each policy saves stands in `models/layers.py`.
    """
    match remat:
        case "full":
            return whole
        case "attention" if mlp_ratio is not None:  # of a block's 4 + 2r widths², 1 + r
            return plain * (1 + mlp_ratio) / (4 + 2 * mlp_ratio) + (whole - plain) / 2
        case "attention":
            return whole
        case "dots":
            return 0 if mlp_ratio is None else whole - plain
    return 0


def bounds(
    chip: Chip, devices: int, flops_: float, memory_bytes: int | float | None,
    interconnect_bytes: int | float | None, network_bytes: int | float,
) -> Bounds:  # fmt: skip
    """Divide work by peaks.

    Args:
      chip: peaks; `interconnect_bandwidth` is of both directions together, half of it inwards.
      devices: JAX devices, of which `chip.devices` make a chip.
      flops_: of all devices in one step.
      memory_bytes: that one device reads and writes.
      interconnect_bytes: that one device receives within its slice.
      network_bytes: that one device receives from other slices.
    """
    inwards = chip.interconnect_bandwidth and chip.interconnect_bandwidth / 2 / chip.devices
    network = NETWORK.get(chip.name)
    return Bounds(
        compute=flops_ / devices / (chip.peak_flops / chip.devices),
        memory=memory_bytes and memory_bytes / (chip.hbm_bandwidth / chip.devices),
        interconnect=None if interconnect_bytes is None or not inwards
        else interconnect_bytes / inwards,
        network=0.0 if not network_bytes else network and network_bytes * chip.devices / network,
    )  # fmt: skip
