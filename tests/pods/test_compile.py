"""What the compiled step exchanges between devices, read from XLA's text.

Allowed are gathers of parameters and token ids under `fsdp`, and of the loss's features [B, E] and
vectors [B]. The table of words stays where it is: its rows are exchanged.
A gradient of a split parameter is summed to where its shard lies.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import processes, sharding
from clip_jax.config import load_config
from clip_jax.losses import SoftmaxConfig, forms
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.layers import Layout
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig
from clip_jax.pods import compile as pod
from clip_jax.pods.compile import Facts, Request
from clip_jax.pods.exchanges import collectives
from clip_jax.pods.topology import Topology
from clip_jax.serialize import from_dict, to_dict
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe, train_step
from clip_jax.train import train
from tests.conftest import ROOT, TINY, tiny_digits

BATCH, STEPS = 48, 10
# No two dims alike, so that a shape says what it is of.
CONFIG = CLIPConfig(
    embed_dim=20,
    vision=ViTConfig(image_size=24, patch_size=8, width=32, depth=2, num_heads=2, mlp_ratio=3.0),
    text=TextConfig(vocab_size=521, context_length=12, width=40, depth=2, num_heads=4),
    dtype="float32",
)
RESNET = dataclasses.replace(
    CONFIG, vision=ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, num_heads=4)
)
Text = str


def program(config: CLIPConfig, mesh, form: str = "dense") -> Program:
    optim, loss = OptimConfig(warmup_steps=1), SoftmaxConfig(form=form)
    recipe = Recipe(model=config, loss=loss, optim=optim, steps=STEPS, batch_size=BATCH)
    return Program(recipe, mesh)


def compiled_step(mesh, config: CLIPConfig = CONFIG, form: str = "dense") -> Text:
    whole = program(config, mesh, form)
    return whole.step.lower(whole.state, whole.batch).compile().as_text()


def faults(text: Text, mesh, config: CLIPConfig = CONFIG) -> list[str]:
    """Say which exchanges of a compiled step are not allowed."""
    params = program(config, mesh).state.params
    tensor = mesh.shape["tensor"]
    split, whole, unsplit, shards = set(), set(), set(), set()  # in any order, without depth
    for x in jax.tree.leaves(params):
        spec = [a if isinstance(a, tuple) else (a,) for a in x.sharding.spec]
        is_split = any("fsdp" in axes for axes in spec)
        if is_split:  # as it lies, but for fsdp
            pairs = list(zip(x.shape, [*spec, *[()] * len(x.shape)], strict=False))
            shard = tuple(d // math.prod(mesh.shape[a] for a in axes if a) for d, axes in pairs)
            copy = tuple(d // tensor if "tensor" in axes else d for d, axes in pairs)
            shards |= {_dims(shard), _dims(shard[1:])}
            unsplit |= {_dims(copy), _dims(copy[1:])}
        flat = x.shape[1:]  # of attention's projections, which are one product each
        merged = [(flat[0], math.prod(flat[1:])), (math.prod(flat[:-1]), flat[-1])] if flat else []
        # As the compiler may split it over tensor, too.
        for dims in (x.shape, flat, *(merged if len(flat) > 2 else [])):
            (split if is_split else whole).add(_dims(dims))
            parts = [d // tensor if d % tensor == 0 else d for d in dims]
            for i in range(len(dims)):
                mixed = (*dims[:i], parts[i], *dims[i + 1 :])
                (split if is_split else whole).add(_dims(mixed))
    features = {_dims((BATCH, config.embed_dim)), _dims((BATCH,))}
    ids = ("s32", (BATCH // mesh.shape["data"], config.text.context_length))
    words = (BATCH // sharding.batch_shards(mesh), config.text.context_length, config.text.width)
    found = []
    for x in collectives(text, mesh.shape):
        for shape in x.shapes:
            dims = _dims(shape.dims)
            batch_axes = set(x.axes) <= set(sharding.BATCH_AXES)
            if x.kind == "all-gather" and not (
                (dims in split and x.axes == ("fsdp",))
                or (dims in features and batch_axes)
                or (shape[:2] == ids and x.axes == ("fsdp",))
                or (shape.dims == words and x.axes == ("tensor",))
            ):
                found.append(f"gather of {shape.dims} over {x.axes}: {x.source}")
            copied = split if "fsdp" in x.axes else unsplit - shards
            if x.kind == "all-reduce" and "data" in x.axes and dims in copied - whole:
                found.append(f"replicated gradient {shape.dims} over {x.axes}: {x.source}")
    return found


def _dims(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(d for d in dims if d > 1))


@pytest.mark.long
@pytest.mark.parametrize(
    ("sizes", "form"), [((2, 4, 1), "dense"), ((2, 2, 2), "ring")], ids=["2x4", "2x2x2 ring"]
)
def test_only_parameters_and_features_are_gathered_and_gradients_stay_split(sizes, form):
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    text = compiled_step(mesh, form=form)
    assert faults(text, mesh) == []
    assert f"[{BATCH},{CONFIG.text.context_length},{CONFIG.text.width}]" not in text
    found = collectives(text, mesh.shape)
    blocks = [x for x in found if x.kind == "all-gather" and "transformer/while" in x.source]
    assert blocks
    assert all(x.times == CONFIG.text.depth for x in blocks)  # a layer at a time


@pytest.mark.slow
def test_a_resnet_too():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    assert faults(compiled_step(mesh, RESNET), mesh, RESNET) == []


def wrong_tokens(mesh, monkeypatch) -> Text:
    """Activations copied to all devices."""
    good = sharding.layout(mesh)
    everywhere = NamedSharding(mesh, P())
    place = functools.partial(jax.lax.with_sharding_constraint, shardings=everywhere)
    monkeypatch.setattr(sharding, "layout", lambda *_: good._replace(place=place))
    return compiled_step(mesh)


def left_alone(mesh, monkeypatch) -> Text:
    """Nothing said about activations: the compiler follows the parameters."""
    monkeypatch.setattr(sharding, "layout", lambda *_: Layout())
    return compiled_step(mesh)


def wrong_logits(mesh, monkeypatch) -> Text:
    """The similarity matrix whole on every device."""
    compare = forms.compare

    def copied(*args: Any) -> Any:
        pairs = compare(*args)
        whole = NamedSharding(mesh, P())
        rows = NamedSharding(mesh, P(sharding.BATCH_AXES))
        cosine = jax.lax.with_sharding_constraint(pairs.cosine, rows)
        return pairs._replace(cosine=jax.lax.with_sharding_constraint(cosine, whole))

    monkeypatch.setattr(forms, "compare", copied)
    return compiled_step(mesh)


def wrong_gradients(mesh, monkeypatch) -> Text:
    """The updated state not pinned to where the old one lies."""
    usual = program(CONFIG, mesh)
    step = functools.partial(
        train_step, model=CLIP(CONFIG), optim=OptimConfig(warmup_steps=1),
        loss=SoftmaxConfig(form="dense"), mesh=mesh,
    )  # fmt: skip
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), usual.state)
    places = jax.tree.map(lambda x: x.sharding, usual.batch)
    jitted = jax.jit(step, in_shardings=(whole, places))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), usual.state)
    return jitted.lower(state, usual.batch).compile().as_text()


@pytest.mark.long
@pytest.mark.parametrize(
    ("construct", "fault"),
    [
        (wrong_tokens, f"gather of ({BATCH}, "),
        (left_alone, "gather of "),
        (wrong_logits, f"gather of ({BATCH}, {BATCH})"),
        (wrong_gradients, "replicated gradient"),
    ],
    ids=["tokens", "left alone", "logits", "gradients"],
)
def test_the_wrong_exchanges_are_found(construct: Callable[..., Text], fault, monkeypatch):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    found = faults(construct(mesh, monkeypatch), mesh)
    assert any(line.startswith(fault) for line in found), found


# ------------------------------------------------------------------ what plan compiles


def request(topology: str, model: CLIPConfig = TINY, **mesh: int) -> Request:
    recipe = Recipe(
        model=model, loss=SoftmaxConfig(), optim=OptimConfig(), steps=10_000, batch_size=64
    )
    return Request(recipe=recipe, mesh=MeshConfig(**mesh), topology=Topology.parse(topology))


@pytest.mark.long
def test_plan_compiles_what_train_runs(tmp_path, monkeypatch):
    """The same StableHLO, as JAX writes it before it compiles, under the same options."""
    options = []

    def jit(function: Any, **kwargs: Any) -> Any:
        options.extend([kwargs["compiler_options"]] if "compiler_options" in kwargs else [])
        return plain(function, **kwargs)

    plain = jax.jit
    monkeypatch.setattr(jax, "jit", jit)
    asked = {"xla_cpu_enable_fast_math": False}
    monkeypatch.setattr(processes, "compiler_options", lambda platform: asked)
    config = tiny_digits(steps=3, evals=(), mesh=MeshConfig(data=2, fsdp=4))
    with dump_ir(tmp_path / "train"):
        train(config, tmp_path / "run")
    topology = Topology.parse("v5e:2x4")
    with dump_ir(tmp_path / "plan"):
        # On the CPU's own devices; a TPU's facts are read the same way.
        found = pod.facts(
            Request(recipe=config.recipe, mesh=config.mesh, topology=topology), jax.devices()
        )
    ran, planned = (dumped(tmp_path / name) for name in ("train", "plan"))
    assert len(ran) > 10_000
    assert ran == planned
    assert options == [asked, asked]

    assert from_dict(Facts, json.loads(json.dumps(to_dict(found)))) == found
    assert found.fits
    assert found.mesh == (2, 4, 1)
    assert found.peak_bytes > found.parameters + found.optimizer + found.batch
    assert sum(x.times * x.bytes for x in found.works) > found.peak_bytes
    parts = {(x.kind, *x.axes, x.part) for x in found.exchanges}
    assert ("all-gather", "fsdp", "image tower, forward") in parts
    assert ("all-gather", "data", "fsdp", "loss, forward") in parts


def dumped(folder: Path) -> str:
    """The step's StableHLO without the places in the source that called for it."""
    [path] = folder.glob("*train_step*")
    text = re.sub(r"^#loc.*\n", "", path.read_text(), flags=re.MULTILINE)
    return re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", text)


def test_flags_of_the_environment_win(monkeypatch):
    assert processes.compiler_options("tpu") == processes.TPU_OPTIONS
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_enable_async_all_gather=false")
    assert "xla_enable_async_all_gather" not in processes.compiler_options("tpu")


@contextlib.contextmanager
def dump_ir(folder: Path) -> Iterator[None]:
    jax.config.update("jax_dump_ir_to", str(folder))
    yield
    jax.config.update("jax_dump_ir_to", "")


def test_what_a_step_needs_is_read_from_the_compilers_complaint():
    early = "the total memory required for HLO temporaries (22.99G) exceeds available HBM (15.75G)."
    late = "Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm. Exceeded"
    assert pod.needed_bytes(early, 5) == int(22.99 * 2**30) + 5
    assert pod.needed_bytes(late, 5) == int(17.5 * 2**30)
    assert pod.needed_bytes("something else", 5) is None


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["H100:8", "H100:16", "A100:8", "H200:8", "B200:8"])
def test_a_step_compiles_for_gpus_that_are_not_there(topology):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the extra plan-gpu")
    asked = request(topology, fsdp=2)
    found = pod.compile_step(asked)
    assert found.mesh == (asked.topology.devices // 2, 2, 1)
    assert found.peak_bytes > found.parameters + found.optimizer + found.batch
    between = sum(x.received_from_slices for x in found.exchanges)
    assert (between > 0) == (asked.topology.islands > 1)
    assert sum(x.times * (x.flops or 0) for x in found.works) > 0


@pytest.mark.slow
@pytest.mark.parametrize("patch", [16, 14])  # 197 and 257 tokens, beside 77
def test_attention_is_cudnns_for_odd_lengths(patch):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the extra plan-gpu")
    sizes: Any = {"width": 64, "depth": 1, "num_heads": 1}
    model = dataclasses.replace(
        TINY, attention="cudnn", dtype="bfloat16",
        vision=ViTConfig(image_size=224, patch_size=patch, **sizes),
        text=TextConfig(vocab_size=520, context_length=77, **sizes),
    )  # fmt: skip
    calls = pod.compile_step(request("H100:8", model=model)).calls()
    assert calls["__cudnn$fmhaSoftmax"] == calls["__cudnn$fmhaSoftmaxBackward"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x2", "v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
def test_the_sums_of_gradients_are_found(topology):
    """Two bytes of each parameter at least cross the links, and not much more than four."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install jax[tpu]")
    found = pod.compile_step(request(topology, model=CONFIG))
    kinds = ("all-reduce", "reduce-scatter")
    summed = sum(x.bytes for x in found.exchanges if x.kind in kinds and "data" in x.axes)
    assert 0.5 <= summed / found.parameters < 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "model", "topology"),
    [
        ("siglip2_b16", "ViT-B-16-SigLIP2-256", "v5e:16x16"),
        ("vit_h14", "ViT-H-14-quickgelu-worldwide", "v5p:4x4x8"),
    ],
)
def test_a_large_table_of_words_stays_where_it_lies(config, model, topology):
    """256,000 words of 768, and 901,629 of 1,024, at a batch of 32,768."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install jax[tpu]")
    run = load_config(ROOT / f"configs/{config}.py")
    # XLA's attention, with which the figures in BENCHMARKS.md were taken; nothing here is of it.
    sized = dataclasses.replace(zoo.get(model), remat=run.model.remat, attention="xla")
    recipe = dataclasses.replace(run.recipe, model=sized)
    asked = Request(recipe=recipe, mesh=run.mesh, topology=Topology.parse(topology))
    found, text = pod.compile_step(asked), recipe.model.text
    assert found.fits
    data, fsdp, _ = found.mesh
    table = 4 * text.vocab_size * text.width
    rows = 4 * recipe.batch_size // (data * fsdp) * text.context_length * text.width
    # Nothing reads or writes as much as all texts' words take, not even in bfloat16.
    assert max(x.bytes for x in found.works) < rows * data * fsdp / 2
    sent = sum(x.bytes for x in found.exchanges if x.kind == "all-to-all")
    assert sent == pytest.approx(2 * rows, rel=0.01)  # forward and backward
    gathered = [x.bytes / x.times for x in found.exchanges if x.kind == "all-gather"]
    assert max(gathered) < table / 4
    summed = [x.bytes for x in found.exchanges if x.axes == ("data",) and x.kind != "all-gather"]
    assert any(size == pytest.approx(table / fsdp, rel=0.1) for size in summed), summed
    print(f"{model}: {found.parameters=} {found.optimizer=} {found.peak_bytes=} {table=} {sent=}")


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v4:2x2x1/slices=2"])
def test_a_step_compiles_for_a_tpu_that_is_not_there(topology):
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install jax[tpu]")
    asked = request(topology, fsdp=2)
    found = pod.compile_step(asked)
    assert found.fits
    assert found.mesh == (4, 2, 1)
    between = sum(x.received_from_slices for x in found.exchanges)
    assert (between > 0) == (asked.topology.slices > 1)
    huge = dataclasses.replace(asked, recipe=dataclasses.replace(asked.recipe, batch_size=2**24))
    assert not pod.compile_step(huge).fits
