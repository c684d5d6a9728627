"""Is a small model better with a teacher, at equal samples, equal hours and equal FLOPs?

    python benchmarks/distillation.py WORKDIR [--steps 300] [--seeds 5] [--first-seed 0]

The data and models are those of `configs/digits.py`, the student's towers of half the width. The
pairs of one epoch are rendered once and stored. The student is trained in four ways with each seed:

- alone, for STEPS steps,
- with the teacher, for as many steps, which is as many samples,
- alone for the time that the steps with the teacher take: step times are measured on the same
  batch, alternating, and their medians compared,
- alone for as many FLOPs, the teacher's forward passes included.

The teacher is trained for 1,200 steps, which are not counted. The student's runs have the same
learning rate and 100 steps of warm-up. WORKDIR keeps the runs; a second start of the script
continues. The result is zero-shot top-1 on images by held-out writers, as mean ± std over the
seeds: of numbers seen in training, and of unseen combinations of digits.
"""

import argparse
import dataclasses
import io
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from clip_jax import flops, sharding
from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.convert.weight_files import WeightFiles
from clip_jax.data.digits import DigitsConfig, DigitsSource
from clip_jax.data.sources.any import PathConfig
from clip_jax.data.sources.array_record import encode_example
from clip_jax.inference.starting import frozen_params
from clip_jax.losses import DistillationConfig, LiveTeacher
from clip_jax.step import Program
from clip_jax.train import open_data, train

ROOT = Path(__file__).parents[1]
TEACHER_STEPS = 1_200
KINDS = {
    "samples": "alone",
    "teacher": "with the teacher",
    "hours": "alone, equal hours",
    "flops": "alone, equal FLOPs",
}
HEADER = (
    "student",
    "steps",
    "top-1, numbers seen in training, %",
    "top-1, unseen numbers, %",
    "seconds of training per run",
)


def draw(path: Path) -> None:
    """Store the pairs of one epoch as an ArrayRecord file."""
    source = DigitsSource(DigitsConfig(digits=2), 16)
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for i in range(len(source)):
        pixels, caption = source.load(i, np.random.default_rng([0, i]))
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        writer.write(encode_example({"image": [file.getvalue()], "caption": [caption.encode()]}))
    writer.close()


def base(workdir: Path, steps: int, seed: int) -> Config:
    config = load_config(ROOT / "configs/digits.py")
    [evaluator] = config.evals
    source = PathConfig(path=str(workdir / "pairs.array_record"))
    return dataclasses.replace(
        config,
        steps=steps,
        seed=seed,
        report_every=steps,
        data=dataclasses.replace(config.data, seed=seed, source=source),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=steps),
        evals=(dataclasses.replace(evaluator, every_steps=steps),),
    )


def student(workdir: Path, steps: int, seed: int) -> Config:
    config = base(workdir, steps, seed)
    model = config.model
    vision = dataclasses.replace(model.vision, width=model.vision.width // 2)
    text = dataclasses.replace(model.text, width=model.text.width // 2)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, vision=vision, text=text),
        optim=dataclasses.replace(config.optim, warmup_steps=100),
    )


def with_teacher(config: Config, workdir: Path, weight: float) -> Config:
    """Add a distillation term; the weights of both terms sum to 1."""
    teacher = load_config(ROOT / "configs/digits.py").model
    term = DistillationConfig(
        weight=weight,
        teachers=(LiveTeacher(weights=str(workdir), model=teacher, dtype="float32"),),
    )
    [own] = config.objective
    kept = (dataclasses.replace(own, weight=1 - weight),) if weight < 1 else ()
    return dataclasses.replace(config, objective=(*kept, term))


def step_seconds(configs: list[Config], rounds: int = 15, steps: int = 5) -> list[float]:
    """Return the median seconds of a step of each config; rounds of each alternate."""
    runs, seconds = [], [[] for _ in configs]
    for config in configs:
        mesh = sharding.make_mesh(config.mesh)
        program = Program(config.recipe, mesh)
        batch = next(open_data(config, 0, 1).batches(0))
        with WeightFiles() as weight_files:
            frozen = frozen_params(config.objective, mesh, weight_files)
        state = program.init(frozen=frozen)
        program.compile()
        runs.append(
            (
                program,
                state,
                program.put({"image": batch.image, "text": batch.text, **batch.inputs}),
            )
        )
    for _ in range(rounds):
        for i, (program, state, batch) in enumerate(runs):
            start = time.perf_counter()
            for _ in range(steps):
                state, _ = program.step(state, batch)
            jax.block_until_ready(state)
            seconds[i].append((time.perf_counter() - start) / steps)
            runs[i] = (program, state, batch)
    return [statistics.median(values[1:]) for values in seconds]


def run(config: Config, workdir: Path) -> dict[str, float]:
    path = workdir / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    return result if result.get("step") == config.steps else train(config, workdir)


def spread(values: list[float]) -> str:
    std = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{std}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=Path, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=300, help="steps of a run with the teacher")
    parser.add_argument("--seeds", type=int, default=5, help="number of runs of each kind")
    parser.add_argument("--first-seed", type=int, default=0, help="the first seed")
    parser.add_argument("--weight", type=float, default=0.75, help="weight of distillation, 0 to 1")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="kinds of runs to make")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    if not (path := args.workdir / "pairs.array_record").exists():
        draw(path)
    folder = args.workdir / "teacher"
    taught = run(base(args.workdir, TEACHER_STEPS, 1_000), folder)
    alone = student(args.workdir, args.steps, 0)
    distilled = with_teacher(alone, folder, args.weight)
    path = args.workdir / "seconds.json"
    if not path.exists():
        path.write_text(json.dumps(step_seconds([alone, distilled])))
    own, both = json.loads(path.read_text())
    work = flops.of_step(distilled).total / flops.of_step(alone).total
    print(f"a step takes {1e3 * own:.1f} ms alone and {1e3 * both:.1f} ms with the teacher")
    print(f"FLOPs with the teacher / alone: {work:.2f}", flush=True)
    factors = {"samples": 1.0, "teacher": 1.0, "hours": both / own, "flops": work}
    steps = {kind: round(args.steps * factors[kind]) for kind in args.kinds}
    rows: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in args.kinds}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for kind, row in rows.items():
            config = student(args.workdir, steps[kind], seed)
            if kind == "teacher":
                config = with_teacher(config, folder, args.weight)
            result = run(config, args.workdir / f"{kind}_{seed}")
            top1 = (100 * result[f"zero_shot/{part}/top1"] for part in ("seen", "unseen"))
            row.append((*top1, result["seconds/steps"]))
            print(kind, seed, [round(x, 1) for x in row[-1]], flush=True)
    print(f"\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    top1 = [f"{100 * taught[f'zero_shot/{part}/top1']:.1f}" for part in ("seen", "unseen")]
    print(
        f"| the teacher | {TEACHER_STEPS:,} | {' | '.join(top1)} | {taught['seconds/steps']:.1f} |"
    )
    for kind, row in rows.items():
        cells = [spread(list(values)) for values in zip(*row, strict=True)]
        print(f"| {KINDS[kind]} | {steps[kind]:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
