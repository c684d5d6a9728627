"""Training losses: contrastive ones over the global batch, the caption loss, and their sum."""

from clip_jax.losses.accumulation import cached_value_and_grad
from clip_jax.losses.caption import CaptionConfig, caption_loss, count_labels
from clip_jax.losses.classifier import ClassifierConfig
from clip_jax.losses.contrastive import (
    Contrastive,
    choose_form,
    contrastive_loss,
    devices_per_slice,
)
from clip_jax.losses.distillation import DistillationConfig, LiveTeacher, StoredTeacher
from clip_jax.losses.koleo import KoLeoConfig
from clip_jax.losses.masked_prediction import MaskedPredictionConfig
from clip_jax.losses.objective import Axes, Context, Frozen, Objective, Parameter, Pass, Term
from clip_jax.losses.same_caption import caption_ids
from clip_jax.losses.self_distillation import SelfDistillationConfig
from clip_jax.losses.sigmoid import SigmoidConfig
from clip_jax.losses.softmax import SoftmaxConfig

# The terms that a config file, config.json and the command line can name.
TermConfig = (
    SoftmaxConfig
    | SigmoidConfig
    | CaptionConfig
    | DistillationConfig
    | ClassifierConfig
    | SelfDistillationConfig
    | MaskedPredictionConfig
    | KoLeoConfig
)

__all__ = [
    "Axes",
    "CaptionConfig",
    "ClassifierConfig",
    "Context",
    "Contrastive",
    "DistillationConfig",
    "Frozen",
    "KoLeoConfig",
    "LiveTeacher",
    "MaskedPredictionConfig",
    "Objective",
    "Parameter",
    "Pass",
    "SelfDistillationConfig",
    "SigmoidConfig",
    "SoftmaxConfig",
    "StoredTeacher",
    "Term",
    "TermConfig",
    "cached_value_and_grad",
    "caption_ids",
    "caption_loss",
    "choose_form",
    "contrastive_loss",
    "count_labels",
    "devices_per_slice",
]
