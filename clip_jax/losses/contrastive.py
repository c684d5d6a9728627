"""Contrastive losses over all pairs of the global batch, in forms for any batch size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import AbstractMesh
from jaxtyping import Array, Float, Int

from clip_jax.errors import InputError, check_ranges
from clip_jax.losses.forms import PairLoss, dense
from clip_jax.losses.objective import AnyMesh, Context, Result, Term
from clip_jax.losses.pairs import Pairs, Precision, Side
from clip_jax.losses.prefixes import at_width, of_widths
from clip_jax.losses.same_caption import caption_ids as number_captions
from clip_jax.losses.streamed import Route, streamed
from clip_jax.losses.sums import NEAR, Statistics, Sums, common_sums, maxima, with_ties
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.inputs import CountInput, FurtherTexts, Input, LabelInput, TextInput

Form = Literal["auto", "dense", "blocked", "ring"]
Captions = Literal["true", "synthetic", "both", "all", "parts"]
TEXTS = {"true": {"text": "text"}, "synthetic": {"synthetic": "text:synthetic"}}
TEXTS["both"] = TEXTS["true"] | TEXTS["synthetic"]
TEXTS["all"] = TEXTS["parts"] = {"text": "text", "further": "text:further"}


@dataclass(frozen=True, kw_only=True)
class Contrastive(Term):
    """A loss of the similarity matrix of all images and texts of the global batch.

    A subclass defines the loss as a function of statistics of each row (image) and each column
    (text), and the dense, blocked and ring forms follow. With c_ij the cosine of image i and text
    j, s the factor `scale` and b the `bias` of the logits s · c_ij + b, it defines

    - `sums(scale, bias)`: the statistics that it accumulates, each under a name. `Max(values)` is
      the maximum over a row of any function of its pairs; `SumOf(values)`, `Count` and `Ties` are
      sums; `ExpSum(of, factor)` is Σ_j exp(factor · (v_ij − max_j v_ij)), relative to the `Max`
      of the name `of`, and so never overflows. `values` take a block of `Pairs`, whose rows and
      columns are any images and texts, and return one number for each pair, [R, C].
    - `losses(image, text, scale, bias)`: the losses of the images and texts, from their statistics
      [B] by name. The loss is the mean of the array, or the sum of the means of several.
    - `gradient(pairs, image, text, scale, bias)`: d Σ losses / d logits of a block, if it is known
      in closed form. Otherwise JAX derives it: sums over blocks have sums of derivatives. A class
      that overrides `sums` or `losses` of a built-in loss does not use that loss's gradient.

    Besides its own statistics, every loss has `top` = max_j c_ij, `ties` (how many pairs reach it),
    `positive` = Σ c_ij over the positive pairs, `exp_sum` = Σ_j exp(s · (c_ij − top)), and `count`,
    the number of valid pairs. If a row may have any number of positive pairs, `positives` counts
    them, and `hits` counts those that reach `top`. What a loss does not use, XLA removes.

    If texts have weights, as several texts of an image have, `text_weights` is the sum of those of
    the positive pairs; `sums.weighted` applies them. A class that does so sets `takes_several`.

    The terms of an objective have different names, so a subclass has its own `name`. As an
    example, the loss of a margin m to the hardest negative (VSE++, Faghri et al. 2018,
    arXiv:1707.05612, equation 6) is

        def sums(self, scale, bias):
            def negatives(pairs):
                return jnp.where(pairs.positive, MASKED, pairs.cosine)

            return {"hardest": Max(negatives, has_gradient=True)}

        def losses(self, image, text, scale, bias):
            def hinge(x):
                return jax.nn.relu(self.margin + x["hardest"] - x["positive"])

            return hinge(image) + hinge(text)
    """

    name: ClassVar[str] = "contrastive"
    needs_bias: ClassVar[bool] = False  # whether the loss takes the model's logit_bias
    takes_several: ClassVar[bool] = False  # whether it is defined for several texts of an image
    teachers: ClassVar[tuple[Any, ...]] = ()  # models whose similarities are targets

    # Captions that images are compared with. both: the sum of a loss with true and a loss with
    # synthetic captions; metrics are those of the true ones. all: the drawn caption and other
    # captions of the image, true and synthetic, in one loss with several positives per image.
    # parts: the drawn caption and parts of it, one or more sentences each, likewise.
    captions: Captions = "true"
    # Texts of an image with captions=all and parts, the drawn caption included: others are drawn in
    # each step. An image may have fewer.
    texts_per_image: int = 5
    sentences_per_part: int = 1  # Most adjacent sentences in a part, with captions=parts.
    form: Form = "auto"  # Form of the computation; all give the same loss, auto chooses by size.
    block_size: int = 512  # Number of texts compared at once by the forms blocked and ring.
    budget_mib: int = 256  # MiB that auto allows for logits (dense) or embeddings (blocked).
    precision: Precision = "highest"  # Matmul precision of similarities; TPUs' default is bfloat16.
    # Exclude pairs with the same caption from the negatives, and from the teachers' targets.
    mask_same_caption: bool = False
    mask_same_class: bool = False  # Exclude pairs of one class instead; needs class folders.
    # Numbers of first channels, ascending: the loss of each is added to that of complete embeddings
    # (Matryoshka), so that embeddings can be cut to these widths.
    widths: tuple[int, ...] = ()
    width_weights: tuple[float, ...] = ()  # Factors on the losses of the widths. Empty: 1 each.

    def __post_init__(self) -> None:
        check_ranges(
            self,
            f"{type(self).__name__}.",
            weight="[0, inf)",
            block_size="[1, inf)",
            budget_mib="[0, inf)",
            texts_per_image="[2, inf)",
            sentences_per_part="[1, inf)",
            widths="[1, inf)",
            width_weights="[0, inf)",
        )
        name = type(self).__name__
        if list(self.widths) != sorted(set(self.widths)):
            raise InputError(f"{name}.widths={self.widths}; list different widths, ascending.")
        if self.width_weights and len(self.width_weights) != len(self.widths):
            raise InputError(
                f"{name}.width_weights has {len(self.width_weights)} factors, but widths has "
                f"{len(self.widths)}; give one factor for each width, or none."
            )

    @property
    def texts(self) -> dict[str, str]:
        """The inputs with the captions of the loss, and the names of their outputs."""
        return TEXTS[self.captions]

    @property
    def needs(self) -> tuple[str, ...]:
        """The embeddings of synthetic captions, if the loss compares them."""
        return tuple(name for name in self.texts.values() if name != "text")

    @property
    def has_several(self) -> bool:
        """Whether an image has several texts, which are positives in one loss."""
        return self.captions in ("all", "parts")

    def check(self, model: CLIPConfig) -> None:
        """Raise InputError if the loss takes a bias or a width that the model does not have, or
        several texts of an image that it does not define."""
        if self.has_several and not self.takes_several:
            raise InputError(
                f"{type(self).__name__}.captions={self.captions} needs a loss with several "
                "positives per image, such as SoftmaxConfig or SigmoidConfig: choose true, "
                "synthetic or both, or let your class set takes_several (see Contrastive)."
            )
        _check_widths(self, model.embed_dim)
        if self.needs_bias and model.init_logit_bias is None:
            raise InputError(
                f"{type(self).__name__} needs a logit_bias, but the model has none: "
                "set model.init_logit_bias (SigLIP: -10) or choose a softmax loss."
            )

    def reads(self, model: CLIPConfig) -> dict[str, Input]:
        """Return the synthetic captions and the classes, if the loss compares them."""
        inputs: dict[str, Input] = {"class": LabelInput()} if self.mask_same_class else {}
        if self.has_several:
            sentences = self.sentences_per_part if self.captions == "parts" else None
            further = FurtherTexts(model.text, self.texts_per_image - 1, sentences)
            return inputs | {"further": further, further.counter("further"): CountInput()}
        return inputs | {
            name: TextInput(model.text, synthetic=True) for name in self.texts if name != "text"
        }

    def sums(self, scale: Float[Array, ""], bias: Float[Array, ""]) -> Sums:
        """Return what the loss accumulates over rows and columns, by name."""
        return {}

    def losses(
        self, image: Statistics, text: Statistics, scale: Float[Array, ""], bias: Float[Array, ""]
    ) -> Any:
        """Return the losses from the statistics of all images and all texts, [B] or several [B]."""
        raise NotImplementedError

    def gradient(
        self,
        pairs: Pairs,
        image: Statistics,
        text: Statistics,
        scale: Float[Array, ""],
        bias: Float[Array, ""],
    ) -> Float[Array, "R C"]:
        """Return d Σ losses / d logits on a block. JAX derives it if a subclass does not."""
        raise NotImplementedError

    def loss(self, x: Context) -> Result:
        """Compute the loss of the global batch."""
        scale, results = jnp.exp(x.params["logit_scale"]), []
        if self.has_several:
            return self._of_several(x, scale)
        for name, output in self.texts.items():
            teachers = [
                (x.outputs[f"teacher{i}_image"], x.outputs[f"teacher{i}_{name}"])
                for i in range(len(self.teachers))
            ]
            ids = number_captions(x.inputs[name]) if self.mask_same_caption else None
            ids = x.inputs["class"] if self.mask_same_class else ids
            result = contrastive_loss(
                self,
                x.outputs["image"],
                x.outputs[output],
                scale,
                x.params.get("logit_bias"),
                teachers=teachers,
                caption_ids=ids,
                mesh=x.mesh,
                axes=x.axes.rows,
            )
            results.append(result)
        (loss, metrics), *others = results
        return sum((value for value, _ in others), start=loss), metrics

    def _of_several(self, x: Context, scale: Float[Array, ""]) -> Result:
        """Compute the loss with several texts of each image, whose weights add up to 1."""
        text, further = x.outputs["text"], x.outputs["text:further"]
        batch, count = further.shape[0], further.shape[1] + 1

        def in_rows(a: Array, b: Array) -> Array:
            return rearrange(jnp.concatenate([a[:, None], b], 1), "B T ... -> (B T) ...")

        number = x.inputs["further_count"][:, None] + 1
        weights = jnp.where(jnp.arange(count) < number, 1 / number, 0)
        masks = None
        if self.mask_same_caption:
            ids = number_captions(in_rows(x.inputs["text"], x.inputs["further"]))
            masks = ids.reshape(batch, count), ids
        if self.mask_same_class:
            masks = x.inputs["class"], jnp.repeat(x.inputs["class"], count)
        index = jnp.arange(batch)
        return contrastive_loss(
            self,
            x.outputs["image"],
            in_rows(text, further),
            scale,
            x.params.get("logit_bias"),
            ids=(index, jnp.repeat(index, count)),
            text_weights=weights.reshape(-1),
            caption_ids=masks,
            mesh=x.mesh,
            axes=x.axes.rows,
        )

    def macs(self, model: CLIPConfig, batch_size: int, locked: Sequence[str]) -> int:
        """Count similarities and their two gradients, less one per locked tower, and teachers'.

        Widths add none: products of their channels are parts of those of complete embeddings.
        """
        trained = model.embed_dim * (3 - len(set(locked)))
        width = trained + sum(x.embed_dim for x in self.teachers)
        texts = self.texts_per_image if self.has_several else len(self.texts)
        return batch_size * batch_size * width * texts

    def chosen_form(self, model: CLIPConfig, batch_size: int, shards: int) -> Form:
        """Return the form that is used, with `auto` resolved."""
        widths = [x.embed_dim + self.needs_bias for x in self.teachers]
        texts = batch_size * (self.texts_per_image if self.has_several else 1)
        return choose_form(self, batch_size, model.embed_dim, shards, widths, texts)


def contrastive_loss(
    config: Contrastive,
    image_features: Float[Array, "B E"],
    text_features: Float[Array, "C E"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    *,
    ids: tuple[Int[Array, " B"], Int[Array, " C"]] | None = None,
    teachers: Sequence[tuple[Float[Array, "B _"], Float[Array, "C _"]]] = (),
    inputs: tuple[Mapping[str, Array], Mapping[str, Array]] = ({}, {}),
    caption_ids: Int[Array, " B"] | tuple[Int[Array, "B ..."], Int[Array, " C"]] | None = None,
    text_weights: Float[Array, " C"] | None = None,
    mesh: AnyMesh | None = None,
    axes: tuple[str, ...] = (),
) -> Result:
    """Compute loss and metrics of L2-normalised embeddings; pair i is row i of both.

    With `ids` of images and texts, those of the same id are positive pairs instead: each image may
    have several texts, each text several images, and C may differ from B. Then `text_weights` may
    give factors for the losses of texts: the texts' part of a softmax loss is Σ weight · loss / B,
    and a sigmoid loss is the sum over all pairs of weight · loss, over B. Texts of weight 0 take no
    part, so that rows of an image with fewer texts may be empty.

    Embeddings are global arrays whose first dim is sharded over the mesh axes `axes` (none: one
    device). `logit_scale` is the factor itself, not its logarithm. The softmax ignores
    `logit_bias`, which cancels in it; the sigmoid needs it. `teachers` has the embeddings of
    images and texts by each teacher, as in `Side`, and `inputs` more arrays of each image and each
    text, such as weights, which the loss finds in `Pairs`; they get no gradient. `caption_ids` (see
    `same_caption`) or the classes are required by a mask and ignored without; they may be a pair:
    those of images, [B] or [B, K] with one for each caption of an image, and of texts. Metrics:
    `image_to_text_accuracy` and `text_to_image_accuracy`, top 1 in the batch, where k-fold ties
    count 1/k.

    Raises InputError if the mesh lacks one of `axes`, or if B or C is not a multiple of the number
    of shards.

        >>> import clip_jax, jax.numpy as jnp
        >>> image, text = jnp.eye(4), jnp.eye(4)[jnp.array([0, 1, 3, 2])]
        >>> softmax = clip_jax.SoftmaxConfig()
        >>> loss, metrics = clip_jax.contrastive_loss(softmax, image, text, jnp.float32(2))
        >>> print(f"{loss:.2f}", metrics["image_to_text_accuracy"])
        1.34 0.5
    """
    _check_widths(config, image_features.shape[1])
    if not config.needs_bias:
        logit_bias = jnp.zeros_like(logit_scale)
    if logit_bias is None:
        raise ValueError(f"{type(config).__name__} needs logit_bias, but got None.")
    if len(teachers) != len(config.teachers):
        raise ValueError(
            f"{type(config).__name__} has {len(config.teachers)} teachers, but got the embeddings "
            f"of {len(teachers)}."
        )
    if text_weights is not None and ids is None:
        raise ValueError("text_weights need ids of images and texts, but got None.")
    if config.mask_same_caption and caption_ids is None:
        raise ValueError("mask_same_caption=True needs caption_ids, but got None.")
    shards = _shards((len(image_features), len(text_features)), mesh, axes)
    index = jnp.arange(len(image_features))
    image_ids, text_ids = ids or (index, index)
    masks = caption_ids if isinstance(caption_ids, tuple) else (caption_ids, caption_ids)
    if not (config.mask_same_caption or config.mask_same_class):
        masks = (None, None)
    of_images, of_texts = (
        tuple(jax.lax.stop_gradient(pair[i]) for pair in teachers) for i in (0, 1)
    )
    image = Side(image_features, image_ids, masks[0], of_images, inputs[0])
    text = Side(text_features, text_ids, masks[1], of_texts, inputs[1], text_weights)
    mesh = mesh if shards > 1 else None
    widths = [x.shape[1] for x in of_texts]
    sizes = len(image_features), image_features.shape[1]
    form = choose_form(config, *sizes, shards, widths, texts=len(text_features))
    loss = _pair_loss(config, one_to_one=ids is None, weighted=text_weights is not None)
    if form == "dense":
        return dense(loss, image, text, logit_scale, logit_bias, mesh, axes)
    ring = 1 if form == "blocked" or mesh is None else devices_per_slice(mesh, axes)
    route = Route(axes, shards, ring)
    return streamed(loss, image, text, logit_scale, logit_bias, mesh, route)


def _shards(sizes: tuple[int, int], mesh: AnyMesh | None, axes: tuple[str, ...]) -> int:
    """Return the number of shards of a batch. Raises InputError unless they divide its sizes."""
    if mesh is not None and (unknown := [axis for axis in axes if axis not in mesh.shape]):
        raise InputError(
            f"axes={axes!r}: the mesh has no axis {', '.join(map(repr, unknown))}; its axes are "
            f"{', '.join(mesh.axis_names)}."
        )
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
    for size in sizes:
        if size % shards:
            raise InputError(
                f"A batch of {size} does not divide into {shards} shards (mesh axes {axes}): "
                "change batch_size or the mesh."
            )
    return shards


def _pair_loss(config: Contrastive, one_to_one: bool, weighted: bool) -> PairLoss:
    """Return the functions of a loss, whose closed gradient is that of one text for each image."""

    def sums(scale: Array, bias: Array) -> Sums:
        common = common_sums(scale, one_to_one, weighted=weighted)
        further = config.sums(scale, bias)
        if taken := sorted(common.keys() & further.keys()):
            raise InputError(
                f"{type(config).__name__}.sums defines {', '.join(taken)}, which every contrastive "
                "loss has already; give yours another name."
            )
        tops = maxima(common | further)
        for name, entry in further.items():
            if (top := getattr(entry, "of", None)) not in (None, *tops):
                raise InputError(
                    f"{type(config).__name__}.sums: {name} is relative to {top!r}, which is no "
                    f"maximum; these are {', '.join(tops)}."
                )
        at_widths = with_ties(common_sums(scale, one_to_one, NEAR, weighted) | further)
        return with_ties(common | further) | of_widths(at_widths, config.widths)

    def losses(image: Statistics, text: Statistics, scale: Array, bias: Array) -> Any:
        factors = (1.0, *(config.width_weights or (1.0,) * len(config.widths)))
        results = []
        for factor, width in zip(factors, (None, *config.widths), strict=True):
            of_image, of_text = at_width(image, width), at_width(text, width)
            try:
                of_width = config.losses(of_image, of_text, scale, bias)
            except KeyError as error:
                names = ", ".join(name for name in of_image if not name.endswith("/ties"))
                raise InputError(
                    f"{type(config).__name__}.losses looks up {error}; the statistics are {names}."
                ) from error
            results.append(jax.tree.map(lambda x, factor=factor: factor * x, of_width))
        return results

    is_closed = one_to_one and not config.widths and _has_closed_gradient(type(config))
    return PairLoss(
        sums=sums,
        losses=losses,
        gradient=config.gradient if is_closed else None,
        precision=config.precision,
        widths=config.widths,
        block_size=config.block_size,
    )


def _has_closed_gradient(kind: type[Contrastive]) -> bool:
    """Return whether a class has a gradient that is that of its sums and losses.

    One that overrides these alone inherits the gradient of another loss.
    """

    def definer(name: str) -> int:
        return next(i for i, base in enumerate(kind.__mro__) if name in vars(base))

    is_newest = definer("gradient") <= min(definer("sums"), definer("losses"))
    return is_newest and kind.gradient is not Contrastive.gradient


def _check_widths(config: Contrastive, embed_dim: int) -> None:
    if config.widths and config.widths[-1] >= embed_dim:
        raise InputError(
            f"{type(config).__name__}.widths={config.widths}, but embeddings have {embed_dim} "
            "channels; choose smaller widths. Complete embeddings always have a loss."
        )


def choose_form(
    config: Contrastive,
    batch: int,
    embed_dim: int,
    shards: int,
    teachers: Sequence[int] = (),
    texts: int | None = None,
) -> Form:
    """Resolve `auto`: dense if a device's logits fit the budget, blocked if the texts' embeddings
    do, with those of prefixes, and of teachers of the given widths.

    `texts` is the number of texts in the batch, by default that of images.
    """
    texts = texts or batch
    budget = config.budget_mib * 2**20 / 4  # float32s
    if config.form != "auto":
        return config.form
    matrices = 1 + len(config.widths) + len(teachers)
    if batch * texts // shards * matrices <= budget:
        return "dense"
    width = embed_dim + sum(teachers)
    return "blocked" if texts * width <= budget or shards == 1 else "ring"


def devices_per_slice(mesh: AnyMesh, axes: tuple[str, ...]) -> int:
    """Count the devices along `axes` within a slice, with fast links; 1 if slices are interleaved.

    Devices of one TPU slice share a `slice_index`; other backends have none and count as one.
    """
    others = tuple(axis for axis in mesh.axis_names if axis not in axes)
    order = [mesh.axis_names.index(axis) for axis in (*axes, *others)]
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if isinstance(mesh, AbstractMesh):  # of a trace, which runs nothing
        return shards
    devices = mesh.devices.transpose(order).reshape(shards, -1)
    slices = [[getattr(device, "slice_index", 0) for device in row] for row in devices]
    ring = slices.count(slices[0])
    in_order = all(row == slices[i - i % ring] for i, row in enumerate(slices))
    return ring if shards % ring == 0 and in_order else 1
