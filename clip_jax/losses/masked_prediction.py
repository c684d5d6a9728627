"""Masked prediction: the student predicts what a teacher sees in patches that the student does not
see (iBOT, Zhou et al. 2021, arXiv:2111.07832; TIPS, Maninis et al. 2024, arXiv:2410.16512)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clip_jax.errors import check_ranges
from clip_jax.losses.objective import Context, Outputs, Parameter, Pass
from clip_jax.losses.prototypes import TEACHER_VIEW, PrototypeTerm
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.images import Patches, unstack
from clip_jax.models.inputs import Input, MaskInput
from clip_jax.models.vit import Masked

_MASKS = "masked_patches"  # the input's name


@dataclass(frozen=True, kw_only=True)
class MaskedPredictionConfig(PrototypeTerm):
    """Masked prediction (iBOT): states of masked patches follow those of a teacher that sees all
    patches."""

    name: ClassVar[str] = "masked_prediction"
    uses_embeddings: ClassVar[bool] = False

    weight: float = 0.25  # Factor on this loss in the objective (SigLIP 2: 0.25).
    masked: float = 0.5  # Share of the patches that the student does not see.
    # Patches that are compared. masked: those that the student does not see (iBOT); all: also those
    # that it sees (iBOT++ of TIPSv2, arXiv:2604.12012).
    compared: Literal["masked", "all"] = "masked"
    # Tower of the teacher. average: a moving average of the student's; student: the student's own,
    # and the average is one of the head alone (iBOT++), which holds fewer parameters.
    teacher: Literal["average", "student"] = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "MaskedPredictionConfig.", masked="(0, 1]")

    def reads(self, model: CLIPConfig) -> dict[str, Input]:
        """Return the view of teacher and student, and what the student does not see of it."""
        masks = MaskInput(TEACHER_VIEW, model.vision.num_patches, self.masked)
        return {TEACHER_VIEW: self.teacher_view(model), _MASKS: masks}

    def parameters(self, model: CLIPConfig) -> dict[str, Parameter]:
        """Return the token in place of masked patches, the head for patches and the prototypes."""
        width = model.vision.width
        return {"mask_token": Parameter((width,), "-", std=0.0)} | self.head_parameters(width)

    def averages(self) -> dict[str, float]:
        """Return the decay of the teacher's head, and of its tower if it has its own."""
        parts = ("visual", self.name) if self.teacher == "average" else (self.name,)
        return dict.fromkeys(parts, self.decay)

    def encode(self, x: Context) -> Outputs:
        """Return the heads' outputs for the compared patches, [B, T, 1, C] and [B, T, C]."""
        views, numbers = x.inputs[TEACHER_VIEW], x.inputs[_MASKS]
        token = x.params[self.name]["mask_token"]
        is_masked = _is_masked(numbers, x.model.config.vision.num_patches)
        _, student = x.model.pooled_and_patches(
            x.params, x.model.normalize(unstack(views)), Masked(is_masked, token)
        )
        _, teacher = self.teacher_states(x, self.teacher == "average")
        if self.compared == "masked":
            at = jnp.maximum(numbers, 0)[:, :, None]
            student, teacher = (jnp.take_along_axis(y, at, axis=1) for y in (student, teacher))
        student = self.apply_head(x, x.params[self.name], student)
        return {"student": student[:, :, None], "teacher": self.of_teacher(x, teacher)}

    def weights(self, x: Context) -> Float[Array, "B T"]:
        """Return the same share for each image, and within one for each compared patch."""
        numbers, views = x.inputs[_MASKS], x.inputs[TEACHER_VIEW]
        compared = numbers >= 0
        if self.compared == "all":
            patches = x.outputs["teacher"].shape[1]
            length = views.length if isinstance(views, Patches) else jnp.full((1, 1), patches)
            compared = jnp.broadcast_to(jnp.arange(patches) < length, (len(numbers), patches))
        return compared / (len(numbers) * jnp.maximum(compared.sum(1, keepdims=True), 1))

    def passes(self, model: CLIPConfig) -> dict[str, Pass]:
        """Return the student's pass with masked patches, and the teacher's."""
        student = Pass(model.vision.operations(model.embed_dim))
        return {_MASKS: student} | self.teacher_pass(model, self.teacher == "average")

    def macs(self, model: CLIPConfig, batch_size: int, locked: Sequence[str]) -> int:
        """Count heads and prototypes."""
        patches = model.vision.num_patches
        if self.compared == "masked":
            patches = MaskInput(TEACHER_VIEW, patches, self.masked).count(patches)
        return self.prototype_macs(model.vision.width, batch_size * patches, batch_size * patches)


def _is_masked(numbers: Int[Array, "B most"], patches: int) -> Bool[Array, "B L"]:
    """Return which patches are among those with these numbers."""
    return (numbers[:, :, None] == jnp.arange(patches)).any(1)
