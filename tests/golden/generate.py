"""Write the golden files anew: `python -m tests.golden.generate`. Say why in the commit.

With the oldest jax that is supported: what it exported, every newer one has to read.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from clip_jax.convert.verify import our_outputs, random_inputs
from clip_jax.convert.weights import Weights, default_preprocess
from clip_jax.export import stablehlo
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe
from tests.conftest import (
    DECODERS,
    GOLDEN_LOSS,
    OPTIM,
    TINY,
    batch,
    parameter_tree,
    parameters,
    sums_of_step,
)

HERE = Path(__file__).parent


def export() -> None:
    """A very small model as StableHLO, with the numbers that it gives."""
    config = replace(
        TINY,
        embed_dim=8,
        vision=replace(TINY.vision, width=16, depth=1, num_heads=2),
        text=replace(TINY.text, width=16, depth=1, num_heads=2),
    )
    params = parameters(config)
    images, tokens = random_inputs(config)
    folder = HERE / "stablehlo"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        weights = Weights(config=config, params=params, preprocess=default_preprocess(config))
        stablehlo.write(weights, Path(scratch))
        for name in (stablehlo.IMAGE_NAME, stablehlo.TEXT_NAME, "model.safetensors"):
            (folder / name).write_bytes((Path(scratch) / name).read_bytes())
    numbers = our_outputs(config, params, images, tokens)
    np.savez(folder / "numbers.npz", images=images, tokens=tokens, **numbers)


if __name__ == "__main__":
    export()
    recipe = Recipe(model=TINY, objective=(GOLDEN_LOSS,), optim=OPTIM, steps=10, batch_size=16)
    program = Program(recipe, make_mesh(MeshConfig(), jax.devices()[:1]))
    after, metrics = program.step(program.init(parameters(TINY)), program.put(batch(TINY)))
    step = sums_of_step(*jax.device_get((after.params, metrics)))
    decoders = {name: parameter_tree(config) for name, config in DECODERS.items()}
    golden = {"parameter_tree": parameter_tree(), "decoder_trees": decoders, "step": step}
    for name, value in golden.items():
        (HERE / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
