"""Averages of models in a bucket, one of which is a run with adapters."""

import json

import numpy as np

from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.state_dict import flatten
from clip_jax.inference.average import AverageConfig, average
from clip_jax.models.lora import LoRAConfig
from clip_jax.storage import files
from tests.convert.conftest import make_weights, write_lora_run
from tests.evals.conftest import png


def test_averages_in_a_bucket(gs, tmp_path):
    """Adapters are merged first: the average of base and run is halfway to the merged weights."""
    base, there, soup, curve = (
        files.as_path(f"{gs.url}/{name}") for name in ("base", "run", "soup", "curve")
    )
    write_weights(make_weights("vit"), base, "hugging-face")
    run = write_lora_run(tmp_path / "run", base, LoRAConfig(rank=2))
    for file in run.rglob("*"):
        if file.is_file():
            (there / str(file.relative_to(run))).write_bytes(file.read_bytes())
    average(AverageConfig(models=(base, there), output=soup))
    merged, start = (flatten(read_weights(path).params) for path in (there, base))
    half = flatten(read_weights(soup).params)
    assert any((merged[name] != x).any() for name, x in start.items())
    for name, x in merged.items():
        np.testing.assert_array_equal(
            half[name], np.float32(0.5) * start[name] + np.float32(0.5) * x
        )
    for name, level in (("dark", 20), ("light", 220)):
        pixels = np.full((16, 16, 3), level, np.uint8)
        files.write_whole(f"{gs.url}/set/{name}/0.png", png(pixels))
    data = (f"folder:{gs.url}/set",)
    config = AverageConfig(models=(there, soup), output=curve, dataset=data, curve=(0.0, 1.0))
    result = average(config)
    assert result["metric"] == "set/acc1"
    assert [row["alpha"] for row in json.loads((curve / "curve.json").read_text())] == [0, 1]
    assert (curve / "curve.png").read_bytes().startswith(b"\x89PNG")
