"""Distillation: every form against the definition in float64, and the parts of the term."""

import contextlib
import functools
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.errors import InputError
from clip_jax.losses import (
    Axes,
    Context,
    DistillationConfig,
    LiveTeacher,
    Parameter,
    StoredTeacher,
    contrastive,
    contrastive_loss,
    devices_per_slice,
)
from clip_jax.models.clip import CLIP, l2_normalize
from clip_jax.models.inputs import ImageInput, StoredInput, TextInput
from clip_jax.sharding import BATCH_AXES, MeshConfig, batch_sharding, make_mesh
from tests.conftest import MESHES, TINY, assert_close, parameters
from tests.losses.conftest import BIG, LIVE, SMALL, TERM, embeddings, inputs, unit

BATCH, EMBED = 48, 16
CAPTIONS = np.arange(BATCH) % 40  # eight captions occur twice
TEACHERS = ((24, 100.0, -60.0), (8, 60.0, -40.0), (40, 20.0, -10.0))  # width, scale, bias
MASK, WIDTHS = {"mask_same_caption": True}, {"widths": (4, 12)}


def problem() -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """The student's embeddings and scalars, and three teachers' unit embeddings, in float32."""
    draw = np.random.default_rng(0).normal
    image = draw(size=(BATCH, 24))
    text = (image + 0.5 * draw(size=image.shape))[CAPTIONS]
    tower = draw(size=(24, EMBED))
    student = {
        "image": unit(image @ tower),
        "text": unit(text @ (tower + 0.1 * draw(size=tower.shape))),
        "logit_scale": np.log(100),
        "logit_bias": np.array(-70.0),
    }
    towers = [draw(size=(24, width)) for width, _, _ in TEACHERS]
    teachers = [(unit(image @ teacher), unit(text @ teacher)) for teacher in towers]
    return jax.tree.map(lambda x: np.asarray(x, np.float32), (student, teachers))


def definition(
    student: Any, teachers: Any, count: Any, is_masked: Any, width: Any, similarity: str
) -> Any:
    """The loss of the first `count` teachers with whole matrices, as it is written in papers, for
    the student's first `width` channels."""
    cut = {side: student[side] * (np.arange(EMBED) < width) for side in ("image", "text")}
    student |= {
        side: jnp.where(width < EMBED, l2_normalize(x), student[side]) for side, x in cut.items()
    }
    keep = np.eye(BATCH, dtype=bool) | (CAPTIONS[:, None] != CAPTIONS) | ~is_masked
    shares = (np.arange(len(TEACHERS)) < count) / count
    z = jnp.exp(student["logit_scale"]) * student["image"] @ student["text"].T
    logits = [
        scale * a @ b.T + bias for (a, b), (_, scale, bias) in zip(teachers, TEACHERS, strict=True)
    ]
    if similarity == "softmax":
        total = 0.0
        for axis in (0, 1):
            every = [jax.nn.softmax(jnp.where(keep, t, -jnp.inf), axis) for t in logits]
            target = sum(share * x for share, x in zip(shares, every, strict=True))
            log_p = jax.nn.log_softmax(jnp.where(keep, z, -jnp.inf), axis)
            total -= jnp.where(keep, target * log_p, 0).sum() / BATCH
        return total / 2
    p = sum(share * jax.nn.sigmoid(x) for share, x in zip(shares, logits, strict=True))
    z += student["logit_bias"]
    losses = -jax.nn.log_sigmoid((2 * p - 1) * z)
    if similarity == "soft_label_sigmoid":
        losses = -p * jax.nn.log_sigmoid(z) - (1 - p) * jax.nn.log_sigmoid(-z)
    return jnp.where(keep, losses, 0).sum() / BATCH


_exact = jax.jit(jax.value_and_grad(definition), static_argnums=5)


def reference(similarity: str, count: int, options: dict) -> Any:
    """The loss and the gradients of the student, by one float64 program for each similarity."""
    with jax.enable_x64(True):
        doubles = jax.tree.map(lambda x: x.astype(np.float64), problem())
        settings = np.float64(count), np.array(options.get("mask_same_caption", False))
        of_widths = [
            _exact(*doubles, *settings, np.array(width), similarity)
            for width in (EMBED, *options.get("widths", ()))
        ]
        return jax.tree.map(lambda *x: np.sum(x, 0), *of_widths)


def scaled(teachers: Any, with_bias: bool) -> list[tuple[Any, Any]]:
    """Teachers' embeddings as `Side` has them: times their scale, a bias as one more channel."""

    def channel(x: Any, value: float) -> Any:
        return np.pad(x, ((0, 0), (0, int(with_bias))), constant_values=value)

    return [
        (channel(np.float32(scale) * a, bias), channel(b, 1.0))
        for (a, b), (_, scale, bias) in zip(teachers, TEACHERS, strict=False)
    ]


def config_of(similarity: Any, count: int = 1, **options: Any) -> DistillationConfig:
    teachers = tuple(StoredTeacher(embed_dim=width) for width, _, _ in TEACHERS[:count])
    return DistillationConfig(teachers=teachers, similarity=similarity, **options)


# Each form of each loss, with and without a mask, for several numbers of teachers and of devices.
@pytest.mark.parametrize(
    ("similarity", "count", "form", "mesh", "options", "block_size"),
    [
        ("softmax", 1, "dense", "1", {}, 5),
        ("softmax", 2, "dense", "2x2x2", MASK, 5),
        ("softmax", 3, "blocked", "4x2", MASK, 5),
        ("softmax", 3, "ring", "8", {}, 5),
        ("softmax", 2, "rings of 2", "4x2", MASK, 5),
        ("sigmoid", 2, "dense", "4", {}, 5),
        ("sigmoid", 1, "blocked", "1", MASK, 7),
        ("sigmoid", 2, "ring", "4x2", MASK, 1),
        ("soft_label_sigmoid", 3, "dense", "4x2", MASK, 5),
        ("soft_label_sigmoid", 2, "blocked", "2x2x2", {}, 7),
        ("soft_label_sigmoid", 1, "ring", "2", MASK, 1000),
        ("soft_label_sigmoid", 2, "rings of 2", "8", {}, 5),
        ("sigmoid", 2, "dense", "1", WIDTHS, 5),
    ],
)
def test_equals_the_definition(
    similarity: str,
    count: int,
    form: str,
    mesh: str,
    options: dict,
    block_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if form == "rings of 2":  # neighbours of one slice pass texts on; slices gather
        slices = mock.create_autospec(devices_per_slice, return_value=2)
        monkeypatch.setattr(contrastive, "devices_per_slice", slices)
    form = form.split()[0].replace("rings", "ring")
    config = config_of(similarity, count, form=form, block_size=block_size, **options)
    on = make_mesh(
        MESHES.get(mesh, MeshConfig()), jax.devices()[: int(mesh) if len(mesh) < 2 else 8]
    )
    student, teachers = problem()

    def value(student: dict, teachers: list) -> Any:
        scale, bias = jnp.exp(student["logit_scale"]), student["logit_bias"]
        loss, _ = contrastive_loss(
            config,
            student["image"],
            student["text"],
            scale,
            bias,
            teachers=teachers,
            caption_ids=jnp.asarray(CAPTIONS),
            mesh=on,
            axes=BATCH_AXES,
        )
        return loss

    def place(x: Any) -> Any:
        return jax.device_put(x, batch_sharding(on) if x.ndim else NamedSharding(on, P()))

    inputs = student, scaled(teachers[:count], config.needs_bias)
    got = jax.jit(jax.value_and_grad(value, (0, 1)))(*jax.tree.map(place, inputs))
    want = reference(similarity, count, options)
    loss, (gradients, of_teachers) = got
    assert want[0] > 0.3
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(of_teachers))
    assert_close(want, (loss, gradients))


@pytest.mark.parametrize("form", ["dense", "blocked"])
@pytest.mark.parametrize("similarity", ["softmax", "sigmoid", "soft_label_sigmoid"])
def test_extreme_values_give_finite_results(similarity: str, form: str) -> None:
    config = config_of(similarity, form=form, block_size=3)

    @jax.jit
    @jax.value_and_grad
    def gradient(student: Any, a: Any, b: Any) -> Any:
        return contrastive_loss(config, *student, teachers=[(a, b)])[0]

    eye = jnp.eye(16)
    equal = jnp.broadcast_to(eye[0], eye.shape)
    scale, bias = jnp.float32(100), jnp.float32(-100)
    for image, text in ((eye, eye), (eye, -eye), (equal, equal), (equal, -equal)):
        for a in (1e4 * eye, -1e4 * eye, 100 * equal):  # sure of one pair, of none, of all alike
            for x in jax.tree.leaves(gradient((image, text, scale, bias), a, eye)):
                assert np.isfinite(x).all()
    loss, (of_image, *_) = gradient((equal, equal, scale, bias), 100 * equal, equal)
    if similarity == "softmax":  # all are alike for teacher and student
        assert loss == pytest.approx(np.log(16))
        assert np.abs(of_image).max() < 1e-5


# ------------------------------------------------------------------ parts of the term


def context(outputs: Any, data: Any, params: Any, frozen: Any = None) -> Context:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    outputs, axes = jax.tree.map(jnp.asarray, outputs), Axes(BATCH_AXES, "fsdp", "tensor")
    return Context(CLIP(TINY), params, data, outputs, mesh, axes, frozen or {})


def test_scale_and_bias_of_a_teacher_are_in_its_embeddings() -> None:
    model = replace(BIG, init_logit_bias=-10.0)
    params = jax.tree.map(jnp.asarray, parameters(model))  # scale 10, bias −3
    data = jax.tree.map(jnp.asarray, inputs())
    live = LiveTeacher(weights="runs/big", model=model, dtype="float32")
    embedded = embeddings(model, data["teacher1_image"], data)
    stored = {x: unit(np.asarray(data[f"stored_{x}"], np.float64)[:, :8]) for x in embedded}
    data["teacher0_image"] = data["teacher1_image"]
    cases = (
        (StoredTeacher(embed_dim=8, logit_scale=60.0, logit_bias=-40.0), stored, 60, -40),
        (live, embedded, 10, -3),
        (replace(live, logit_scale=20.0, logit_bias=0.0), embedded, 20, 0),
    )

    @jax.jit
    def encode(data: Any, params: Any) -> Any:
        x = context({}, data, {}, {"teacher0": params})
        terms = [DistillationConfig(teachers=(y,), similarity="sigmoid") for y, *_ in cases]
        return [tuple(term.encode(x).values()) for term in terms]

    for pair, (_, unscaled, scale, bias) in zip(encode(data, params), cases, strict=True):
        a, b = (np.asarray(y, np.float64) for y in pair)
        expected = scale * unscaled["image"] @ unscaled["text"].T + bias
        np.testing.assert_allclose(a @ b.T, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("features", "widths"),
    [("cosine", (8,)), ("squared_error", (8, 12)), ("cosine", (8, 12, 24))],
)
def test_distances_of_embeddings_equal_the_definition(features: Any, widths: tuple) -> None:
    term = DistillationConfig(
        teachers=tuple(StoredTeacher(embed_dim=x) for x in widths),
        features=features,
        features_weight=3.0,
        similarity_weight=0.0,
    )
    draw, towers = np.random.default_rng(0).normal, ("image", "text")
    stored = {x: draw(size=(16, sum(widths))).astype(np.float32) for x in towers}
    student = {x: unit(draw(size=(16, EMBED))).astype(np.float32) for x in towers}
    shapes = term.parameters(TINY)
    assert shapes["teacher0_text"] == Parameter((16, 8), "E -")
    maps = {name: draw(size=x.shape).astype(np.float32) for name, x in shapes.items()}

    def value(student: Any, maps: Any) -> Any:
        data = {f"stored_{x}": jnp.asarray(y) for x, y in stored.items()}
        x = context(student, {"image": None, "text": None, **data}, {term.name: maps})
        return term.loss(replace(x, outputs=student | term.encode(x)))[0]

    def exact(student: Any, maps: Any) -> Any:
        total = 0.0
        for tower in towers:
            parts = np.split(stored[tower].astype(np.float64), np.cumsum(widths)[:-1], axis=1)
            for i, part in enumerate(parts):
                y, z = unit(part), student[tower] @ maps[f"teacher{i}_{tower}"]
                if features == "cosine":
                    total += (1 - (z * y).sum(1) / jnp.linalg.norm(z, axis=1)).mean()
                else:
                    total += ((z - y) ** 2).sum(1).mean()
        return 3.0 * total / len(widths)

    got = jax.jit(jax.value_and_grad(value, (0, 1)))(student, maps)
    with jax.enable_x64(True):
        doubles = jax.tree.map(lambda x: x.astype(np.float64), (student, maps))
        gradients = jax.jit(jax.value_and_grad(exact, (0, 1)))(*doubles)
        want = jax.tree.map(np.asarray, gradients)
    assert_close(want, got)
    assert term.macs(TINY, 16, ()) == 3 * 16 * 16 * sum(widths) * 2


def test_a_fixed_scale_takes_the_place_of_the_models_own() -> None:
    student, teachers = problem()
    pairs = dict(zip(("teacher0_image", "teacher0_text"), teachers[0], strict=True))

    def loss(logit_scale: float | None, log_scale: Any) -> Any:
        term = DistillationConfig(teachers=(StoredTeacher(embed_dim=24),), logit_scale=logit_scale)
        outputs = {x: student[x] for x in ("image", "text")} | pairs
        return term.loss(context(outputs, {}, {"logit_scale": log_scale}))[0]

    @jax.jit
    def compute(seven: Any, thirty: Any) -> Any:
        return jax.value_and_grad(functools.partial(loss, 30.0))(seven), loss(None, thirty)

    (value, gradient), expected = compute(np.log(7.0), np.log(30.0))
    assert value == pytest.approx(float(expected), rel=1e-6)
    assert gradient == 0


OTHER = replace(BIG, text=replace(TINY.text, context_length=8))  # of other tokens


def test_teachers_share_inputs_that_are_equal() -> None:
    other = LiveTeacher(weights="runs/other", model=OTHER)
    term = replace(TERM, teachers=(LIVE, other, TERM.teachers[0], other))
    assert term.reads(SMALL) == {
        "stored_image": StoredInput("image", (8,)),
        "stored_text": StoredInput("text", (8,)),
        "stored_synthetic": StoredInput("synthetic", (8,)),
        "synthetic": TextInput(SMALL.text, synthetic=True),
        "teacher0_image": ImageInput(BIG.vision.image_spec),
        "teacher1_text": TextInput(OTHER.text),
        "teacher1_synthetic": TextInput(OTHER.text, synthetic=True),
    }
    assert list(replace(term, teachers=(other, other), captions="true").reads(SMALL)) == [
        "teacher0_image",
        "teacher0_text",
    ]
    assert {x.config.dtype for x in term.frozen().values()} == {"float32", "bfloat16"}
    assert {name: x.texts for name, x in term.frozen().items()} == {
        "teacher0": 2,
        "teacher1": 2,
        "teacher3": 2,
    }


def test_work_and_form_count_the_teachers() -> None:
    pairs = 16 * 16 * 2 * (3 * 16 + 8 + 24 + 12)
    assert TERM.macs(TINY, 16, ()) == pairs + 3 * 16 * 16 * 44 * 3
    assert TERM.macs(TINY, 16, ("image",)) == TERM.macs(TINY, 16, ()) - 16 * 16 * 2 * 16
    stored = tuple(StoredTeacher(embed_dim=768) for _ in range(2))
    term = DistillationConfig(teachers=stored, budget_mib=256)  # 64M float32s
    model = replace(TINY, embed_dim=512)
    for size, devices, form in (
        (8192, 1, "blocked"),
        (32768, 48, "dense"),
        (32768, 47, "blocked"),
        (32769, 8, "ring"),
    ):
        assert term.chosen_form(model, size, devices) == form


def test_terms_that_cannot_work_are_refused() -> None:
    def check(**options: Any) -> None:
        DistillationConfig(**options).check(TINY)

    biased = replace(TINY, init_logit_bias=-10.0)
    unknown, stored = LiveTeacher(weights="runs/l14"), StoredTeacher(embed_dim=8)
    for options, message in (
        ({}, "teachers is empty"),
        ({"teachers": (unknown,)}, "'runs/l14' is unknown: set LiveTeacher.model"),
        ({"teachers": (StoredTeacher(embed_dim=8),), "similarity": "sigmoid"}, "init_logit_bias"),
        ({"similarity_weight": -1.0}, "similarity_weight=-1.0"),
        ({"teachers": (stored,), "captions": "all"}, "captions=all needs a loss with several posi"),
        (
            {"teachers": (StoredTeacher(embed_dim=8),), "similarity_weight": 0.0},
            "similarity_weight and features_weight are both 0",
        ),
    ):
        with pytest.raises(InputError, match=message):
            check(**options)
    with pytest.raises(InputError, match="embed_dim=0"):
        StoredTeacher(embed_dim=0)
    features = {"similarity_weight": 0.0, "features_weight": 1.0}
    for teacher, more, works in (
        (LIVE, {}, False),
        (replace(LIVE, logit_bias=-5.0), {}, True),
        (stored, {}, False),  # its bias was taken as 0
        (replace(stored, logit_bias=-5.0), {}, True),
        (stored, features, True),
    ):
        for similarity in ("sigmoid", "soft_label_sigmoid"):
            term = DistillationConfig(teachers=(teacher,), similarity=similarity, **more)
            kind = type(teacher).__name__
            refused = pytest.raises(InputError, match=rf"set {kind}\.logit_bias")
            with contextlib.nullcontext() if works else refused:
                term.check(biased)
