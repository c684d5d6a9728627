"""The evaluators of training on finished weights: `clip-jax evaluate MODEL`."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import jax

from clip_jax import sharding
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.load import load
from clip_jax.metrics import replace_text


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a model on what ships inside."""

    model: Path  # a run's work directory, a model folder, or a foreign file
    digits: DigitsEvalConfig = field(default_factory=lambda: DigitsEvalConfig(per_number=100))
    mesh: sharding.MeshConfig = field(default_factory=sharding.MeshConfig)
    output: Path | None = None  # folder for result.json and predictions.png; None: print only


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Return the evaluators' numbers by the names that `result.json` has."""
    model = load(config.model)
    mesh = sharding.make_mesh(config.mesh)
    params = jax.device_put(model.params, sharding.replicated(mesh))
    evaluator = config.digits.make()
    values = dict(evaluator.run(model.clip, params, mesh))
    if config.output:
        config.output.mkdir(parents=True, exist_ok=True)
        replace_text(config.output / "result.json", json.dumps(values, indent=1))
        evaluator.draw(model.clip, params, mesh, config.output)
    return values
