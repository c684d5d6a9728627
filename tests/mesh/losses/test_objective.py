"""Terms of the objective as users define them: with a frozen teacher, with a state of its own, and
with further inputs. Meshes, accumulation, checkpoints and `plan` support them without changes."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clip_jax import flops
from clip_jax.checkpoints.manager import CheckpointConfig, Checkpoints
from clip_jax.losses import Context, Frozen, Parameter, SoftmaxConfig, Term
from clip_jax.models.clip import CLIPConfig, l2_normalize
from clip_jax.models.inputs import StoredInput, TextInput
from clip_jax.pods import compile as pod
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe
from tests.conftest import MESHES, OPTIM, TINY, assert_close, batch, parameters

TEACHER = replace(TINY, embed_dim=24, vision=replace(TINY.vision, width=16, depth=1))
SCALE = 20.0


def cross_entropy(targets: jax.Array, logits: jax.Array) -> jax.Array:
    return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()


@dataclass(frozen=True, kw_only=True)
class TeacherTerm(Term):
    """Distillation of a frozen model's similarities (MobileCLIP)."""

    name: ClassVar[str] = "teacher"

    def frozen(self):
        return {"model": Frozen(TEACHER, "runs/teacher")}

    def encode(self, x: Context):
        model, params = replace(x.model, config=TEACHER), x.frozen["model"]
        images, texts = model.normalize(x.inputs["image"]), x.inputs["text"]
        embeddings = {
            "image": model.encode_image(params, images),
            "text": model.encode_text(params, texts),
        }
        return {f"of_{name}": l2_normalize(y) for name, y in embeddings.items()}

    def loss(self, x: Context):
        y = x.outputs
        targets = jax.nn.softmax(SCALE * y["of_image"] @ y["of_text"].T)
        logits = jnp.exp(x.params["logit_scale"]) * y["image"] @ y["text"].T
        return cross_entropy(targets, logits), {}

    def macs(self, model: CLIPConfig, batch_size: int, locked: Sequence[str]):
        return batch_size**2 * (TEACHER.embed_dim + 3 * model.embed_dim)


@dataclass(frozen=True, kw_only=True)
class AverageTerm(Term):
    """Distillation of a moving average of the image tower, with a running centre (DINO)."""

    name: ClassVar[str] = "average"
    needs: ClassVar[tuple[str, ...]] = ("image_tokens:-1",)

    def init(self, params):
        shape = params["visual"]["proj"].shape[-1]
        return {"visual": jax.tree.map(jnp.copy, params["visual"]), "centre": jnp.zeros(shape)}

    def encode(self, x: Context):
        slow = x.params | {"visual": x.carried["visual"]}
        target = x.model.encode_image(slow, x.model.normalize(x.inputs["image"]))
        states = x.outputs["image_tokens:-1"].mean(1) @ x.params["visual"]["proj"]
        probabilities = jax.nn.softmax(SCALE * (l2_normalize(target) - x.carried["centre"]))
        rows = -(probabilities * jax.nn.log_softmax(l2_normalize(states))).sum(-1)
        return {"rows": rows, "target": l2_normalize(target)}

    def loss(self, x: Context):
        return x.outputs["rows"].mean(), {"centre_norm": jnp.linalg.norm(x.carried["centre"])}

    def update(self, x: Context):
        def mix(slow, new):
            return 0.9 * slow + 0.1 * new

        visual = jax.tree.map(mix, x.carried["visual"], x.params["visual"])
        return {"visual": visual, "centre": mix(x.carried["centre"], x.outputs["target"].mean(0))}


@dataclass(frozen=True, kw_only=True)
class StoredTerm(Term):
    """Regression of stored vectors, by mapped image embeddings and by the embeddings of synthetic
    captions."""

    name: ClassVar[str] = "stored"
    needs: ClassVar[tuple[str, ...]] = ("text:synthetic",)

    def reads(self, model: CLIPConfig):
        return {
            "vectors": StoredInput("image", (model.embed_dim,)),
            "synthetic": TextInput(model.text, synthetic=True),
        }

    def parameters(self, model: CLIPConfig):
        return {"map": Parameter((model.embed_dim, model.embed_dim), "E -")}

    def encode(self, x: Context):
        return {"mapped": x.outputs["image"] @ x.params[self.name]["map"]}

    def loss(self, x: Context):
        both = x.outputs["mapped"] + x.outputs["text:synthetic"]
        return 1 - (both * x.inputs["vectors"]).sum(-1).mean(), {}


TERMS = (TeacherTerm(weight=0.5), AverageTerm(weight=0.3), StoredTerm(weight=2.0))


def inputs() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    pairs = batch(TINY)
    vectors = rng.standard_normal((16, TINY.embed_dim), np.float32)
    return pairs | {
        "vectors": vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        "synthetic": np.roll(pairs["text"], 1, axis=0),
    }


def program(terms: Sequence[Term], mesh: str = "1", accumulation: int = 1) -> Program:
    """Return a program that skips updates with an unusual gradient norm."""
    sizes, count = {"1": (MeshConfig(), 1)}.get(mesh) or (MESHES[mesh], 8)
    recipe = Recipe(
        model=TINY,
        objective=cast(Any, (SoftmaxConfig(), *terms)),
        optim=replace(OPTIM, skip_norm_ratio=10.0),
        steps=10,
        batch_size=16,
        accumulation=accumulation,
    )
    return Program(recipe, make_mesh(sizes, jax.devices()[:count]))


@functools.cache
def on_one_device() -> Program:
    return program(TERMS)


@functools.cache
def accumulated_on_a_mesh() -> Program:
    return program(TERMS, "2x2x2", accumulation=2)


def begin(run: Program) -> Any:
    return run.init(parameters(TINY), {"teacher": {"model": parameters(TEACHER)}})


def steps(run: Program, state: Any, count: int) -> tuple[Any, dict[str, Any]]:
    metrics = {}
    for _ in range(count):
        state, metrics = run.step(state, run.put(inputs()))
    return state, jax.device_get(metrics)


def test_terms_are_the_same_on_a_mesh_and_accumulated() -> None:
    run = on_one_device()
    (expected, metrics), run = jax.device_get(steps(run, begin(run), 2)), accumulated_on_a_mesh()
    state, got = steps(run, begin(run), 2)
    assert_close(metrics, got)
    assert_close(*(optax.tree.get(x.opt_state, "mu") for x in (expected, state)))
    assert_close(expected.carried, state.carried)
    jax.tree.map(np.testing.assert_array_equal, state.frozen, begin(run).frozen)
    weights = {"contrastive": 1, "teacher": 0.5, "average": 0.3, "stored": 2}
    total = sum(weight * got[f"{name}_loss"] for name, weight in weights.items())
    assert got["loss"] == pytest.approx(total, rel=1e-6)
    assert got["centre_norm"] > 0
    placed = jax.tree.map(lambda x: x.sharding, run.state)
    assert placed.carried["average"]["visual"] == placed.params["visual"]


def test_terms_are_saved_and_resumed_bit_for_bit_without_their_teacher(tmp_path) -> None:
    run = accumulated_on_a_mesh()
    state, _ = steps(run, begin(run), 1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    checkpoints.save(1, state.saved(), {"samples": 16})
    checkpoints.wait()
    expected = jax.device_get(steps(run, state, 1))  # donates the state's memory
    restored = checkpoints.restore(run.state.saved())
    checkpoints.close()
    resumed = run.resume(restored.state, begin(run).frozen)
    jax.tree.map(np.testing.assert_array_equal, expected, jax.device_get(steps(run, resumed, 1)))
    assert restored.state.keys() == {"step", "params", "opt_state", "carried"}
    assert restored.state["carried"].keys() == {"average"}


def test_a_skipped_update_leaves_what_terms_carry_as_it_was() -> None:
    run = on_one_device()
    begun = begin(run)
    before = jax.device_get(begun.carried)
    unusable = inputs() | {"vectors": np.full((16, TINY.embed_dim), np.nan, np.float32)}
    state, metrics = run.step(begun, run.put(unusable))
    assert metrics["skipped_updates"] == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.carried))
    state, metrics = run.step(state, run.put(inputs()))
    assert metrics["skipped_updates"] == 1
    assert (state.carried["average"]["centre"] != before["average"]["centre"]).any()


@functools.cache
def counted(*terms: Term) -> tuple[dict[str, int], int]:
    """Return the bytes that a step with these terms holds in memory, and its FLOPs."""
    run = program(terms)
    return pod.held_bytes(run.state, run.batch), flops.of_step(run.recipe).total


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_plan_counts_each_terms_memory_and_flops(term: Term) -> None:
    def size(config: CLIPConfig, part: Any = lambda params: params) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(part(parameters(config))))

    (held, work), (without, least) = counted(term), counted()
    sizes = {
        "teacher": size(TEACHER),
        "average": size(TINY, lambda params: params["visual"]) + 4 * TINY.embed_dim,
        "stored": 16 * 4 * (TINY.embed_dim + TINY.text.context_length),
    }
    entry = "batch" if term.name == "stored" else "terms"
    arrays = sum(4 * math.prod(x.shape) for x in term.parameters(TINY).values())
    more = {entry: sizes[term.name], "parameters": arrays, "optimizer": 2 * arrays}
    more["frozen"] = sizes["teacher"] * (term.name == "teacher")
    assert held == without | {name: without[name] + size for name, size in more.items()}
    encoded = {
        "teacher": flops.forward(TEACHER).total,
        "stored": 3 * flops.forward(TINY).text,  # the synthetic captions, forward and backward
    }
    assert work - least == 2 * term.macs(TINY, 16, ()) + 16 * encoded.get(term.name, 0)


def test_plan_traces_the_loss_of_all_terms() -> None:
    program = on_one_device()
    traced = pod.traced_loss(program.recipe, program.mesh, program.state, program.batch)
    ((_, outputs, _, _), _) = traced.args_info
    assert pod.peak(traced.lower().compile()) > 0
    kinds = {"teacher/of_image", "teacher/of_text", "average/rows", "stored/mapped"}
    assert outputs.keys() > {"image", "text"} | kinds
