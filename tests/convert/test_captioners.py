"""CoCa and MaMMUT in open_clip's layout, without PyTorch: what is read, and what is refused.

tests/reference/test_captioners.py compares their numbers.
"""

import json
from dataclasses import replace

import pytest

from clip_jax.convert import open_clip
from clip_jax.convert.files import write_safetensors
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.verify import verify
from clip_jax.refused import Refused
from tests.conftest import COCA, MAMMUT
from tests.convert.conftest import random_weights

# With the whole vocabulary: another's padding, which the mean sees, open_clip would not make.
LAIONS = replace(
    MAMMUT,
    vision=replace(MAMMUT.vision, activation="gelu"),
    text=replace(MAMMUT.text, activation="gelu", vocab_size=49_408),
)


@pytest.mark.parametrize(
    ("to", "match"),
    [
        ("open-clip", "correct_class_mask"),
        ("hugging-face", "decoder"),
        ("openai", "decoder"),
        ("big-vision", "decoder"),
    ],
)
def test_a_format_says_what_it_cannot_express(tmp_path, to, match):
    with pytest.raises(Refused, match=match):
        write_weights(random_weights(COCA), tmp_path / "x", to)


def test_mammut_has_no_reference_implementation_to_verify_with(tmp_path):
    with pytest.raises(Refused, match="MaMMUT has no peer"):
        verify(random_weights(LAIONS), tmp_path, "open-clip")


def test_laions_configuration_is_read(tmp_path):
    """mammut_ViT-S-32 as LAION's repository has it."""
    settings = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8,
            "output_tokens": True, "pool_type": "avg_all", "final_ln_after_pool": True,
        },
        "text_cfg": {
            "context_length": 10, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 4,
            "output_tokens": True, "cross_attn_ratio": 2, "does_full_decoding": True,
            "has_mlp": False,
        },
        "custom_text": True,
    }  # fmt: skip
    tensors = open_clip.to_tensors(random_weights(LAIONS))
    write_safetensors(tmp_path / open_clip.WEIGHTS_NAME, tensors, {"format": "pt"})
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    config = read_weights(tmp_path).config
    assert config == replace(LAIONS, dtype=config.dtype)
