"""Fine-tuning a Hugging Face folder here is the same training as in PyTorch."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch
from transformers import SiglipConfig, SiglipModel

from clip_jax import sharding
from clip_jax.config import Config
from clip_jax.config_files import with_weights
from clip_jax.convert.fitting import starting_params
from clip_jax.convert.formats import read_weights
from clip_jax.convert.hugging_face import rows
from clip_jax.convert.state_dict import from_params
from clip_jax.errors import InputError
from clip_jax.losses import SigmoidConfig, SoftmaxConfig
from clip_jax.models.clip import CLIPConfig
from clip_jax.optim import OptimConfig, schedule
from clip_jax.step import Program

STEPS, BATCH, SIZE, LENGTH, WORDS = 20, 16, 32, 16, 500
OPTIM = OptimConfig(
    learning_rate=1e-3, warmup_steps=4, weight_decay=0.1, b2=0.98, eps=1e-6, clip_norm=1.0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A SigLIP that transformers has written, with random weights and its pooling attention."""
    torch.manual_seed(0)
    tower = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = {**tower, "image_size": SIZE, "patch_size": 8}
    text = {**tower, "vocab_size": WORDS, "max_position_embeddings": LENGTH}
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    with torch.no_grad():
        for x in model.parameters():  # zeros would hide branches and leave nothing to compare
            if not x.any():
                x.normal_(0, 0.1)
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)
    path = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(path)
    return path


def config_of(folder, **changes) -> Config:
    settings = {
        "init_from": str(folder),
        "init_architecture": True,
        "objective": (SigmoidConfig(),),
        "optim": OPTIM,
        "steps": STEPS,
        "batch_size": BATCH,
        "model": CLIPConfig(dtype="float32"),
    }
    return with_weights(Config(**settings | changes))


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        text = rng.integers(2, WORDS, (BATCH, LENGTH), dtype=np.int32)
        yield {"image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8), "text": text}


def train_there(model) -> list[float]:
    """Train with the loss of `SiglipModel`, AdamW and clipping."""
    groups = {0.0: [], OPTIM.weight_decay: []}
    for x in model.parameters():
        groups[0.0 if x.ndim < 2 else OPTIM.weight_decay].append(x)
    optimizer = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for decay, group in groups.items()],
        lr=OPTIM.learning_rate,
        betas=(OPTIM.b1, OPTIM.b2),
        eps=OPTIM.eps,
    )
    rate, losses = schedule(OPTIM, STEPS), []
    for step, batch in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(step))
        pixels = (torch.from_numpy(batch["image"]).float() / 255 - 0.5) / 0.5
        ids = torch.from_numpy(batch["text"]).long()
        loss = model(ids, pixels.permute(0, 3, 1, 2), return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_same_fine_tuning(folder):
    config = config_of(folder)
    assert config.model.init_logit_bias is not None
    program = Program(config.recipe, sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))
    state, ours = program.init(starting_params(read_weights(folder), config.model)), []
    for step, batch in enumerate(batches()):
        state, metrics = program.step(state, program.put(batch, step))
        ours.append(float(metrics["loss"]))
    trained = from_params(rows(config.model), jax.tree.map(np.asarray, state.params))

    model = SiglipModel.from_pretrained(folder)
    before = {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}
    theirs = train_there(model.train())
    assert np.abs(np.divide(ours, theirs) - 1).max() <= 1e-4
    assert abs(float(state.params["logit_bias"]) + 10) > 1e-3
    assert set(trained) == set(before)
    for name, expected in model.state_dict().items():
        start, a, b = (
            x.astype(np.float64) for x in (before[name], trained[name], expected.numpy())
        )
        # The exact gradient of a key's bias is zero, and Adam scales rounding to full steps.
        if name.endswith("k_proj.bias"):
            continue
        if name.endswith("in_proj_bias"):
            start, a, b = (np.delete(x, np.s_[64:128]) for x in (start, a, b))
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b), name
        # What was learned, too: the start alone would agree where the rate is small.
        assert np.linalg.norm(a - b) <= 0.05 * np.linalg.norm(b - start), name


def test_what_does_not_fit_a_siglip(folder, capsys):
    """A softmax loss begins without the bias; another context length is refused."""
    config = config_of(folder, objective=(SoftmaxConfig(),))
    assert config.model.init_logit_bias is None
    assert "logit_bias" not in starting_params(read_weights(folder), config.model)
    assert "its logit bias is left out, since the model has none" in capsys.readouterr().err
    text = dataclasses.replace(config.model.text, context_length=LENGTH - 4)
    match = (
        "context_length=12 does not fit .* depend on the padding .* padded to 16 tokens, .* Keep 16"
    )
    with pytest.raises(InputError, match=match):
        starting_params(read_weights(folder), dataclasses.replace(config.model, text=text))
