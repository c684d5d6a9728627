"""Compare training steps with texts in groups by length to steps with full padding.

    python benchmarks/text_lengths.py step [ICONS]
    python benchmarks/text_lengths.py plan

`step` measures the CPU seconds of steps of the icons study's model (`studies/icons/base.py`) with
texts of up to 77 tokens. Texts have lengths like COCO's captions (log-normal, median 12.5 tokens,
σ 0.22) or, given its folder `icons/train`, those of 5,000 captions of the study. Both programs
alternate, and the medians are compared. `plan` compiles the step of `vit_b16` at 248 tokens for a
v5e:16x16, with groups for long captions (log-normal, median 110 tokens, σ 0.4) and with full
padding.
"""

import dataclasses
import statistics
import sys
import time

import jax
import numpy as np

from clip_jax import flops
from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.data.sources.any import PathConfig, open_single
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.models.text_lengths import TextLengths
from clip_jax.pods.plan import PlanConfig, plan
from clip_jax.pods.summary import describe
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program

ROUNDS, SAMPLE = 7, 5_000


def lognormal(median: float, sigma: float, least: int, most: int) -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(np.log(median), sigma, 200_000)
    return np.clip(lengths.round(), least, most).astype(int)


def with_text(config: Config, tokens: int) -> Config:
    text = dataclasses.replace(config.model.text, context_length=tokens)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))


def lengths_of(config: Config, path: str) -> np.ndarray:
    """Count the tokens of some captions of a data set."""
    source, text = open_single(PathConfig(path=path), 32), config.model.text
    chosen = np.random.default_rng(0).choice(len(source), SAMPLE, replace=False)
    captions = [source.record(int(i)).text()[0].decode() for i in chosen]
    return text.used_tokens(make_tokenizer(text)(captions, text.context_length, True))


def step(path: str = "") -> None:
    config = with_text(load_config("studies/icons/base.py"), 77)
    used = lengths_of(config, path) if path else lognormal(12.5, 0.22, 8, 77)
    groups = TextLengths.propose(used, texts=config.batch_size, context_length=77)
    mesh, rng = make_mesh(MeshConfig(), jax.devices()[:1]), np.random.default_rng(1)
    tokens = rng.integers(2, 8_000, (config.batch_size, 77), np.int32)
    for row, length in zip(tokens, rng.choice(used, len(tokens)), strict=True):
        row[length - 1], row[length:] = config.model.text.vocab_size - 1, 0
    images = rng.integers(0, 256, (config.batch_size, 32, 32, 3), np.uint8)
    programs, seconds = [], ([], [])
    for lengths in (None, groups):
        recipe = dataclasses.replace(config.recipe, text_lengths=lengths)
        program = Program(recipe, mesh)
        start = time.process_time()
        program.compile()
        print(f"{lengths}: compiled in {time.process_time() - start:.1f} s of CPU time")
        print(f"  FLOPs {flops.of_step(recipe).total:.4g}, text {flops.of_step(recipe).text:.4g}")
        programs.append([program, program.init()])
    for _ in range(ROUNDS):
        for pair, times in zip(programs, seconds, strict=True):
            start = time.process_time()
            batch = pair[0].put({"image": images, "text": tokens})
            pair[1], metrics = pair[0].step(pair[1], batch)
            jax.block_until_ready(pair[1])
            times.append(time.process_time() - start)
    padded, grouped = map(statistics.median, seconds)
    print(f"tokens per text: mean {used.mean():.1f}, groups {groups.mean(float)}, full 77")
    print(
        f"CPU s per step: full padding {padded:.3f}, groups {grouped:.3f}, {padded / grouped:.2f}×"
    )
    print(f"groups ran with full padding: {bool(metrics['full_padding'])}")


def plans() -> None:
    config = with_text(load_config("configs/vit_b16.py"), 248)
    used = lognormal(110, 0.4, 20, 248)
    groups = TextLengths.propose(used, texts=128, context_length=248)
    fields = {x.name: getattr(config, x.name) for x in dataclasses.fields(Config)}
    for lengths in (None, groups):
        print(lengths)
        print(describe(plan(PlanConfig(**fields | {"text_lengths": lengths}, schedules=False))[0]))


if __name__ == "__main__":
    {"step": step, "plan": plans}[sys.argv[1]](*sys.argv[2:])
