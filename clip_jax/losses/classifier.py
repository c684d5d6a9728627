"""Fine-tuning with labels: cross-entropy of a linear classifier on the image embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from clip_jax.errors import check_ranges
from clip_jax.losses.objective import Context, Outputs, Parameter, Result, Term
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.inputs import Input, LabelInput
from clip_jax.models.templates import check_template


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(Term):
    """Classifier head: a vector for each class, whose cosine with an image is scaled like a text's.

    It begins as the head of `init_from` if that has the same classes, else as the zero-shot
    classifier of the initial weights (WiSE-FT, Wortsman et al. 2021, arXiv:2109.01903, section 3).
    """

    name: ClassVar[str] = "classifier"

    classes: tuple[str, ...] = ()  # Names of the classes. Empty: those of data.source.
    templates: tuple[str, ...] = ("a photo of a {}.",)  # Prompts whose mean the vectors begin as.
    label_smoothing: float = 0.0  # Probability that targets spread over all classes.

    def __post_init__(self) -> None:
        check_ranges(self, "ClassifierConfig.", weight="[0, inf)", label_smoothing="[0, 1)")
        for template in self.templates or ("",):
            check_template(template, "ClassifierConfig.templates")

    def reads(self, model: CLIPConfig) -> dict[str, Input]:
        """Return the label of each image."""
        return {"label": LabelInput(self.classes)}

    def parameters(self, model: CLIPConfig) -> dict[str, Parameter]:
        """Return the vectors of the classes, [classes, E]."""
        return {"kernel": Parameter((len(self.classes), model.embed_dim), "- -")}

    def encode(self, x: Context) -> Outputs:
        """Return the cosine of each image with each class, [B, classes]."""
        kernel = x.params[self.name]["kernel"]
        return {"cosines": jnp.einsum("BE,CE->BC", x.outputs["image"], kernel, precision="highest")}

    def loss(self, x: Context) -> Result:
        """Average over the images of the global batch."""
        logits, labels = jnp.exp(x.params["logit_scale"]) * x.outputs["cosines"], x.inputs["label"]
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1]), self.label_smoothing)
        rows = optax.softmax_cross_entropy(logits, targets)
        return rows.mean(), {"classifier_accuracy": (logits.argmax(-1) == labels).mean()}

    def macs(self, model: CLIPConfig, batch_size: int, locked: Sequence[str]) -> int:
        """Count the cosines and their gradients, less the images' if that tower is locked."""
        return batch_size * len(self.classes) * model.embed_dim * (3 - ("image" in locked))
