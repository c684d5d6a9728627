"""Text towers for longer texts: Long-CLIP's rule, and what its exports compute."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch

from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.weights import Weights, with_context
from clip_jax.export import ExportConfig, export
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP, l2_normalize
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from tests.conftest import COCA, FAMILIES
from tests.reference.parity import random_weights

SMALL = replace(
    zoo.get("ViT-B-32"),
    embed_dim=48,
    vision=ViTConfig(image_size=32, patch_size=8, width=64, depth=2, num_heads=1),
    text=TextConfig(width=64, depth=2, num_heads=1),
    dtype="float32",
)


def long_clip(table: torch.Tensor, kept: int, times: int) -> torch.Tensor:
    """Section 3.1 of the paper, a row at a time: after those kept, each row is followed by steps
    to the next one, and the last row by as many in the direction of the step before."""
    rows = [*table[:kept]]
    for row, following in zip(table[kept:-1], table[kept + 1 :], strict=True):
        rows += [torch.lerp(row, following, i / times) for i in range(times)]
    step = (table[-1] - table[-2]) / times
    rows += [table[-1] + i * step for i in range(times)]
    return torch.stack(rows)


@pytest.mark.parametrize(("kept", "times", "length"), [(20, 4, 248), (0, 2, 154), (5, 3, 221)])
def test_positions_are_those_of_the_published_rule(kept, times, length):
    weights = random_weights(SMALL)
    table = weights.params["text"]["positional_embedding"]
    longer = with_context(weights, length, kept)
    got = longer.params["text"]["positional_embedding"]
    expected = long_clip(torch.from_numpy(table), kept, times)
    assert got.shape == (length, 64)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(got[: kept + 1], table[: kept + 1])
    record = (longer.config.text.kept_positions, longer.config.text.stretched_from)
    assert record == (kept, 77)


def texts(config: TextConfig, length: int) -> np.ndarray:
    """Token ids of three texts of so many tokens, begin and end of text included."""
    ids = np.full((3, config.context_length), config.tokenizer.pad_id)
    words = np.random.default_rng(length).integers(1, config.end_of_text_id - 1, (3, length))
    words[:, -1] = config.end_of_text_id
    ids[:, :length] = words
    return ids


def embeddings(weights: Weights, length: int) -> np.ndarray:
    clip = CLIP(replace(weights.config, dtype="float32"))
    ids = texts(weights.config.text, length)
    return np.asarray(l2_normalize(jax.jit(clip.encode_text)(weights.params, ids)))


# CLIP, also with a class token behind the text (CoCa); BERT and TIPSv2, which mask the padding and
# have all positions already; 0: their promise ends with their own context.
@pytest.mark.parametrize(
    ("config", "length", "kept", "promised"),
    [
        (SMALL, 248, 20, 21),
        (SMALL, 248, 0, 1),
        (COCA, 16, 4, 5),
        (FAMILIES["xlm_roberta"], 12, 20, 10),
        (FAMILIES["tips"], 16, 20, 10),
    ],
    ids=["clip", "interpolated", "coca", "bert", "tips"],
)
def test_short_texts_keep_their_embeddings(config, length, kept, promised):
    """The promise is for texts whose tokens are at positions that were kept, and for that of the
    first position after them. A longer text sees other positions, and so it changes."""
    weights = random_weights(config)
    longer = with_context(weights, length, kept)
    for tokens in sorted({1, (promised + 1) // 2, promised}):
        before, after = embeddings(weights, tokens), embeddings(longer, tokens)
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)
    if promised < config.text.context_length:
        before, after = embeddings(weights, promised + 1), embeddings(longer, promised + 1)
        assert np.abs(after - before).max() > 1e-4


@pytest.mark.parametrize("to", ["hugging-face", "open-clip"])
def test_a_longer_model_is_verified_in_other_formats(to, tmp_path):
    write_weights(random_weights(SMALL), tmp_path / "short", "clip-jax")
    settings = ConvertConfig(
        source=tmp_path / "short",
        destination=tmp_path / "long",
        to=to,
        context_length=248,
        verify=True,
    )
    verification = convert(settings).verification
    assert verification is not None
    assert verification.passed
    assert read_weights(tmp_path / "long").config.text.context_length == 248
    assert "| text_positions_stretched_from | 77 |" in (tmp_path / "long/README.md").read_text()


def test_a_longer_model_is_exported_to_onnx(tmp_path):
    weights = with_context(random_weights(SMALL), 248)
    write_weights(weights, tmp_path / "long", "clip-jax")
    settings = ExportConfig(
        model=tmp_path / "long", output=tmp_path / "onnx", format="onnx", verify=True
    )
    verification = export(settings)
    assert verification is not None
    assert verification.passed
