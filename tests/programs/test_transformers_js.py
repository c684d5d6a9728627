"""transformers.js, in Node, gives the model's numbers from an exported folder."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_jax.convert.verify import relative_difference
from clip_jax.export.onnx import write
from clip_jax.inference.loading import Model, unit
from clip_jax.inference.predict import embed_labels
from tests.export.conftest import families  # noqa: F401 (a fixture)


@pytest.mark.parametrize("name", ["clip", "resnet", "siglip", "coca_wrong_mask", "mammut"])
def test_transformers_js_gives_the_models_numbers(tmp_path, families, name):  # noqa: F811
    family = families(name)
    weights, images, tokens = family.weights, family.images, family.tokens
    write(weights, tmp_path / "exported")
    size = weights.config.vision.image_size
    gradient = np.linspace(0, 255, 60, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(gradient, gradient[:40, None], gradient[7]), axis=2)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    labels, template = ["Cat!", "snake_case dog", "it's 7 O'Clock", "a house"], "A photo of: {}."
    given = {
        "pixels": images.transpose(0, 3, 1, 2).ravel().tolist(), "shape": [3, 3, size, size],
        "ids": tokens.ravel().tolist(), "ids_shape": list(tokens.shape),
        "image": str(tmp_path / "picture.png"), "labels": labels, "template": template,
    }  # fmt: skip
    (tmp_path / "inputs.json").write_text(json.dumps(given))
    kind = "siglip" if name == "siglip" else "clip"
    program = Path(__file__).with_name("transformers.cjs")
    command = ["node", program, tmp_path / "exported", tmp_path / "inputs.json", kind]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
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
