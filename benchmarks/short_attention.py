"""Check the kernel for short attention: its accuracy, and that the TPU compiler accepts it.

    export PYTHONPATH=.
    python benchmarks/short_attention.py exact
    python benchmarks/short_attention.py short|xla TOPOLOGY [LENGTH,HEADS,DIM,CAUSAL ...]
    python benchmarks/short_attention.py cycles TOPOLOGY [LENGTH,HEADS,DIM,CAUSAL ...]
    python benchmarks/short_attention.py step [ARCHITECTURE ...]
    python benchmarks/short_attention.py layers TOPOLOGY BACKEND,LENGTH,HEADS,DIM ...

- exact: Run the kernel in interpret mode for all shapes of published models up to 1,024 tokens.
  Print the errors of output and gradient against float64 (largest, root mean square), and their
  ratios to the errors of XLA's attention.
- short, xla: Compile value and gradient of one attention, by default for the shapes of all configs.
  Print for each the number of kernels, and the precision of each product of an [L, L] matrix in
  float32.
- cycles: Compile value and gradient for 128 rows, by default of the towers of ViT-L/14 and B/16.
  Print the cycles of the forward and the backward kernel by their schedules, and both in ms.
- step: Compile a training step with one layer in each tower. Print the cycles of the kernels.
- layers: Compile value and gradient of two layers (projections and attention, recomputed) for 32
  rows with lengths. Print HBM traffic in GB, the sequential bound and the schedule estimate in ms.

No TPU is needed. All but `exact` need the extra `tpu`.
"""

import argparse
import dataclasses
import os
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from clip_jax.config_files import load_config
from clip_jax.losses import SoftmaxConfig
from clip_jax.models import attention, zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.short_attention import MAX_LENGTH, short, vmem_bytes
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig
from clip_jax.pods import compile as pod
from clip_jax.pods import schedule
from clip_jax.pods.bounds import bounds, step_seconds
from clip_jax.pods.topology import Topology
from clip_jax.pods.work import KERNEL, read
from clip_jax.sharding import MeshConfig
from clip_jax.step import Recipe
from tests.models.exact_attention import errors, interpreted, xla_of_tpu

ROOT = Path(__file__).parent.parent
ROWS = 16
DUMPED = tempfile.TemporaryDirectory()  # schedules of kernels
# These have heads of 72, 80, 88 and 104 channels.
IN_A_STEP = ("ViT-SO400M-14-SigLIP", "ViT-H-14", "ViT-g-14", "ViT-bigG-14")


def towers(config: CLIPConfig) -> set[tuple[int, int, int, bool]]:
    """Return the length, heads, head size and causality of attention in both towers."""
    text, vision = config.text, config.vision
    shapes = {(text.context_length, text.num_heads, text.width // text.num_heads, text.causal)}
    if isinstance(vision, ViTConfig):
        size = vision.width // vision.num_heads
        shapes.add((vision.num_patches + vision.extra_tokens, vision.num_heads, size, False))
    return {shape for shape in shapes if shape[0] <= MAX_LENGTH}


def exact() -> None:
    of_zoo = set().union(*(towers(config) for config in zoo.ARCHITECTURES.values()))
    for length, dim, causal in sorted({(shape[0], *shape[2:]) for shape in of_zoo}):
        for dtype, xla in ((jnp.float32, attention.xla), (jnp.bfloat16, xla_of_tpu)):
            case = length, 2, dim, causal, None, dtype
            ours, theirs = (
                [y for part in errors(x, *case) for y in part] for x in (interpreted, xla)
            )
            numbers = [f"{x:.2e}" for x in ours]
            numbers += [f"{a / b:.3f}" for a, b in zip(ours, theirs, strict=True)]
            print(length, dim, causal, dtype.dtype, *numbers, flush=True)


def shapes_of_the_configs(topology: str) -> list[str]:
    room = Topology.parse(topology).chip.vmem_bytes
    files = [
        path for path in (ROOT / "configs").glob("*.py") if "def get_config" in path.read_text()
    ]
    shapes = set().union(*(towers(load_config(path).model) for path in files))
    fitting = sorted(shape for shape in shapes if vmem_bytes(*shape[:3]) <= room)
    return [",".join(map(str, map(int, shape))) for shape in fitting]


def products_of_scores(text: str, length: int) -> list[str]:
    """Return the precision of each convolution with a float32 operand of shape [.., L, L]."""
    of_name = dict(re.findall(r"^\s*(?:ROOT )?(%\S+) = (\w+\[[\d,]*\])", text, re.MULTILINE))
    precisions = []
    for line in text.splitlines():
        if product := re.search(r" convolution\(([^)]*)\)", line):
            types = [of_name.get(name, "") for name in product[1].split(", ")]
            if any(x.startswith("f32") and x.endswith(f",{length},{length}]") for x in types):
                precision = re.search(r"operand_precision={([^}]*)}", line)
                precisions.append(precision[1] if precision else "default")
    return precisions


def compiled(backend: str, topology: str, *shapes: str) -> None:
    device = pod._devices(Topology.parse(topology))[0]
    single = SingleDeviceSharding(device)
    for shape in shapes or shapes_of_the_configs(topology):
        length, heads, dim, causal = map(int, shape.split(","))

        def attend(qkv, heads=heads, causal=bool(causal)):
            if backend == "xla":
                return attention.xla(qkv, heads, causal)
            room = attention.vmem(device)
            return short(qkv, None, heads, causal, lambda kernel, _: kernel, False, room)

        def total(qkv, weight, attend=attend):
            return (attend(qkv).astype(jnp.float32) * weight).sum()

        sizes = ((ROWS, length, n * heads * dim) for n in (3, 1))
        qkv, weight = (jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=single) for x in sizes)
        text = jax.jit(jax.value_and_grad(total)).lower(qkv, weight).compile().as_text()
        kernels = text.count('custom_call_target="tpu_custom_call"')
        print(shape, kernels, *products_of_scores(text, length), flush=True)


def cycles(topology: str, *shapes: str) -> None:
    where, folder = Topology.parse(topology), Path(DUMPED.name)
    device = pod._devices(where)[0]
    single, room = SingleDeviceSharding(device), attention.vmem(device)
    for shape in shapes or ("257,16,64,0", "197,12,64,0", "77,12,64,1"):
        length, heads, dim, causal = map(int, shape.split(","))

        def both(qkv, weight, heads=heads, causal=bool(causal)):
            options = None, heads, causal, lambda kernel, _: kernel, False, room
            out, back = jax.vjp(lambda qkv: short(qkv, *options), qkv)
            return out, back(weight)

        sizes = ((8 * ROWS, length, n * heads * dim) for n in (3, 1))
        jax.jit(both).lower(
            *(jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=single) for x in sizes)
        ).compile()
        read = schedule.read(folder, where.chip.matrix_units)
        counts = [
            sum(x.cycles for name, x in read.items() if f"attention_{part}" in name)
            for part in ("forward", "backward")
        ]
        times = [f"{1e3 * x / where.chip.clock:.3f}" for x in counts]
        print(shape, *counts, *times, flush=True)
        for path in folder.iterdir():
            path.unlink()


def step(*names: str) -> None:
    """Compile steps of full width and length; print the cycles of the kernels' schedules."""
    for name in names or IN_A_STEP:
        model = zoo.get(name)
        model = dataclasses.replace(
            model,
            remat="attention",
            attention="short",
            vision=dataclasses.replace(model.vision, depth=1),
            text=dataclasses.replace(model.text, depth=1, vocab_size=1024),
        )
        recipe = Recipe(
            model=model,
            objective=(SoftmaxConfig(),),
            optim=OptimConfig(),
            steps=10_000,
            batch_size=64,
        )
        where = Topology.parse("v5e:2x2")
        request = pod.Request(recipe=recipe, mesh=MeshConfig(fsdp=2), topology=where)
        works = pod.compile_step(request).works
        print(name, *(x.cycles for x in works if x.target == KERNEL), flush=True)


def layers(topology: str, *shapes: str) -> None:
    where, rows = Topology.parse(topology), 2 * ROWS
    single = SingleDeviceSharding(pod._devices(where)[0])
    for shape in shapes:
        backend, *sizes = shape.split(",")
        length, heads, dim = map(int, sizes)
        attend = {"xla": attention.xla, "splash": attention.splash}.get(
            backend,
            lambda qkv, heads, causal, lengths: short(
                qkv, lengths, heads, causal, lambda kernel, _: kernel, False
            ),
        )

        @jax.checkpoint
        def layer(x, kernels, lengths, attend=attend, heads=heads):
            y = attend(jnp.einsum("BLD,DE->BLE", x, kernels[0]), heads, False, lengths)
            return x + jnp.einsum("BLD,DE->BLE", y, kernels[1])

        def total(x, kernels, weight, lengths, layer=layer):
            y, _ = jax.lax.scan(lambda x, own: (layer(x, own, lengths), None), x, kernels)
            return (y.astype(jnp.float32) * weight).sum()

        def array(*dims, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(dims, dtype, sharding=single)

        x, width = array(rows, length, heads * dim), heads * dim
        kernels = array(2, width, 3 * width), array(2, width, width)
        folder = Path(DUMPED.name)
        function = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
        text = function.lower(x, kernels, x, array(rows, dtype=jnp.int32)).compile().as_text()
        works = read(text, schedule.read(folder, where.chip.matrix_units))
        seconds = step_seconds(bounds(where.chip.device, works, ()))
        times = (seconds[name] for name in ("sequential_bound", "schedule_estimate"))
        gigabytes = sum(x.times * x.bytes for x in works) / 1e9
        print(shape, f"{gigabytes:.1f}", *(x and f"{1e3 * x:.1f}" for x in times), flush=True)
        for path in folder.iterdir():
            path.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=("exact", "short", "xla", "cycles", "step", "layers"), help="see above"
    )
    parser.add_argument("rest", nargs="*", help="topology and shapes, or architectures")
    args = parser.parse_args()
    what, rest = args.what, args.rest
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if what in ("layers", "cycles"):
        os.environ["LIBTPU_INIT_ARGS"] = schedule.dump(DUMPED.name)
    jax.config.update("jax_platforms", "cpu")
    {"exact": exact, "cycles": cycles, "step": step, "layers": layers}.get(
        what, lambda *args: compiled(what, *args)
    )(*rest)
