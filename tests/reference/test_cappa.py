"""CapPa's decoder against a forward pass in torch, written here from the paper's description."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clip_jax.losses import CaptionConfig
from clip_jax.losses.objective import total
from clip_jax.models.cappa import CapPaConfig
from clip_jax.models.clip import CLIP
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import CAPTIONS, State, context, encode
from tests.conftest import CAPPA, batch, by_path, parameters

KEY = jax.random.key(0, impl="threefry2x32")
BOUND = 1e-5  # relative, of a loss or of the norm of a gradient


def torch_norm(x: torch.Tensor, params: dict[str, torch.Tensor], name: str, layer: Any = ...):
    weight = params[f"{name}/scale"][layer]
    bias = params[f"{name}/bias"][layer] if f"{name}/bias" in params else None
    return F.layer_norm(x, weight.shape, weight, bias, 1e-6)


def torch_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None):
    scores = torch.einsum("blnk,bmnk->bnlm", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return torch.einsum("bnlm,bmnk->blnk", scores.softmax(-1), v)


def torch_logits(
    params: dict[str, torch.Tensor],
    config: CapPaConfig,
    inputs: torch.Tensor,
    image: torch.Tensor,
    is_parallel: torch.Tensor,
) -> torch.Tensor:
    """Logits of the labels of `inputs`, in which the id after the last is the mask."""
    length, mask_id = inputs.shape[1], params["vocab_bias"].shape[0]
    inputs = torch.where(is_parallel[:, None], mask_id, inputs)
    causal = torch.tril(torch.ones(length, length, dtype=torch.bool))
    mask = causal | is_parallel[:, None, None]
    x = params["token_embedding"][inputs] + params["positional_embedding"][:length]
    for i in range(config.depth):
        weight = {
            name.removeprefix("transformer/layers/"): w[i]
            for name, w in params.items()
            if name.startswith("transformer/layers/")
        }
        y = torch_norm(x, weight, "ln_1")
        qkv = torch.einsum("bld,dsnk->sblnk", y, weight["attn/in_proj/kernel"])
        y = torch_attend(*qkv, mask)
        x = x + torch.einsum("blnk,nkd->bld", y, weight["attn/out_proj/kernel"])
        y = torch_norm(x, weight, "ln_2")
        q = torch.einsum("bld,dnk->blnk", y, weight["attn_cross/q/kernel"])
        kv = torch.einsum("bld,dsnk->sblnk", image, weight["attn_cross/kv/kernel"])
        y = torch_attend(q, *kv, None)
        x = x + torch.einsum("blnk,nkd->bld", y, weight["attn_cross/out_proj/kernel"])
        y = torch_norm(x, weight, "ln_3") @ weight["mlp/c_fc/kernel"]
        y = y + weight.get("mlp/c_fc/bias", 0)
        y = F.gelu(y, approximate="tanh") @ weight["mlp/c_proj/kernel"]
        x = x + y + weight.get("mlp/c_proj/bias", 0)
    return torch_norm(x, params, "ln_final") @ params["vocab_projection"] + params["vocab_bias"]


@pytest.mark.parametrize(
    ("parallel", "bias"), [(0.0, False), (0.5, False), (0.5, True), (1.0, False)]
)
def test_loss_and_gradients_are_torchs_in_both_modes_and_mixed(parallel, bias):
    config = replace(CAPPA, decoder=replace(CAPPA.decoder, parallel=parallel, bias=bias))
    model, data = CLIP(config), {**batch(config), "row": np.arange(16)}
    params = jax.tree.map(jnp.asarray, parameters(config))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, seen = model.encode_image_and_tokens(params, model.normalize(jnp.asarray(data["image"])))

    def loss(decoder: Any) -> jax.Array:
        x = context(model, mesh, State(0, params, None), params | {"decoder": decoder}, data, {})
        objective = (CaptionConfig(weight=1.0),)
        outputs, _ = encode(x, objective, key=KEY if parallel else None)
        return total(objective, replace(x, outputs=outputs))[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params["decoder"])
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, row), CAPTIONS) for row in range(16)]
    drawn = np.array([float(jax.random.uniform(key)) for key in keys])
    is_parallel = torch.from_numpy(drawn < parallel)
    assert bool(is_parallel.any()) == (parallel > 0)
    assert bool(is_parallel.all()) == (parallel == 1)
    weights = {
        name: torch.from_numpy(np.array(x)).requires_grad_()
        for name, x in by_path(params["decoder"]).items()
    }
    tokens = torch.from_numpy(np.array(data["text"])).long()
    image = torch.from_numpy(np.array(seen))
    logits = torch_logits(weights, config.decoder, tokens[:, :-1], image, is_parallel)
    labels = tokens[:, 1:]
    expected = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=config.text.tokenizer.pad_id
    )
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=BOUND)
    for name, x in by_path(gradients).items():
        theirs = weights[name].grad
        theirs = np.zeros(x.shape) if theirs is None else theirs.numpy()
        assert np.linalg.norm(x - theirs) <= BOUND * max(np.linalg.norm(theirs), 1e-3), name


def test_captions_alone_train_the_image_tower_and_the_decoder():
    """CapPa's own setting, without a contrastive loss."""
    model, data = CLIP(CAPPA), {**batch(CAPPA), "row": np.arange(16)}
    params = jax.tree.map(jnp.asarray, parameters(CAPPA))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def loss(params: Any) -> jax.Array:
        x = context(model, mesh, State(0, params, None), params, data, {})
        objective = (CaptionConfig(weight=1.0),)
        outputs, _ = encode(x, objective, key=KEY)
        return total(objective, replace(x, outputs=outputs))[0]

    trained = {
        name.split("/")[0]
        for name, x in by_path(jax.jit(jax.grad(loss))(params)).items()
        if x.any()
    }
    assert trained == {"visual", "decoder"}
