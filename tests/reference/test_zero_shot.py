"""Zero-shot logits of models converted from open_clip equal its own zero-shot classifier's."""

import json
import warnings

import jax
import numpy as np
import pytest
import torch

from clip_jax.evals import prompts
from clip_jax.evals.evaluator import encode_images, encode_texts
from clip_jax.evals.prompts import ensemble
from clip_jax.loading import load
from clip_jax.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peer's, about its own calls


def test_a_hundred_classes(open_clip, tmp_path):
    names = prompts.class_names("imagenet1k")[:100]
    templates = prompts.templates("cifar100")[:3]
    config = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {
            "context_length": 77, "vocab_size": 49_408, "width": 64, "heads": 2, "layers": 2
        },
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = open_clip.CLIP(**config).eval()
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(model.state_dict(), path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))

    images = np.random.default_rng(0).standard_normal((9, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        weights = open_clip.build_zero_shot_classifier(
            model, open_clip.get_tokenizer("ViT-B-32"), names,
            [lambda name, t=t: t.replace("{c}", name) for t in templates], device="cpu",
        )  # fmt: skip
        features = model.encode_image(torch.tensor(images).permute(0, 3, 1, 2), normalize=True)
        theirs = (100 * features @ weights).numpy()

    ours = load(tmp_path)
    mesh = make_mesh(MeshConfig(), jax.devices()[:4])
    rows = [prompts.fill(t, name) for name in names for t in templates]
    texts = encode_texts(ours.clip, ours.params, ours.tokenize(rows), mesh)
    logits = (
        100
        * encode_images(ours.clip, ours.params, images, mesh)
        @ ensemble(texts.reshape(100, 3, -1).swapaxes(0, 1)).T
    )
    assert np.ptp(theirs) > 1
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
