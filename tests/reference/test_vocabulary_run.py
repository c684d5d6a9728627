"""From end to end: a run with its own vocabulary trains, evaluates and is converted; the libraries'
own processors and models give the same probabilities for the same image and texts."""

import json
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, CLIPProcessor

from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.verify import BOUND, relative_difference
from clip_jax.inference.loading import load
from clip_jax.models.text import TokenizerConfig
from clip_jax.optim import OptimConfig
from clip_jax.train import train
from tests import vocabularies
from tests.conftest import tiny_digits

LABELS = ["a photo of 4", "the number seven", "UPPER Case, again", "größer"]


def probabilities(model, picture):
    images = model.encode_image(model.preprocess(picture))
    texts = model.encode_text(model.tokenize(LABELS, truncate=True))
    return model.probabilities(images, texts)


def test_exports_have_the_words_and_the_probabilities(open_clip, tmp_path):
    words, workdir = vocabularies.byte_fallback(tmp_path / "words.json"), tmp_path / "run"
    config = tiny_digits(steps=2, optim=OptimConfig(warmup_steps=1))
    tokenizer = TokenizerConfig(file=str(words), clean="lower", begin_id=2, end_id=1, pad_id=0)
    changes = {"vocab_size": 500, "pool": "eos", "eos_token_id": 1, "tokenizer": tokenizer}
    text = replace(config.model.text, **changes)
    evals = (replace(config.evals[0], max_prompts=1),)
    train(replace(config, evals=evals, model=replace(config.model, text=text)), workdir)
    words.unlink()  # the run has its own copy
    assert "zero_shot/seen/top5" in json.loads((workdir / "result.json").read_text())
    model = load(workdir)
    assert model.config.text.tokenizer.file == str(workdir / "tokenizer.json")
    size = model.config.vision.image_size  # so that no resizing differs
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    picture = Image.fromarray(pixels)
    ours = probabilities(model, picture)
    for to in ("clip-jax", "hugging-face", "open-clip"):
        done = convert(ConvertConfig(source=workdir, destination=tmp_path / to, to=to, verify=True))
        assert done.verification is not None
        assert done.verification.passed, to
        again = load(tmp_path / to)
        np.testing.assert_array_equal(again.tokenize(LABELS, True), model.tokenize(LABELS, True))
        np.testing.assert_allclose(probabilities(again, picture), ours, rtol=1e-5)

    processor = CLIPProcessor.from_pretrained(tmp_path / "hugging-face", local_files_only=True)
    model = AutoModel.from_pretrained(tmp_path / "hugging-face", local_files_only=True).eval()
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    inputs = processor(text=LABELS, images=picture, **options)
    with torch.no_grad():
        logits = model(inputs["input_ids"], inputs["pixel_values"]).logits_per_image
    assert relative_difference(logits.softmax(-1).numpy(), ours) <= BOUND

    folder = f"local-dir:{tmp_path / 'open-clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(folder)
    tokens = open_clip.get_tokenizer(folder)(LABELS)
    with torch.no_grad():
        images = model.eval().encode_image(preprocess(picture)[None], normalize=True)
        texts = model.encode_text(tokens, normalize=True)
        logits = model.logit_scale.exp() * images @ texts.T
    assert relative_difference(logits.softmax(-1).numpy(), ours) <= BOUND
