"""`clip-jax predict --caption`."""

import json

import numpy as np
from PIL import Image

from clip_jax.cli.commands import main
from clip_jax.inference.loading import load
from tests.conftest import COCA, batch, write_tiny_model


def test_a_model_with_a_decoder_writes_captions(tmp_path, capsys):
    """The default length is cut to the model's positions. A longer one is invalid, as is a model
    without a decoder."""
    coca, photos = tmp_path / "coca", [tmp_path / "0.png", tmp_path / "1.png"]
    write_tiny_model(coca, config=COCA)
    for path, pixels in zip(photos, batch(COCA)["image"], strict=False):
        Image.fromarray(pixels).save(path)
    captions = ["--images", *map(str, photos), "--caption"]
    assert main(["predict", str(coca), *captions, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    model = load(coca)
    images = np.concatenate([model.image_preprocess.batch(photo) for photo in photos])
    assert [x["caption"] for x in results] == model.caption(images)
    assert main(["predict", str(coca), *captions, "--generation.max-length", "11"]) == 2
    assert "text.context_length=10" in capsys.readouterr().err
    write_tiny_model(tmp_path / "model")
    assert main(["predict", str(tmp_path / "model"), *captions]) == 2
    assert "no decoder" in capsys.readouterr().err
