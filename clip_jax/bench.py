"""What this machine does a second: `clip-jax bench input CONFIG`, one function a sub-command.

Each takes a run's config with a few fields more and returns the object that `--json` prints.
"""

import functools
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_jax.config import Config
from clip_jax.data.augment import augment
from clip_jax.data.images import ImageError, read_crop
from clip_jax.data.pipeline import build, open_source
from clip_jax.data.sources import SampleError
from clip_jax.data.tokenizer import Tokenizer

_WARM = 64  # samples before the stages are timed
_MOST_BAD = 1000  # samples in a row

# -------------------------------------------------------------------------------------- input


@dataclass(frozen=True, kw_only=True)
class InputBench(Config):
    """A run's input alone: no model, no device."""

    seconds: float = 5.0  # of measuring, each for the stages and for the pipeline
    warmup: float = 2.0  # seconds of the pipeline before

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seconds > 0 or self.warmup < 0:
            raise ValueError(
                f"seconds={self.seconds} must be above 0 and warmup={self.warmup} not below"
            )


def measure_input(config: InputBench) -> dict[str, Any]:
    """Samples a second of each stage in one thread, of the whole pipeline, and what limits it.

    `stages` has for each the samples a second and the share of the time that it computes (the rest
    is waiting, for a disk or a bucket).
    """
    _say(f"stages, one thread, {config.seconds:g} s ...")
    stages = _stages(config)
    data = config.data
    _say(f"pipeline, {data.workers} workers of {data.threads} threads, {config.seconds:g} s ...")
    return {
        **_pipeline(config),
        "batch_size": config.batch_size,
        "workers": data.workers,
        "threads": data.threads,
        "cores": len(os.sched_getaffinity(0)),
        "stages": stages,
        "limit": min(stages, key=lambda name: stages[name]["samples_per_second"]),
    }


def _stages(config: InputBench) -> dict[str, dict[str, float]]:
    """Each stage over the same samples, one after the other, in this thread."""
    data, size = config.data, config.model.vision.image_size
    tokenize, length = _tokenizer(config), config.model.text.context_length
    source = open_source(data.source, size)
    wall: dict[str, float] = defaultdict(float)
    cpu: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any], *args: Any) -> Any:
        start, start_cpu = time.perf_counter(), time.thread_time()
        try:
            return function(*args)
        finally:
            wall[name] += time.perf_counter() - start
            cpu[name] += time.thread_time() - start_cpu

    order, number, count = np.random.default_rng(data.seed), 0, 0
    while sum(wall.values()) < config.seconds or not count:
        captions = []
        for _ in range(min(config.batch_size, _WARM)):
            number += 1
            rng = np.random.default_rng(number)
            crop_rng = rng if data.crop == "random" else None
            try:
                image, caption = timed("read", source.load, int(order.integers(len(source))), rng)
                if isinstance(image, bytes):
                    crop = functools.partial(read_crop, scaled=data.scaled_decode)
                    crop_args = (image, size, crop_rng, data.crop_scale)
                    image = timed("decode and crop", crop, *crop_args)
                    if data.augment != type(data.augment)():
                        timed("augment", augment, image, rng, data.augment)
            except (SampleError, ImageError):
                continue
            captions.append(caption)
        if captions:
            timed("tokenize", tokenize, captions, length, True)
        if number <= _WARM:  # files are opened and tables read at the first use
            wall.clear()
            cpu.clear()
        else:
            count += len(captions)
        if not count and number > _MOST_BAD:
            raise ValueError(f"none of {number} samples of data.source could be read")
    return {
        name: {"samples_per_second": count / wall[name], "computing": cpu[name] / wall[name]}
        for name in wall
    }


def _pipeline(config: InputBench) -> dict[str, float]:
    pipeline = build(
        config.data,
        tokenizer=_tokenizer(config),
        image_size=config.model.vision.image_size,
        context_length=config.model.text.context_length,
        batch_size=config.batch_size,
    )
    start = time.perf_counter()
    batches = pipeline.batches()
    try:
        next(batches)
        first = time.perf_counter() - start
        while time.perf_counter() - start < first + config.warmup:
            next(batches)
        done, start = 0, time.perf_counter()
        end = start
        while end - start < config.seconds:
            next(batches)
            done += 1
            end = time.perf_counter()
    finally:
        batches.close()
    return {
        "samples_per_second": done * config.batch_size / (end - start),
        "seconds_to_first_batch": first,
    }


def _tokenizer(config: Config) -> Tokenizer:
    return Tokenizer(config.model.text.vocab_size)


def describe_input(result: dict[str, Any]) -> str:
    """A line a stage, and what to change."""
    lines = [f"{'stage':<18}{'samples/s':>10}  computing"]
    for name, stage in result["stages"].items():
        lines.append(f"{name:<18}{stage['samples_per_second']:>10,.0f}  {stage['computing']:.0%}")
    rate = f"{'pipeline':<18}{result['samples_per_second']:>10,.0f}"
    lines += [
        f"{rate}  with {result['workers']} workers, "
        f"{result['threads']} threads, {result['cores']} cores; "
        f"first batch after {result['seconds_to_first_batch']:.1f} s",
        f"limit: {result['limit']}; {_advice(result)}",
    ]
    return "\n".join(lines)


def _advice(result: dict[str, Any]) -> str:
    if result["stages"][result["limit"]]["computing"] < 0.5:
        return "it mostly waits: raise --data.threads"
    if max(1, result["workers"]) * max(1, result["threads"]) < result["cores"]:
        return "cores are idle: raise --data.threads or --data.workers"
    if result["limit"] == "decode and crop":
        return "smaller files decode faster: clip-jax prepare --resize"
    return "more --data.workers share the interpreter less"


def _say(text: str) -> None:
    print(text, file=sys.stderr)


# What `clip-jax bench` offers: the config of each, what measures, what makes text of its result.
Bench = tuple[type[Config], Callable[[Any], dict[str, Any]], Callable[[dict[str, Any]], str]]
BENCHES: dict[str, Bench] = {
    "input": (InputBench, measure_input, describe_input),
}
