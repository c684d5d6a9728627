"""Ranges of the sizes of models."""

import dataclasses
import typing

import pytest

from clip_jax.data.images import Preprocess
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig, Text, Vision
from clip_jax.models.decoders import DecoderConfig
from clip_jax.models.lora import LoRAConfig
from clip_jax.models.text import TokenizerConfig

KINDS = (
    CLIPConfig,
    Preprocess,
    LoRAConfig,
    TokenizerConfig,
    *typing.get_args(Vision),
    *typing.get_args(Text),
    *typing.get_args(DecoderConfig),
)
INTEGERS = [
    (kind, name)
    for kind in KINDS
    for name, hint in typing.get_type_hints(kind).items()
    if int in (hint, *typing.get_args(hint)) and name in kind.__dataclass_fields__
]


@pytest.mark.parametrize("value", [1 << 31, 1 << 62])
@pytest.mark.parametrize(("kind", "name"), INTEGERS)
def test_every_size_has_a_largest_value(kind, name, value):
    """Without one, a file's size would exhaust memory before its weights are compared with it."""
    default = getattr(kind(), name)
    wrong = (value,) * len(default) if isinstance(default, tuple) else value
    with pytest.raises(InputError, match=rf"{name}=.* must be at least .* and at most \d+\.$"):
        dataclasses.replace(kind(), **{name: wrong})
