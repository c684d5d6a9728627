"""Compile training steps for many kinds of TPUs and GPUs, and check the results.

    python benchmarks/compile.py [tpu] [gpu] [cudnn] [tables]

- tpu: a small step for v4 to tpu7x; the gradients are summed over the data axis.
- gpu: a small step for A100 to B200; only steps on several nodes use the network.
- cudnn: attention over 197 and 257 patches and over 77 tokens is cuDNN's.
- tables: large token embedding tables are never gathered.

`tpu` and `tables` need the extra `tpu`; `gpu` and `cudnn` need `plan-gpu`. The checks take minutes
and end with an assertion error where a step does not compile as it should. No device is needed.
The quick checks are in tests/programs/test_tpu_plan.py.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from clip_jax.config_files import load_config
from clip_jax.losses import SoftmaxConfig
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig
from clip_jax.pods.compile import Request, compile_step
from clip_jax.pods.topology import Topology
from clip_jax.sharding import MeshConfig
from clip_jax.step import Recipe

ROOT = Path(__file__).parents[1]
TABLES = [  # 256,000 tokens of 768, and 901,629 of 1,024, at a batch of 32,768
    ("siglip2_b16", "ViT-B-16-SigLIP2-256", "v5e:16x16"),
    ("vit_h14", "ViT-H-14-quickgelu-worldwide", "v5p:4x4x8"),
]


def small(
    topology: str, image_size: int, patch: int, length: int, fsdp: int = 2, **more: Any
) -> Request:
    """Return the step of a small model whose parameters are split over `fsdp` devices."""
    sizes: Any = {"width": 64, "depth": 1, "num_heads": 1}
    model = CLIPConfig(
        embed_dim=16,
        vision=ViTConfig(image_size=image_size, patch_size=patch, **sizes),
        text=TextConfig(vocab_size=520, context_length=length, **sizes),
        **more,
    )
    recipe = Recipe(
        model=model, objective=(SoftmaxConfig(),), optim=OptimConfig(), steps=10_000, batch_size=64
    )
    return Request(recipe=recipe, mesh=MeshConfig(fsdp=fsdp), topology=Topology.parse(topology))


def tpu() -> None:
    """Check on every kind of TPU that gradients are summed: two to four bytes per parameter."""
    for topology in ("v4:2x2x2", "v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"):
        facts = compile_step(small(topology, 16, 8, 10, fsdp=1, dtype="float32"))
        kinds = ("all-reduce", "reduce-scatter")
        summed = sum(x.bytes for x in facts.collectives if x.kind in kinds and "data" in x.axes)
        assert 0.5 <= summed / facts.parameters < 1.5
        print(f"{topology}: {facts.parameters=} {summed=}", flush=True)


def gpu() -> None:
    """Check every kind of GPU; only steps on more than one node use the network."""
    for topology in ("H100:8", "H100:16", "A100:8", "H200:8", "B200:8"):
        request = small(topology, 16, 8, 10, dtype="float32")
        facts = compile_step(request)
        assert facts.mesh == (request.topology.devices // 2, 2, 1)
        assert facts.peak_bytes > facts.parameters + facts.optimizer + facts.batch
        between = sum(x.received_from_slices for x in facts.collectives)
        assert (between > 0) == (request.topology.islands > 1)
        assert sum(x.times * (x.flops or 0) for x in facts.works) > 0
        print(f"{topology}: {facts.peak_bytes=} {between=}", flush=True)


def cudnn() -> None:
    """Check that attention over odd lengths is cuDNN's: 197 and 257 patches, 77 tokens."""
    for patch in (16, 14):
        request = small("H100:8", 224, patch, 77, attention="cudnn", dtype="bfloat16")
        calls = compile_step(request).calls()
        assert calls["__cudnn$fmhaSoftmax"] == calls["__cudnn$fmhaSoftmaxBackward"] == 2
        print(f"patches of {patch}: {calls}", flush=True)


def tables() -> None:
    """Check that a large token embedding table is never gathered: a batch's rows are sent."""
    for name, architecture, topology in TABLES:
        config = load_config(ROOT / f"configs/{name}.py")
        # XLA's attention, with which BENCHMARKS.md was measured; nothing here depends on it.
        model = dataclasses.replace(
            zoo.get(architecture), remat=config.model.remat, attention="xla"
        )
        recipe = dataclasses.replace(config.recipe, model=model)
        request = Request(recipe=recipe, mesh=config.mesh, topology=Topology.parse(topology))
        facts, text = compile_step(request), model.text
        assert facts.fits
        data, fsdp, _ = facts.mesh
        table = 4 * text.vocab_size * text.width
        rows = 4 * recipe.batch_size // (data * fsdp) * text.context_length * text.width
        # Nothing reads or writes as much as all texts' embeddings, not even in bfloat16.
        assert max(x.bytes for x in facts.works) < rows * data * fsdp / 2
        sent = sum(x.bytes for x in facts.collectives if x.kind == "all-to-all")
        assert abs(sent / (2 * rows) - 1) < 0.01  # forward and backward
        gathered = [x.bytes / x.times for x in facts.collectives if x.kind == "all-gather"]
        assert max(gathered) < table / 4
        summed = [
            x.bytes for x in facts.collectives if x.axes == ("data",) and x.kind != "all-gather"
        ]
        assert any(abs(size / (table / fsdp) - 1) < 0.1 for size in summed), summed
        print(f"{architecture}: {facts.peak_bytes=} {table=} {sent=}", flush=True)


if __name__ == "__main__":
    checks = {"tpu": tpu, "gpu": gpu, "cudnn": cudnn, "tables": tables}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", help="checks to run; by default all of them")
    for name in parser.parse_args().checks or checks:
        checks[name]()
