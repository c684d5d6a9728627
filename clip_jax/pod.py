"""Compile the training step for a pod that isn't there, and read off what it holds and moves.

The TPU compiler reads its environment once, when it is loaded, and a TPU that is in use can't be
loaded twice: so `compile_step` starts `python -m clip_jax.pod`, which does it in its own process.
"""

import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from clip_jax import sharding
from clip_jax.losses import SigmoidConfig, SoftmaxConfig, choose_form, contrastive_loss
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.serialize import from_dict, to_dict
from clip_jax.optim import OptimConfig, make_optimizer
from clip_jax.scaling import chips, hlo
from clip_jax.sharding import MeshConfig
from clip_jax.step import init_state, jit_step, state_shardings

INSTALL = "pip install 'clip-jax-pods[tpu]' (or: pip install 'jax[tpu]')"
# JAX's name of a family -> the chip's name in the table.
TPUS = {
    "v3": "TPU v3", "v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e",
    "tpu7x": "TPU v7x",
}  # fmt: skip
STEPS = 1_000_000  # of the schedule: any number compiles to the same program
Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a compiled step depends on."""

    topology: str  # v5e:16x16
    slices: int = 1
    batch_size: int
    accumulation: int = 1
    model: CLIPConfig
    loss: SoftmaxConfig | SigmoidConfig
    optim: OptimConfig
    mesh: MeshConfig


def chip_of(topology: str) -> chips.Chip:
    """Find the chip of `v5e:16x16` or `H100:64`. ValueError says what there is."""
    family, _, size = topology.partition(":")
    if family in TPUS and re.fullmatch(r"\d+x\d+(x\d+)?", size):
        return chips.chips()[TPUS[family]]
    names = [name for name in chips.chips() if not name.startswith("TPU")]
    found = [name for name in names if name.lower().startswith(family.lower())]
    if family and found and size.isdigit() and int(size):
        return chips.chips()[found[0]]
    raise ValueError(
        f"topology {topology!r} is none that can be planned; give a TPU slice such as v5e:16x16 or "
        f"v5p:4x4x8 (families {', '.join(TPUS)}) or GPUs such as H100:64 ({', '.join(names)})."
    )


def is_tpu(topology: str) -> bool:
    """Whether a topology can be compiled for; GPUs are reckoned by formula."""
    return topology.partition(":")[0] in TPUS


def count_devices(topology: str, slices: int = 1) -> int:
    """Count JAX devices."""
    chip = chip_of(topology)
    return math.prod(int(x) for x in topology.partition(":")[2].split("x")) * slices * chip.devices


def compile_step(request: Request) -> Facts:
    """Compile in a process of its own. ValueError for what can't be compiled; see `facts`."""
    chip_of(request.topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"planning for {request.topology} needs the TPU compiler, libtpu, which is not "
            f"installed (no TPU is needed): {INSTALL}."
        )
    quiet = {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment = os.environ | quiet | {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "clip_jax.pod"],
        input=json.dumps(to_dict(request)), capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"compiling for {request.topology} failed:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    if "error" in result:
        raise ValueError(result["error"])
    return result


def facts(request: Request, devices: list[jax.Device]) -> Facts:
    """Compile the step and the loss alone, and read off memory, collectives and HBM traffic.

    `peak_bytes` is of one device. Where the step does not fit, the compiler says only what it
    needs: `fits` is False and there are no collectives.
    """
    mesh = sharding.make_mesh(request.mesh, devices)
    state, batch = shapes(request, mesh)
    model, shardings = CLIP(request.model), jax.tree.map(lambda x: x.sharding, state)
    step: Any = jit_step(
        model, request.optim, STEPS, request.loss, mesh, shardings,
        accumulation=request.accumulation,
    )  # fmt: skip
    start = time.perf_counter()
    held = parts(state, batch)
    result: Facts = {
        "mesh": dict(mesh.shape),
        "form": loss_form(request, mesh),
        "versions": f"jax {jax.__version__}",
        **held,
        "loss": peak(compile_loss(request, mesh)),
    }
    try:
        compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if (needed := needed_bytes(str(error), sum(held.values()))) is None:
            raise
        return result | {
            "fits": False,
            "peak_bytes": needed,
            "compile_seconds": time.perf_counter() - start,
        }
    text = compiled.as_text()
    found = hlo.collectives(text, mesh.shape, request.slices)
    return result | {
        "fits": True,
        "peak_bytes": peak(compiled),
        "hbm_traffic": hlo.hbm_bytes(text),
        "collectives": [collective(x) for x in found],
        "compile_seconds": time.perf_counter() - start,
    }


def needed_bytes(message: str, held: int) -> int | None:
    """Read from the compiler's complaint what a step would take; None: it complains of another.

    `held` is what lies on a device anyway: the earliest complaint speaks of the rest alone.
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    whole = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    rest = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message)
    found = whole or rest
    return found and int(float(found[1]) * units[found[2]]) + (0 if whole else held)


def shapes(request: Request, mesh: Mesh | AbstractMesh) -> tuple[Any, Any]:
    """Return state and batch as shapes that know where they lie."""
    model, optimizer = CLIP(request.model), make_optimizer(request.optim, STEPS)
    state = jax.eval_shape(functools.partial(init_state, jax.random.key(0), model, optimizer))
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    state = jax.tree.map(place, state, state_shardings(model, optimizer, mesh))
    size, rows = request.model.vision.image_size, sharding.batch_sharding(mesh)
    image, text = (request.batch_size, size, size, 3), request.model.text.context_length
    return state, {
        "image": jax.ShapeDtypeStruct(image, jnp.uint8, sharding=rows),
        "text": jax.ShapeDtypeStruct((request.batch_size, text), jnp.int32, sharding=rows),
    }


def parts(state: Any, batch: Any) -> dict[str, int]:
    """Add up what one device holds of state and batch (arrays, or shapes with shardings)."""

    def held(tree: Any) -> int:
        sizes = (
            math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
            for x in jax.tree.leaves(tree)
        )
        return sum(sizes)

    rest = [getattr(state, name) for name in vars(state) if name != "params"]
    return {"parameters": held(state.params), "optimizer": held(rest), "batch": held(batch)}


def loss_form(request: Request, mesh: Mesh | AbstractMesh) -> str:
    """Return the form of the loss that the step takes."""
    shards = sharding.batch_shards(mesh)
    return choose_form(request.loss, request.batch_size, request.model.embed_dim, shards)


def compile_loss(request: Request, mesh: Mesh) -> Any:
    """Compile value and gradient of the loss alone, from features that lie as in the step."""
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    features = (request.batch_size, request.model.embed_dim)
    wide = jax.ShapeDtypeStruct(features, jnp.float32, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    ids = jax.ShapeDtypeStruct((request.batch_size,), jnp.int32, sharding=rows)

    def value(image: Any, text: Any, scale: Any, bias: Any, caption_ids: Any) -> Any:
        return contrastive_loss(
            request.loss, image, text, scale, bias,
            caption_ids=caption_ids, mesh=mesh, axes=sharding.BATCH_AXES,
        )  # fmt: skip

    gradient = jax.value_and_grad(value, argnums=(0, 1, 2, 3), has_aux=True)
    placed = (whole, (rows, rows, whole, whole))
    compiled = jax.jit(gradient, out_shardings=placed)
    return compiled.lower(wide, wide, scalar, scalar, ids).compile()


def peak(compiled: Any) -> int:
    """Bytes of one device at the worst moment, arguments included."""
    return compiled.memory_analysis().peak_memory_in_bytes


def collective(x: hlo.Collective) -> Facts:
    """Write a collective as JSON, with the part of the step that it belongs to."""
    direction = "backward" if "transpose(" in x.source else "forward"
    if "/visual" in x.source:
        part = f"image tower, {direction}"
    elif "/text" in x.source:
        part = f"text tower, {direction}"
    elif "jvp(" in x.source:
        part = f"loss, {direction}"
    else:
        part = "update" if x.source else "unnamed"  # by the compiler
    return {
        "kind": x.kind,
        "axes": list(x.axes),
        "part": part,
        "times": x.times,
        "bytes": x.bytes,
        "received": x.received,
        "received_from_slices": x.received_from_slices,
    }


def estimate(request: Request) -> Facts:
    """Reckon by formula where nothing can be compiled (GPUs); state and batch are exact.

    Activations are what each policy saves of a block, in bf16, in units of the width per token
    (Korthikanti et al. 2022, without dropout); gradients are summed in bf16.
    """
    devices = count_devices(request.topology, request.slices)
    names = ("data", "fsdp", "tensor")
    sizes = sharding.mesh_sizes(request.mesh, devices)
    mesh = AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * 3)
    held = parts(*shapes(request, mesh))
    rows = request.batch_size // sharding.batch_shards(mesh)
    model = request.model
    saved = {"none": 32, "dots": 20, "attention": 10, "full": 2}[model.remat]
    towers: list[tuple[int, Any]] = [(model.text.context_length, model.text)]
    if hasattr(model.vision, "num_tokens") and hasattr(model.vision, "depth"):
        towers.append((model.vision.num_tokens, model.vision))
    activations = 0
    for tokens, tower in towers:
        scores = 6 * tower.num_heads * tokens if model.remat == "none" else 0  # logits, weights
        per_token = saved * tower.width + scores
        activations += rows // request.accumulation * tokens * tower.depth * per_token
    form = loss_form(request, mesh)
    features = 2 * request.batch_size * model.embed_dim * 4
    logits = rows * request.batch_size * 4 if form == "dense" else 0
    weights = held["parameters"] // 2 * mesh.shape["fsdp"]  # bf16
    moved = {
        "all-gather": (["fsdp"], 2 * weights if mesh.shape["fsdp"] > 1 else 0),
        "all-reduce": (["data", "fsdp"], 2 * weights),
        "all-gather features": (["data", "fsdp"], features),
    }
    total = sum(held.values()) + activations + features + logits
    chip = chip_of(request.topology)
    return {
        "mesh": dict(mesh.shape), "form": form, "versions": "by formula", **held,
        "loss": features + logits, "peak_bytes": total, "compile_seconds": 0.0,
        "fits": total < chip.hbm_bytes / chip.devices, "hbm_traffic": None,
        "collectives": [
            {"kind": kind.split()[0], "axes": axes, "part": "by formula", "times": 1,
             "bytes": size, "received": size, "received_from_slices": 0}
            for kind, (axes, size) in moved.items() if size and devices > 1
        ],
    }  # fmt: skip


def main() -> None:
    """Read a request from standard input, write the facts to standard output."""
    from jax.experimental import topologies

    request = from_dict(Request, json.load(sys.stdin))
    options: dict[str, Any] = {"num_slices": request.slices} if request.slices > 1 else {}
    if request.topology.startswith("v4"):  # one JAX device a chip, as on the real ones
        options["chip_config_name"] = "megacore"
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=request.topology, **options
        )
    except jax.errors.JaxRuntimeError as error:
        message = f"topology {request.topology} is none that libtpu knows: {error}"
        print(json.dumps({"error": message}))
        return
    try:
        result = facts(request, topology.devices)
    except ValueError as error:
        result = {"error": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
