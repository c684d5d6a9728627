"""Benchmarks of this machine: `clip-jax bench input CONFIG` and `clip-jax bench step CONFIG`.

Each takes a run's config with a few more fields and returns the object that `--json` prints.
"""

import contextlib
import functools
import math
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clip_jax import flops, sharding
from clip_jax.chips import find, peak_flops
from clip_jax.clock import CLOCK
from clip_jax.config import Config
from clip_jax.config_files import with_weights
from clip_jax.data import views
from clip_jax.data.augment import augment
from clip_jax.data.batch_plan import constant
from clip_jax.data.images import ImageError, read_crops
from clip_jax.data.pipeline import Pipeline, build, open_source
from clip_jax.data.sources import BlockSource, SampleError, caption_of
from clip_jax.data.tokenizers import Tokenizer, make_tokenizer
from clip_jax.display import say, table
from clip_jax.errors import InputError, check_ranges
from clip_jax.metrics.reports import bucket_rates, peak_memory
from clip_jax.models.images import NaFlex, valid_patches
from clip_jax.models.inputs import Input, ViewInput
from clip_jax.models.text_lengths import TextLengths
from clip_jax.pods import compile as pod
from clip_jax.pods.plan import BOUNDS
from clip_jax.pods.topology import Topology
from clip_jax.step import Inputs, Program, check_lengths
from clip_jax.storage import bucket
from clip_jax.storage.json_files import read_json

_WARM = 64  # samples before the stages are timed
_MOST_BAD = 1000  # samples in a row

# -------------------------------------------------------------------------------------- input


@dataclass(frozen=True, kw_only=True)
class InputBench(Config):
    """Settings of a run and of the benchmark of its input pipeline; no device is used."""

    seconds: float = 5.0  # Seconds measured, once for the single stages, once for the pipeline.
    warmup: float = 2.0  # Seconds that the pipeline runs before it is measured.
    # Devices that share a batch in training (data times fsdp), for the proposed text lengths.
    devices: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, seconds="(0, inf)", warmup="[0, inf)", devices="[1, inf)")


def measure_input(config: InputBench) -> dict[str, Any]:
    """Measure samples/s of each stage in one thread and of the whole pipeline; name the bottleneck.

    For each stage, `stages` has samples/s and the share of time spent computing (the rest is
    waiting for a disk or a bucket). `texts` has the tokens that the captions need, and the groups
    by length (`text_lengths`) that would save most of their padding, if the config allows these.
    """
    config = with_weights(config)
    data = config.data
    tokenizer = make_tokenizer(config.model.text)
    pipeline = build(
        data,
        constant(config.batch_size, config.model.vision.image_spec),
        tokenizer=tokenizer,
        context_length=config.model.text.context_length,
        inputs=_inputs(config),
    )
    say(f"stages, one thread, {config.seconds:g} s ...")
    stages, used = _stages(config, pipeline.order, tokenizer)
    say(f"pipeline, {data.workers} workers of {data.threads} threads, {config.seconds:g} s ...")
    return {
        **_pipeline(config, pipeline),
        "batch_size": config.batch_size,
        "workers": data.workers,
        "threads": data.threads,
        "decoder": data.decoder,
        "cores": len(os.sched_getaffinity(0)),
        "stages": stages,
        **({"texts": _texts(config, used)} if len(used) else {}),
        "limit": min(stages, key=lambda name: stages[name]["samples_per_second"]),
    }


def _stages(
    config: InputBench, order: str, tokenize: Tokenizer
) -> tuple[dict[str, dict[str, float]], np.ndarray]:
    """Run each stage on the same samples, one after the other, in this thread.

    Returns their measurements, and the number of tokens that each caption needs.
    """
    data, spec = config.data, config.model.vision.image_spec
    length = config.model.text.context_length
    source = open_source(data.source, spec.side)
    load = _load_stored if config.stored == "image" else _load
    read = _read_any(source, load)
    if isinstance(source, BlockSource) and order == "blocks":
        read = _read_blocks(source, load)
    wall: dict[str, float] = defaultdict(float)
    cpu: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any], *args: Any) -> Any:
        start, start_cpu = CLOCK.now(), CLOCK.thread_cpu()
        try:
            return function(*args)
        finally:
            wall[name] += CLOCK.now() - start
            cpu[name] += CLOCK.thread_cpu() - start_cpu

    how = {"scaled": data.scaled_decode, "decoder": data.decoder}
    inputs = _inputs(config)
    has_views = any(isinstance(x, ViewInput) for x in inputs.values())
    number, count = 0, 0
    used = [np.zeros(0, int)]
    while sum(wall.values()) < config.seconds or not count:
        captions = []
        for _ in range(min(config.batch_size, _WARM)):
            number += 1
            rng = np.random.default_rng(number)
            crop_rng = rng if data.crop == "random" else None
            try:
                image, caption = timed("read", read, rng)
                if has_views:
                    draw = functools.partial(views.draw, **how)
                    timed("views", draw, image, inputs, (data.seed, number))
                if isinstance(image, bytes):
                    crop = functools.partial(read_crops, **how)
                    crop_args = (image, [spec], crop_rng, data.crop_scale)
                    (image,) = timed("decode and crop", crop, *crop_args)
                    if data.augment != type(data.augment)():
                        timed("augment", augment, image, rng, data.augment)
            except (SampleError, ImageError):
                continue
            captions.append(caption)
        if captions and config.stored != "text":
            tokens = timed("tokenize", tokenize, captions, length, True)
            used.append(np.asarray(config.model.text.used_tokens(tokens)))
        if number <= _WARM:  # files are opened and tables read at the first use
            wall.clear()
            cpu.clear()
        else:
            count += len(captions)
        if not count and number > _MOST_BAD:
            raise InputError(
                f"none of {number} samples of data.source could be read; check its path and files."
            )
    stages = {
        name: {"samples_per_second": count / wall[name], "computing": cpu[name] / wall[name]}
        for name in wall
    }
    return stages, np.concatenate(used)


def _inputs(config: InputBench) -> Mapping[str, Input]:
    """Return what the pipeline makes besides images and texts, for the kind of batches that has
    most of it."""

    def size(inputs: Mapping[str, Input]) -> int:
        arrays = jax.tree.leaves([x.shapes(1) for x in inputs.values()])
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)

    of_kinds = (config.recipe_of(kind).reads() for kind in config.batches.kinds)
    return max(of_kinds, key=size)


def _texts(config: InputBench, used: np.ndarray) -> dict[str, Any]:
    """Describe the lengths of captions, and propose groups for them."""
    context = config.model.text.context_length
    result: dict[str, Any] = {
        "mean_tokens": float(used.mean()),
        "most_tokens": int(used.max()),
        "context_length": context,
    }
    texts = max(config.batch_size // (config.accumulation * config.devices), 1)
    lengths = TextLengths.propose(used, texts=texts, context_length=context)
    with contextlib.suppress(InputError):  # of models and losses without groups
        check_lengths(config.recipe, lengths)
        result["text_lengths"] = {"tokens": lengths.tokens, "shares": lengths.shares}
        result["padded_tokens"] = lengths.mean(lambda length: length)
    return result


Read = Callable[[np.random.Generator], tuple[Any, str]]
Load = Callable[[Any, np.random.Generator], tuple[Any, str]]  # of a record


def _load(record: Any, rng: np.random.Generator) -> tuple[Any, str]:
    return record.load(rng)


def _load_stored(record: Any, rng: np.random.Generator) -> tuple[Any, str]:
    """Read the embeddings and a caption, not the image."""
    return record.more(), caption_of(record.text(), rng)


def _read_any(source: Any, load: Load) -> Read:
    """Return a reader of samples in random order."""
    order = np.random.default_rng(0)

    def read(rng: np.random.Generator) -> tuple[Any, str]:
        index = int(order.integers(len(source)))
        if load is _load:
            return source.load(index, rng)
        return load(source.record(index), rng)

    return read


def _read_blocks(source: BlockSource, load: Load) -> Read:
    """Return a reader of the samples of random blocks, each read in one piece."""
    order, sizes = np.random.default_rng(0), source.blocks()
    ends, records = np.cumsum(sizes), []

    def read(rng: np.random.Generator) -> tuple[Any, str]:
        if not records:
            at = int(order.integers(len(sizes)))
            records.extend(source.fetch(int(ends[at] - sizes[at]), int(ends[at])))
        return load(records.pop(), rng)

    return read


def _pipeline(config: InputBench, pipeline: Pipeline) -> dict[str, Any]:
    bucket.requested()  # drops the counts of the stages
    start = CLOCK.now()
    with contextlib.closing(pipeline.batches()) as batches:
        next(batches)
        first = CLOCK.now() - start
        while CLOCK.now() - start < first + config.warmup:
            next(batches)
        done, start = 0, CLOCK.now()
        end, read = start, Counter()
        while end - start < config.seconds:
            batch = next(batches)
            read.update(vars(batch.reading) | valid_patches(batch.image))
            done += 1
            end = CLOCK.now()
    return {
        "samples_per_second": done * config.batch_size / (end - start),
        "seconds_to_first_batch": first,
        "order": pipeline.order,
        **({"padding": 1 - read["valid_patches"] / n} if (n := read["patches"]) else {}),
        **bucket_rates(read, end - start),
    }


def describe_input(result: dict[str, Any]) -> str:
    """Return one line per stage, and advice on what to change."""
    lines = [f"{'stage':<18}{'samples/s':>10}  computing"]
    for name, stage in result["stages"].items():
        lines.append(f"{name:<18}{stage['samples_per_second']:>10,.0f}  {stage['computing']:.0%}")
    if "padding" in result:
        lines.append(f"padding: {result['padding']:.1%} of all patches")
    if "texts" in result:
        lines.append(_of_texts(result["texts"]))
    if "bucket_requests_per_second" in result:
        lines.append(_of_bucket(result))
    lines += [
        f"{'pipeline':<18}{result['samples_per_second']:>10,.0f}  with "
        f"{result['workers']} workers, {result['threads']} threads, {result['cores']} cores; "
        f"first batch after {result['seconds_to_first_batch']:.1f} s",
        f"limit: {result['limit']}; {_advice(result)}",
    ]
    return "\n".join(lines)


def _of_texts(texts: dict[str, Any]) -> str:
    line = f"texts: {texts['mean_tokens']:.1f} tokens on average, at most {texts['most_tokens']}, "
    line += f"padded to {texts['context_length']}"
    if groups := texts.get("text_lengths"):
        lengths = TextLengths(**{name: tuple(values) for name, values in groups.items()})
        line += f"; to {texts['padded_tokens']} on average with text_lengths={lengths}"
    return line


def _of_bucket(result: dict[str, Any]) -> str:
    requests, samples = result["bucket_requests_per_second"], result["samples_per_second"]
    line = f"bucket: {requests:,.1f} requests/s of {samples / requests:,.0f} samples"
    line += f", {result['bucket_bytes_per_second'] / 2**20:,.1f} MiB/s"
    if "bucket_wait" in result:
        line += f", {result['bytes_read_per_byte_used']:.2f} bytes read per byte used, "
        line += f"{result['bucket_wait']:.2f} threads waiting"
    return f"{line}; {result['order']} order"


def _advice(result: dict[str, Any]) -> str:
    if result["stages"][result["limit"]]["computing"] < 0.5:
        return "it mostly waits for storage: raise --data.threads"
    if max(1, result["workers"]) * max(1, result["threads"]) < result["cores"]:
        return "cores are idle: raise --data.threads or --data.workers"
    if result["limit"] == "decode and crop":
        faster = " or --data.decoder turbo" if result["decoder"] == "pillow" else ""
        return f"smaller files decode faster: clip-jax prepare --resize{faster}"
    return "raise --data.workers: each worker has its own Python interpreter"


# --------------------------------------------------------------------------------------- step


@dataclass(frozen=True, kw_only=True)
class StepBench(Config):
    """Settings of a run and of the benchmark of its training step, on synthetic data."""

    warmup: int = 3  # Number of untimed steps before the timed ones.
    rounds: int = 7  # Number of timed rounds; the median round is reported.
    calls: int = 3  # Steps per round, enqueued so that the device never waits for the host.
    # Output of `clip-jax plan CONFIG --json` for as many devices, to print beside the measurement.
    against_plan: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, warmup="[0, inf)", rounds="[1, inf)", calls="[1, inf)")


def measure_step(config: StepBench) -> dict[str, Any]:
    """Measure training steps: samples/s, MFU (None on a CPU) and memory.

    `peak_bytes` is the peak that the device reports, if it does, else the compiler's estimate.
    With `against_plan`, each estimate of the plan is paired with the measurement. Raises InputError
    if the plan is of another step.
    """
    mesh, config = sharding.make_mesh(config.mesh), with_weights(config)
    device, work = jax.devices()[0].device_kind, flops.of_step(config).total
    step = {
        "batch_size": config.batch_size,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "remat": config.model.remat,
        "model_flops_per_step": work,
        **({"chip": chip.name} if (chip := find(device)) else {}),
    }
    plan = _read_plan(config.against_plan, step) if config.against_plan else {}
    program = Program(config.recipe, mesh)
    rest = {name: x for name, x in program.batch.items() if name not in ("row", "learning_rate")}
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (program.state.frozen, rest))
    state = program.init(frozen=blank[0])
    batch = program.put(blank[1] | _made_up(config))
    say(f"compiling the step for {mesh.size} devices ...")
    start = CLOCK.now()
    compiled = program.step.lower(state, batch).compile()
    compiling = CLOCK.now() - start
    for _ in range(config.warmup):
        state, _ = compiled(state, batch)
    times = []
    for _ in range(config.rounds):
        jax.block_until_ready(state)
        start = CLOCK.now()
        for _ in range(config.calls):
            state, _ = compiled(state, batch)
        jax.block_until_ready(state)
        times.append((CLOCK.now() - start) / config.calls)
    seconds, peak = statistics.median(times), peak_flops(device)
    spec = config.model.vision.image_spec
    result = {
        "samples_per_second": config.batch_size / seconds,
        "samples_per_second_per_device": config.batch_size / seconds / mesh.size,
        "seconds": seconds,
        "seconds_fastest": min(times),
        "mfu": peak and work / (seconds * mesh.size * peak),
        "peak_bytes": peak_memory() or pod.peak(compiled),
        "model_flops": work,
        "batch_size": config.batch_size,
        **({"tokens": spec.max_patches} if isinstance(spec, NaFlex) else {}),
        "devices": mesh.size,
        "device_kind": device,
        "mesh": dict(mesh.shape),
        "compile_seconds": compiling,
    }
    return result | ({"plan": plan["name"], "against_plan": _beside(plan, result)} if plan else {})


def _read_plan(path: Path, step: dict[str, Any]) -> dict[str, Any]:
    """Read the plan of a step, which may be one of several batch sizes, lengths or pods."""
    advice = "Write it with: clip-jax plan CONFIG --topology NAME:SIZE --json > FILE."
    names = {*step, "name", "fits", "bytes_per_device", "lengths"} - {"chip"}
    first = read_json(path, *sorted(names), advice=advice)
    if not first:
        raise InputError(f"--against-plan {path} does not exist. {advice}")
    differs = []
    for plan in (*first["lengths"], first, *first.get("compared", ())):
        plan["chip"] = Topology.parse(plan["name"]).chip.name
        differs.append([f"{k}={plan[k]} (here {x})" for k, x in step.items() if plan[k] != x])
        if not differs[-1] and plan["fits"]:
            return plan
    if [] in differs:
        raise InputError(
            f"--against-plan {path} has no times, since the step does not fit into memory by this "
            "plan; reduce --batch-size or change --model.remat, and plan again."
        )
    raise InputError(
        f"--against-plan {path} is the plan of another step: {', '.join(min(differs, key=len))}. "
        "Plan and measure with the same config and flags, for the chips and devices at hand."
    )


def _beside(plan: dict[str, Any], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Pair each estimate of a plan, None if it has none, with the measurement."""
    rows: list[tuple[str, str, Any, Any]] = []
    estimates = [x.removeprefix("step_seconds_") for x in plan if x.startswith("step_seconds_")]
    for prefix, key, quantity in (("step_seconds_", "seconds", "step, s"), ("mfu_", "mfu", "MFU")):
        for name in estimates:
            label = BOUNDS.get(name, (name,))[0]
            rows.append((quantity, label, plan.get(prefix + name), result[key]))
    memory = plan["bytes_per_device"]["total"] / 1e9, result["peak_bytes"] / 1e9
    rows.append(("peak memory per device, GB", "compiled step", *memory))
    names = ("quantity", "estimate", "planned", "measured", "ratio")
    ratios = (row[3] / row[2] if row[2] and row[3] else None for row in rows)
    return [dict(zip(names, (*row, x), strict=True)) for row, x in zip(rows, ratios, strict=True)]


def _made_up(config: Config) -> Inputs:
    rng = np.random.default_rng(config.seed)
    spec, text = config.model.vision.image_spec, config.model.text
    tokens = rng.integers(1, text.vocab_size - 1, (config.batch_size, text.context_length))
    # With groups by length, texts that all fit: the cost does not depend on them.
    length = text.context_length if config.text_lengths is None else config.text_lengths.tokens[0]
    tokens[:, length:] = text.tokenizer.pad_id
    tokens[:, length - 1] = text.vocab_size - 1  # the end of text
    size = (spec.side, spec.side)
    if isinstance(spec, NaFlex):  # no padding: a row of patches
        size = (spec.patch_size, spec.patch_size * spec.max_patches)
    images = spec.pack(rng.integers(0, 256, (config.batch_size, *size, 3), np.uint8))
    made: Inputs = {"image": images, "text": tokens.astype(np.int32)}
    if config.stored is not None:
        rows = rng.standard_normal((config.batch_size, config.model.embed_dim), np.float32)
        made[config.stored] = rows
    return made


def describe_step(result: dict[str, Any]) -> str:
    """Return lines about the device, speed and memory, and a table beside a plan."""
    mesh = " ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    share = "" if result["mfu"] is None else f", MFU {result['mfu']:.1%}"
    tokens = f" at {result['tokens']:,} tokens" if "tokens" in result else ""
    beside = result.get("against_plan", ())
    cells = [["–" if x is None else x for x in row.values()] for row in beside]
    return (
        f"{result['devices']} × {result['device_kind']}, mesh {mesh}, "
        f"batch {result['batch_size']:,}{tokens}\n"
        f"{result['seconds']:.4f} s/step (median; fastest {result['seconds_fastest']:.4f})\n"
        f"{result['samples_per_second']:,.1f} pairs/s, "
        f"{result['samples_per_second_per_device']:,.1f} per device{share}\n"
        f"{result['model_flops'] / result['seconds'] / 1e12:.3g} model TFLOP/s\n"
        f"memory {result['peak_bytes'] / 2**20:,.0f} MiB per device"
        + (f"\nplan for {result['plan']}:\n{table([*beside[0]], cells, left=2)}" if cells else "")
    )


# Benchmarks of `clip-jax bench`: config class, function that measures, function that formats.
Bench = tuple[type[Config], Callable[[Any], dict[str, Any]], Callable[[dict[str, Any]], str]]
BENCHES: dict[str, Bench] = {
    "input": (InputBench, measure_input, describe_input),
    "step": (StepBench, measure_step, describe_step),
}
