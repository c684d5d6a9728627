"""KoLeo: images spread over the unit sphere, by the distance of each to its nearest (Sablayrolles
et al. 2018, arXiv:1806.03198; DINOv2, Oquab et al. 2023, arXiv:2304.07193)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.errors import check_ranges
from clip_jax.losses.objective import Context, Result, Term
from clip_jax.models.clip import CLIPConfig

_EPSILON = 1e-8  # of equal images


@dataclass(frozen=True, kw_only=True)
class KoLeoConfig(Term):
    """KoLeo regulariser: −log of the distance from each image embedding to the nearest."""

    name: ClassVar[str] = "koleo"

    weight: float = 0.1  # Factor on this loss in the objective (DINOv3: 0.1).
    # Adjacent images of a batch that are compared with each other (DINOv3, arXiv:2508.10104: 16).
    # The last group may have fewer.
    group: int = 16

    def __post_init__(self) -> None:
        check_ranges(self, "KoLeoConfig.", weight="[0, inf)", group="[2, inf)")

    def loss(self, x: Context) -> Result:
        """Average over the images of the global batch."""
        images = x.outputs["image"]
        full = len(images) - len(images) % self.group
        parts = [images[:full].reshape(-1, self.group, images.shape[1]), images[None, full:]]
        distances = jnp.concatenate([_nearest(part) for part in parts if part.shape[1] > 1])
        return -jnp.log(distances + _EPSILON).mean(), {"nearest_distance": distances.mean()}

    def macs(self, model: CLIPConfig, batch_size: int, locked: Sequence[str]) -> int:
        """Count the cosines, which have no gradient."""
        return batch_size * self.group * model.embed_dim


def _nearest(groups: Float[Array, "N G E"]) -> Float[Array, " NG"]:
    """Return the distance of each image to the nearest other one of its group."""
    cosines = jnp.einsum("NGE,NHE->NGH", groups, groups, precision="highest")
    nearest = (cosines - 3 * jnp.eye(groups.shape[1])).argmax(-1)
    others = jnp.take_along_axis(groups, nearest[:, :, None], axis=1)
    return jnp.linalg.norm(groups - others + _EPSILON, axis=-1).ravel()
