"""Compile the training step for a pod that is not at hand, and read its memory and traffic.

The TPU compiler reads its environment once, when it is loaded, and cannot be loaded while a TPU is
in use. A process that has seen one platform's devices compiles for no other. So `compile_step`
starts a process of its own, `python -m clip_jax.pods.compile`.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax import parts, processes, sharding
from clip_jax.clock import CLOCK
from clip_jax.display import say
from clip_jax.errors import InputError
from clip_jax.losses.objective import needs_text, split_params, total
from clip_jax.models import attention
from clip_jax.models.clip import CLIP, CLIPConfig, path_name
from clip_jax.models.tower import parts_of
from clip_jax.pods import schedule
from clip_jax.pods.collectives import Collective, collectives
from clip_jax.pods.estimate import Reader, Shares
from clip_jax.pods.topology import Topology
from clip_jax.pods.work import Work, read
from clip_jax.serialize import from_dict, to_dict
from clip_jax.sharding import MeshConfig
from clip_jax.step import (
    Inputs,
    Program,
    Recipe,
    State,
    base_of,
    context,
    encode,
    shapes,
    train_step,
)
from clip_jax.storage import files
from clip_jax.storage.json_files import read_json

# Distributions that compile for TPUs and for GPUs.
TPU_COMPILER = ("libtpu",)
GPU_COMPILER = ("jax-cuda13-plugin", "nvidia-cudnn-cu13")
LIBRARIES = ("jax", "jaxlib", "flax", "optax", *TPU_COMPILER, *GPU_COMPILER)
# Autotuning needs a card, and Triton's matmuls need autotuning: both are off.
WITHOUT_A_CARD = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a compiled step depends on."""

    recipe: Recipe
    mesh: MeshConfig
    topology: Topology
    schedules: bool = True  # whether the TPU compiler writes them, for about twice its time


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the compiler reports about a step; sizes are bytes of one device."""

    mesh: tuple[int, int, int]  # data, fsdp, tensor
    form: str  # form of the loss; several terms are separated by commas
    versions: str
    compile_seconds: float
    parameters: int
    optimizer: int
    terms: int = 0  # the objective's own arrays: teachers, averages
    frozen: int = 0  # its part of the terms: parameters of frozen models
    batch: int
    loss: int  # peak of the loss alone, estimated
    token_embedding: int = 0  # its part of the parameters
    token_embedding_optimizer: int = 0  # its part of the optimizer's state
    attention: tuple[tuple[str, str], ...] = ()  # tower and backend
    is_estimate: bool = False  # of the traced step; nothing is compiled
    fits: bool  # the compiler accepts it; else there are no works and collectives
    peak_bytes: int
    works: tuple[Work, ...] = ()
    collectives: tuple[Collective, ...] = ()

    def calls(self) -> dict[str, int]:
        """Count the calls of kernels and libraries in a step, by name."""
        kernels: Counter[str] = Counter()
        for work in self.works:
            if work.target and work.flops != 0:
                kernels[work.target] += work.times
        return dict(kernels)


Compile = Callable[[Request], Facts]


def compiling(
    folder: Path | None = None, announce: Callable[[Request], object] = lambda _: None
) -> Compile:
    """Return a compile function with a cache on disk, per code, users' parts, compilers and flags.
    The folder is by default in the user's cache. `announce` is called before the compiler."""
    folder = folder or files.user_cache("plan")
    flags = [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
    program = " ".join([processes.code_version(), parts.version(), *installed(*LIBRARIES), *flags])

    def cached(request: Request) -> Facts:
        values = to_dict(request)
        key = hashlib.sha256(f"{json.dumps(values)} {program}".encode()).hexdigest()[:24]
        path = folder / f"{key}.json"
        if path.is_file():
            return from_dict(Facts, read_json(path, "facts", advice="Delete it.")["facts"])
        announce(request)
        say(f"compiling for {request.topology} (takes a few minutes) ...")
        facts = compile_step(request)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, json.dumps({"request": values, "facts": to_dict(facts)}))
        return facts

    return cached


def compile_step(request: Request) -> Facts:
    """Return the facts of a step, compiled in a process of its own: see `facts`. Raises InputError
    without the compiler, or for an invalid request."""
    names, extra = (TPU_COMPILER, "tpu") if request.topology.is_tpu else (GPU_COMPILER, "plan-gpu")
    if missing := [name for name in names if not installed(name)]:
        raise InputError(
            f"planning for {request.topology} needs the compiler {missing[0]}, which is not "
            f"installed (no device is needed): pip install 'clip-jax-pods[{extra}]'."
        )
    content = to_dict(request)
    quiet = {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryDirectory() as folder:
        flags = [os.environ.get("LIBTPU_INIT_ARGS", "")]
        flags += [schedule.dump(folder)] * request.schedules
        environment = (
            os.environ
            | quiet
            | {
                "JAX_PLATFORMS": "cpu",
                "TPU_SKIP_MDS_QUERY": "1",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                "LIBTPU_INIT_ARGS": " ".join(flags),
            }
        )
        command = [sys.executable, "-m", "clip_jax.pods.compile", folder, *parts.needed(content)]
        code, output, errors = _run(command, json.dumps(content), environment)
    if code:
        raise RuntimeError(f"compiling for {request.topology} failed:\n{errors[-4000:]}")
    result = json.loads(output.splitlines()[-1])
    if "error" in result:
        raise InputError(result["error"])
    return from_dict(Facts, result)


def _run(command: list[str], text: str, environment: dict[str, str]) -> tuple[int, str, str]:
    """Run a command; say each minute that it still runs. Return its exit code and its outputs."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            for minutes in itertools.count(1):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    # The input is passed once: after a timeout, communicate takes none.
                    output, errors = process.communicate(text if minutes == 1 else None, timeout=60)
                    break
                say(f"still compiling after {minutes} min ...")
        except BaseException:
            process.kill()
            raise
    return process.returncode, output, errors


def installed(*names: str) -> list[str]:
    """Return "name version" of each distribution that is installed."""
    versions = []
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return versions


def facts(request: Request, devices: list[jax.Device], folder: Path | None = None) -> Facts:
    """Compile the step, and read memory, collectives and work. The memory of the loss is estimated.

    If the step does not fit, the TPU compiler reports only the memory needed; the GPU compiler
    compiles it anyway. `folder` has the schedules that the compiler wrote.
    """
    recipe, topology, start = request.recipe, request.topology, CLOCK.now()
    mesh = sharding.make_mesh(request.mesh, devices)
    program = Program(recipe, mesh)
    frozen = [x.config for term in recipe.objective for x in term.frozen().values()]
    parts = parts_of(x for model in (recipe.model, *frozen) for x in model.towers.values())
    versions = installed("jax", *(TPU_COMPILER if topology.is_tpu else GPU_COMPILER))
    if topology.chip.compiled_as != topology.family:
        versions.append(f"compiled as {topology.compiled_as}")
    known = _known(request, mesh, devices[0], program.state, program.batch)
    try:
        options = WITHOUT_A_CARD if devices[0].platform in ("gpu", "cuda") else {}
        lowered = program.step.lower(program.state, program.batch)
        compiled = lowered.compile(compiler_options=options)
        text, units = compiled.as_text(), topology.chip.matrix_units
        schedules = schedule.read(folder, units) if folder and units else None
        measured = {
            "fits": True,
            "peak_bytes": peak(compiled),
            "works": tuple(read(text, schedules, parts)),
            "collectives": tuple(collectives(text, mesh.shape, topology.islands)),
        }
    except jax.errors.JaxRuntimeError as error:
        if (needed := needed_bytes(str(error), _arguments(known))) is None:
            raise
        measured = {"fits": False, "peak_bytes": needed}
    seconds = CLOCK.now() - start
    return Facts(versions=", ".join(versions), compile_seconds=seconds, **known, **measured)


def estimate(request: Request) -> Facts:
    """Estimate what `compile_step` reports, in seconds and without a compiler (see `estimate`).
    Collectives are left out."""
    recipe, topology, start = request.recipe, request.topology, CLOCK.now()
    device = topology.abstract_device
    mesh = sharding.abstract_mesh(request.mesh, topology.devices, device)
    state, batch = shapes(recipe, mesh)
    known = _known(request, mesh, device, state, batch)
    reader = _reader(request, mesh, state)
    step = jax.jit(functools.partial(train_step, recipe=recipe, mesh=mesh))
    return Facts(
        is_estimate=True,
        versions=", ".join(["estimate without the compiler", *installed("jax")]),
        fits=True,
        peak_bytes=_arguments(known) + reader.read(step.trace(state, batch), updates=True),
        works=tuple(reader.works),
        compile_seconds=CLOCK.now() - start,
        **known,
    )


def _known(
    request: Request, mesh: sharding.AnyMesh, device: Any, state: State, batch: Inputs
) -> dict[str, Any]:
    """Return the facts for which no compiler is needed."""
    recipe, shards = request.recipe, sharding.batch_shards(mesh)
    forms = [term.chosen_form(recipe.model, recipe.batch_size, shards) for term in recipe.objective]
    backends = attention_of(recipe.model, device, sharding.shards_of_heads(mesh))
    left_out = recipe.stored
    if not needs_text(recipe.objective, recipe.model):
        left_out = "text"
    reader = _reader(request, mesh, state)
    return {
        "mesh": tuple(mesh.shape.values()),
        "form": ", ".join(filter(None, forms)),
        "attention": tuple(x for x in backends if x[0] != left_out),
        "loss": reader.read(traced_loss(recipe, mesh, state, batch)),
        **held_bytes(state, batch),
    }


def _reader(request: Request, mesh: sharding.AnyMesh, state: State) -> Reader:
    """Return a reader of traced programs. Arrays of up to half the VMEM stay there."""
    rows, chip = request.recipe.batch_size // request.recipe.accumulation, request.topology.chip
    vmem = (chip.vmem_bytes or 0) * (chip.cores or 0) / chip.devices
    return Reader(Shares(state, rows, mesh), vmem / 2)


def _arguments(known: Mapping[str, Any]) -> int:
    """Return the bytes of a step's arguments on one device."""
    return sum(known[name] for name in ("parameters", "optimizer", "terms", "batch"))


def attention_of(model: CLIPConfig, device: Any, shards: int) -> tuple[tuple[str, str], ...]:
    """Return the backend of each tower's attention in training, whose heads are split over devices;
    convolutions have none."""
    backends = []
    for name, tower in (("image", model.vision), ("text", model.text)):
        if tower.attention_tokens is None:
            continue
        backend = model.attention
        if backend == "auto":
            size = (tower.attention_tokens, tower.num_heads // shards, tower.head_width)
            backend = attention.choose(device, *size, model.dtype)
        backends.append((name, backend))
    return tuple(backends)


def needed_bytes(message: str, held: int) -> int | None:
    """Read from the compiler's error how many bytes a step needs; None: another kind of error.

    `held` are the bytes of state and batch, which the compiler's earliest check does not include.
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    total = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    rest = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message)
    size = total or rest
    return size and int(float(size[1]) * units[size[2]]) + (0 if total else held)


def held_bytes(state: Any, batch: Any) -> dict[str, Any]:
    """Add up the bytes of state and batch on one device (arrays, or shapes with shardings)."""

    def size(tree: Any, of: str = "") -> int:
        sizes = (
            math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
            if of in path_name(path)
        )
        return sum(sizes)

    rest = (state.step, state.opt_state)
    return {
        "parameters": size(state.params),
        "optimizer": size(rest),
        "terms": size([state.carried, state.frozen]),
        "frozen": size(state.frozen),
        "batch": size(batch),
        "token_embedding": size(state.params, "token_embedding"),
        "token_embedding_optimizer": size(rest, "token_embedding"),
    }


def traced_loss(recipe: Recipe, mesh: sharding.AnyMesh, state: State, batch: Inputs) -> Any:
    """Trace value and gradients of the objective alone, as a function of the parameters that it
    takes, the towers' outputs, the inputs and the state of the terms."""
    objective, model, rows = recipe.objective, CLIP(recipe.model), sharding.batch_sharding(mesh)
    inputs = {name: x for name, x in batch.items() if name != "learning_rate"}
    _, taken = split_params(objective, model.config, base_of(state) | state.params)
    carried = State(None, None, None, state.carried, state.frozen)

    def encoded(state: State, inputs: Any) -> Any:
        params = recipe.complete(state, state.params)
        x = context(model, mesh, state, params, inputs, {})
        return encode(x, objective, stored=recipe.stored)[0]

    outputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows),
        jax.eval_shape(encoded, state, inputs),
    )

    def value(taken: Any, outputs: Any, inputs: Any, carried: State) -> Any:
        return total(objective, context(model, mesh, carried, taken, inputs, outputs))

    gradient = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
    shardings = jax.tree.map(lambda x: x.sharding, (taken, outputs))
    compiled = jax.jit(gradient, out_shardings=(sharding.replicated(mesh), shardings))
    return compiled.trace(taken, outputs, inputs, carried)


def peak(compiled: Any) -> int:
    """Return the peak memory of one device in bytes, arguments included."""
    return compiled.memory_analysis().peak_memory_in_bytes


def _devices(topology: Topology) -> list[jax.Device]:
    from jax.experimental import topologies

    if not topology.is_tpu:
        nodes = topology.islands
        shape = f"1x{nodes}x{topology.devices // nodes}"
        return topologies.get_topology_desc(
            platform="cuda", target_config=topology.card, topology=shape
        ).devices
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.dims in ((1, 1), (1, 1, 1)):  # libtpu knows hosts of four chips else
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.chip.libtpu_config:
        options["chip_config_name"] = topology.chip.libtpu_config
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.compiled_as, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"libtpu has no --topology {topology}: {error}") from error


def main() -> None:
    """Read a request from standard input and write the facts to standard output.

    The arguments are a folder for schedules, and the modules of users' parts.
    """
    try:
        for module in sys.argv[2:]:
            parts.load(module)
        request = from_dict(Request, json.load(sys.stdin))
        result = to_dict(facts(request, _devices(request.topology), Path(sys.argv[1])))
    except InputError as error:
        result = {"error": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
