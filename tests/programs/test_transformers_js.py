"""transformers.js, in Node, gives the model's numbers from an exported folder."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax.convert.formats import read_weights
from clip_jax.convert.verify import our_outputs, random_inputs, relative_difference
from clip_jax.export.onnx import write
from clip_jax.export.patches import to_arrays
from clip_jax.inference.loading import Model, unit
from clip_jax.inference.predict import embed_labels
from clip_jax.models.images import concatenate
from tests.export.conftest import Family, families  # noqa: F401 (a fixture)


def run(folder: Path, kind: str, inputs: dict) -> Any:
    """Run the script on inputs; return what it prints."""
    (folder / "inputs.json").write_text(json.dumps(inputs))
    program = Path(__file__).with_name("transformers.cjs")
    command = ["node", program, folder / "exported", folder / "inputs.json", kind]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def bundled() -> Family:
    weights = read_weights("icons")
    params = jax.tree.map(np.float32, weights.params)
    images, tokens = random_inputs(weights.config)
    ours = our_outputs(weights.config, params, images, tokens)
    return Family(replace(weights, params=params), images, tokens, ours)


@pytest.mark.parametrize("name", ["clip", "resnet", "siglip", "coca_wrong_mask", "mammut", "icons"])
def test_transformers_js_gives_the_models_numbers(tmp_path, families, name):  # noqa: F811
    family = bundled() if name == "icons" else families(name)
    weights, images, tokens = family.weights, family.images, family.tokens
    write(weights, tmp_path / "exported")
    size = weights.config.vision.image_size
    gradient = np.linspace(0, 255, 60, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(gradient, gradient[:40, None], gradient[7]), axis=2)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    labels, template = ["Cat!", "snake_case dog", "it's 7 O'Clock", "a house"], "A photo of: {}."
    given = {
        "pixels": images.transpose(0, 3, 1, 2).ravel().tolist(),
        "shape": [len(images), 3, size, size],
        "ids": tokens.ravel().tolist(),
        "ids_shape": list(tokens.shape),
        "image": str(tmp_path / "picture.png"),
        "labels": labels,
        "template": template,
    }
    theirs = run(tmp_path, "siglip" if name == "siglip" else "clip", given)
    for key in ("image_features", "text_features", "logits"):
        assert relative_difference(np.array(theirs[key]), family.ours[key].ravel()) <= 1e-4
    model = Model(weights.config, weights.params, weights.preprocess)
    features = unit(model.encode_image(model.preprocess([picture])))
    if name == "siglip":
        classes = embed_labels(model, labels, template)
        logits = features @ classes.T * np.exp(weights.params["logit_scale"])
        expected = 1 / (1 + np.exp(-logits - weights.params["logit_bias"]))[0]
    else:
        expected = model.probabilities(features, embed_labels(model, labels, template))[0]
    scores = {x["label"]: x["score"] for x in theirs["found"]}
    assert theirs["found"][0]["label"] == labels[int(np.argmax(expected))]
    np.testing.assert_allclose([scores[label] for label in labels], expected, rtol=0, atol=0.02)


def test_transformers_js_runs_naflex_models_at_two_lengths_in_turn(tmp_path, families):  # noqa: F811
    """Batches of pictures of mixed shapes, from our preprocessing at each length."""
    family = families("naflex")
    config, params = family.weights.config, family.weights.params
    write(family.weights, tmp_path / "exported")
    rng = np.random.default_rng(0)
    batches, expected = [], []
    for max_patches, shapes in ((24, [(90, 30), (16, 200)]), (12, [(40, 50), (7, 7), (1, 60)])):
        how = replace(family.weights.preprocess, max_patches=max_patches)
        pictures = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
        images = how.normalize(concatenate([how.batch(picture) for picture in pictures]))
        arrays = to_arrays(images)
        batches.append(
            {
                "pixels": arrays["pixel_values"].ravel().tolist(),
                "shape": arrays["pixel_values"].shape,
                "mask": arrays["pixel_attention_mask"].ravel().tolist(),
                "grid": arrays["spatial_shapes"].ravel().tolist(),
            }
        )
        expected.append(our_outputs(config, params, images, family.tokens))
    ids = {"ids": family.tokens.ravel().tolist(), "ids_shape": family.tokens.shape}
    theirs = run(tmp_path, "siglip2", {"batches": batches[::-1] + batches, **ids})
    for outputs, ours in zip(theirs, expected[::-1] + expected, strict=True):
        for key, values in outputs.items():
            assert relative_difference(np.array(values), ours[key].ravel()) <= 1e-5
