"""Self-distillation: crops of an image predict what a moving average of the tower sees in all of it
(SILC, Naeem et al. 2023, arXiv:2310.13355, section 3.2; SigLIP 2, 2502.14786, section 2.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from clip_jax.errors import InputError, check_ranges
from clip_jax.losses.objective import Context, Outputs, Parameter, Pass
from clip_jax.losses.prototypes import TEACHER_VIEW, PrototypeTerm, tower_at
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.images import unstack
from clip_jax.models.inputs import Input

_VIEWS = "local_views"  # the input's name


@dataclass(frozen=True, kw_only=True)
class SelfDistillationConfig(PrototypeTerm):
    """Self-distillation (SILC): embeddings of small crops follow those that a moving average of the
    image tower has of the complete image."""

    name: ClassVar[str] = "self_distillation"
    uses_embeddings: ClassVar[bool] = False

    views: int = 8  # Crops of each image, which the student sees.
    view_size: int = 96  # Height and width of a crop in pixels; NaFlex: of as many patches.
    view_area: tuple[float, float] = (0.05, 0.4)  # Smallest and largest share of the image's area.

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {"views": "[1, inf)", "view_size": "[1, inf)", "view_area": "(0, 1]"}
        check_ranges(self, "SelfDistillationConfig.", **ranges)
        if self.view_area[0] > self.view_area[1]:
            raise InputError(
                f"SelfDistillationConfig.view_area={self.view_area} must be in ascending order; "
                "exchange the two."
            )

    def check(self, model: CLIPConfig) -> None:
        """Raise InputError unless the tower takes such crops."""
        super().check(model)
        tower_at(model, self.view_size)

    def reads(self, model: CLIPConfig) -> dict[str, Input]:
        """Return the teacher's view and the student's."""
        small = self.view(tower_at(model, self.view_size).image_spec, self.views, self.view_area)
        return {TEACHER_VIEW: self.teacher_view(model), _VIEWS: small}

    def parameters(self, model: CLIPConfig) -> dict[str, Parameter]:
        """Return the head for embeddings, and the prototypes."""
        return self.head_parameters(model.embed_dim)

    def averages(self) -> dict[str, float]:
        """Return the decay of the teacher's tower and head."""
        return {"visual": self.decay, self.name: self.decay}

    def encode(self, x: Context) -> Outputs:
        """Return the heads' outputs for all views, [B, 1, views, C] and [B, 1, C]."""
        views = x.model.normalize(unstack(x.inputs[_VIEWS]))
        embeddings, _ = x.model.pooled_and_patches(x.params, views)
        embeddings = rearrange(embeddings, "(B V) E -> B V E", V=self.views)
        student = self.apply_head(x, x.params[self.name], embeddings)
        teacher, _ = self.teacher_states(x)
        return {"student": student[:, None], "teacher": self.of_teacher(x, teacher[:, None])}

    def weights(self, x: Context) -> Float[Array, "B 1"]:
        """Return the same share for each image."""
        count = len(x.outputs["teacher"])
        return jnp.full((count, 1), 1 / count)

    def passes(self, model: CLIPConfig) -> dict[str, Pass]:
        """Return the student's pass over its crops, and the teacher's."""
        crop = tower_at(model, self.view_size).operations(model.embed_dim)
        return {_VIEWS: Pass(self.views * crop)} | self.teacher_pass(model)

    def macs(self, model: CLIPConfig, batch_size: int, locked: Sequence[str]) -> int:
        """Count heads and prototypes."""
        return self.prototype_macs(model.embed_dim, batch_size * self.views, batch_size)
