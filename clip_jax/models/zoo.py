"""Named architectures, as configurations.

OpenAI's names (`ViT-B/32`) are OpenAI's released models, with QuickGELU; open_clip's names
(`ViT-B-32`) are open_clip's architectures, with GELU unless the name says `quickgelu`. Both call
their ResNets `RN50`: here that is OpenAI's, `RN50-quickgelu` the same, and `RN50-gelu` open_clip's.
MetaCLIP 2's (`worldwide`) have its own names, SigLIP's open_clip's, MaMMUT's and CoCa's LAION's.
`ViT-{S-32,S-16,M-32,B-32,B-16-text-plus,L-14}-SigLIP` are LAION's, with the towers of CLIP.
Sources: CLIP paper, tables 19 and 20; big_vision; model configurations of open_clip, MetaCLIP and
LAION-AI/open_clip_mammut. MobileCLIP, PE core, EVA, ConvNeXt and the multilingual models have
open_clip's names; TIPSv2, AltCLIP and ChineseCLIP are those of Hugging Face. DINOv2 and DINOv3 are
released image towers (`dino.TOWERS`), here with a text tower of CLIP's for training one.
"""

import difflib
import functools
from dataclasses import replace
from typing import Any, cast

from clip_jax.errors import InputError
from clip_jax.models.bert import BertConfig
from clip_jax.models.clip import CLIPConfig, Text, Vision
from clip_jax.models.conv_stem import ConvStemConfig
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.decoder import CoCaConfig, MaMMUTConfig
from clip_jax.models.dino import TOWERS, DinoConfig
from clip_jax.models.images import IMAGENET_MEAN, IMAGENET_STD, INCEPTION_MEAN, INCEPTION_STD
from clip_jax.models.layers import Activation
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.rotary import RotaryConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.tips import TipsConfig, TipsTextConfig
from clip_jax.models.vit import ViTConfig


def _clip(
    embed_dim: int,
    vision: Vision,
    text: Text,
    activation: Activation = "gelu",
) -> CLIPConfig:
    if type(vision) in (ViTConfig, ConvStemConfig):
        vision = replace(vision, activation=activation)
    if type(text) is BertConfig:
        return CLIPConfig(embed_dim=embed_dim, vision=vision, text=text)
    return CLIPConfig(embed_dim=embed_dim, vision=vision, text=replace(text, activation=activation))


def _vit(
    patch: int,
    width: int,
    depth: int = 12,
    *,
    heads: int | None = None,
    size: int = 224,
    mlp: float = 4.0,
) -> ViTConfig:
    return ViTConfig(
        image_size=size,
        patch_size=patch,
        width=width,
        depth=depth,
        num_heads=heads or width // 64,
        mlp_ratio=mlp,
    )


def _resnet(layers: tuple[int, int, int, int], width: int, size: int) -> ResNetConfig:
    return ResNetConfig(image_size=size, layers=layers, width=width, num_heads=width * 32 // 64)


def _text(width: int, depth: int = 12) -> TextConfig:
    return TextConfig(width=width, depth=depth, num_heads=width // 64)


def _clipa(embed_dim: int, vision: ViTConfig, text: TextConfig) -> CLIPConfig:
    """CLIPA: mean pooling, no pre-norm; 32 tokens of BERT's vocabulary, not causal."""
    vision = replace(vision, pool="mean", pre_norm=False)
    text = replace(text, context_length=32, vocab_size=32_000, causal=False, pool="last")
    return _clip(embed_dim, vision, text)


_BASE: dict[str, Any] = {"width": 768, "depth": 12, "num_heads": 12}
_LARGE: dict[str, Any] = {"width": 1024, "depth": 24, "num_heads": 16}
_SO400M = {"width": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362}
_GIANT = {"width": 1536, "depth": 40, "num_heads": 16}


def _sizes(pattern: str, model: CLIPConfig, *sizes: int | None) -> dict[str, CLIPConfig]:
    """Return a model for several image sizes, named after them; None: its own size, no suffix."""
    models = {}
    for size in sizes:
        vision = replace(model.vision, image_size=size or model.vision.image_size)
        models[pattern.format(f"-{size}" if size else "")] = replace(model, vision=vision)
    return models


def _siglip(
    vision: dict[str, Any],
    patch: int,
    *,
    text: dict[str, Any] | None = None,
    length: int = 64,
    vocab: int = 32_000,
    projection: bool = True,
) -> CLIPConfig:
    """SigLIP: attention pooling, sigmoid loss with a bias, towers of the same width by default.

    Both towers have tanh GELU, with which big_vision trained all released weights; open_clip
    computes some of them with exact GELU.
    """
    image_tower = ViTConfig(
        patch_size=patch,
        pool="map",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        projection=False,
        activation="gelu_tanh",
        norm_epsilon=1e-6,
        **vision,
    )
    text_tower = TextConfig(
        context_length=length,
        vocab_size=vocab,
        causal=False,
        pool="last",
        projection=projection,
        projection_bias=projection,
        activation="gelu_tanh",
        norm_epsilon=1e-6,
        **(text or vision),
    )
    return CLIPConfig(
        embed_dim=image_tower.width,
        vision=image_tower,
        text=text_tower,
        init_logit_scale=10.0,
        init_logit_bias=-10.0,
        image_mean=INCEPTION_MEAN,
        image_std=INCEPTION_STD,
    )


def _worldwide(
    embed_dim: int,
    vision: ViTConfig,
    text: TextConfig,
    activation: Activation = "gelu",
    *,
    mt5: bool = False,
) -> CLIPConfig:
    """MetaCLIP 2: XLM-V's or mT5's vocabulary, pooled at the first end-of-text id."""
    vocab, eos = (250_000, 1) if mt5 else (901_629, 2)
    text = replace(text, vocab_size=vocab, pool="eos", eos_token_id=eos)
    return _clip(embed_dim, vision, text, activation)


def _coca(
    embed_dim: int, vision: ViTConfig, text: TextConfig, *, queries: bool = True
) -> CLIPConfig:
    """CoCa as trained with open_clip, with its error in the class token's mask."""
    vision = replace(vision, pool="queries" if queries else "class_token")
    text = replace(text, context_length=76, pool="class_token", correct_class_mask=False)
    decoder = CoCaConfig(depth=text.depth, num_heads=text.num_heads)
    return replace(_clip(embed_dim, vision, text), decoder=decoder)


def _mammut(vision: ViTConfig, text: TextConfig, first_mlp: bool) -> CLIPConfig:
    """MaMMUT as LAION trained it: both towers are pooled by the mean of all tokens."""
    vision = replace(vision, pool="mean_all")
    text = replace(text, pool="mean", causal=False, projection=False)
    return replace(_clip(text.width, vision, text), decoder=MaMMUTConfig(first_mlp=first_mlp))


def _naflex(model: CLIPConfig) -> CLIPConfig:
    """SigLIP 2 of native aspect ratios: 16 x 16 position embeddings, 256 patches by default."""
    vision = replace(cast(ViTConfig, model.vision), image_size=256, max_patches=256)
    return replace(model, vision=vision)


def _unit_pixels(model: CLIPConfig) -> CLIPConfig:
    """MobileCLIP-B and TIPSv2: pixels in [0, 1], not normalised."""
    return replace(model, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)


def _pe_core(
    patch: int,
    size: int,
    width: int,
    depth: int,
    heads: int,
    text: TextConfig,
    *,
    mlp: float = 4.0,
    class_token: bool = True,
    length: int = 32,
) -> CLIPConfig:
    """PE core, with a bias in the projection as in timm; the original has none."""
    vision = RotaryConfig(
        image_size=size,
        patch_size=patch,
        width=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp,
        class_token=class_token,
        reference_grid=size // patch,
        projection_bias=True,
    )
    model = _clip(text.width, vision, replace(text, context_length=length))
    return replace(model, image_mean=INCEPTION_MEAN, image_std=INCEPTION_STD)


def _eva(embed_dim: int, text: TextConfig, **options: Any) -> CLIPConfig:
    """EVA-CLIP: patches and projection with a bias, attention without that of the keys."""
    vision = RotaryConfig(
        pool="class_token",
        pre_norm=False,
        patch_bias=True,
        projection_bias=True,
        norm_epsilon=1e-6,
        key_bias=False,
        reference_grid=16,
        **options,
    )
    return _clip(embed_dim, vision, text)


_EVA02 = dict[str, Any](rotary="rows", activation="swiglu", inner_norm=True, mlp_ratio=8 / 3)


def _convnext(embed_dim: int, size: int, layers: Any, width: int, text: TextConfig, **options: Any):
    vision = ConvNeXtConfig(image_size=size, layers=layers, width=width, **options)
    return _clip(embed_dim, vision, text)


def _tips(width: int, depth: int, heads: int, text_depth: int = 12, mlp: float = 4.0):
    sizes: dict[str, Any] = {"width": width, "num_heads": heads, "mlp_ratio": mlp}
    vision, text = TipsConfig(depth=depth, **sizes), TipsTextConfig(depth=text_depth, **sizes)
    return _unit_pixels(CLIPConfig(embed_dim=width, vision=vision, text=text))


def _dino(vision: DinoConfig) -> CLIPConfig:
    """DINO's image tower, which has no projection, and the text tower of CLIP's L, or for wide
    towers one of the size of dino.txt's (arXiv:2412.16334)."""
    text = _T768 if vision.width < 1024 else _text(1280, 24)
    model = _clip(vision.width, vision, text)
    return replace(model, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)


_GEMMA = 256_000  # vocabulary size of SigLIP 2
_B32, _B16 = _vit(32, 768), _vit(16, 768)
_L14, _L16 = _vit(14, 1024, 24), _vit(16, 1024, 24)
_H14, _H16 = _vit(14, 1280, 32, heads=16), _vit(16, 1280, 32, heads=16)
_g14 = _vit(14, 1408, 40, heads=16, mlp=4.3637)
_bigG14 = _vit(14, 1664, 48, heads=16, mlp=4.9231)
_T512, _T640, _T768, _T1024, _T1280 = (
    _text(512), _text(640), _text(768), _text(1024, 24), _text(1280, 32),
)  # fmt: skip

_EVA01: dict[str, Any] = {
    "rotary": "none", "patch_size": 14, "width": 1408, "depth": 40, "num_heads": 16,
    "mlp_ratio": 6144 / 1408,
}  # fmt: skip
_EVA02_E: dict[str, Any] = {
    "rotary": "none", "patch_size": 14, "width": 1792, "depth": 64, "num_heads": 16,
    "mlp_ratio": 15360 / 1792, "norm": "branch",
}  # fmt: skip
_CONVNEXT = (3, 3, 27, 3)
_CHINESE: dict[str, Any] = {
    "context_length": 52, "vocab_size": 21_128, "num_positions": 512, "first_position": 0,
    "token_types": 2, "head": "linear", "pool": "first", "norm_epsilon": 1e-12,
}  # fmt: skip

ARCHITECTURES: dict[str, CLIPConfig] = {
    "ViT-B/32": _clip(512, _B32, _T512, "quick_gelu"),
    "ViT-B/16": _clip(512, _B16, _T512, "quick_gelu"),
    "ViT-L/14": _clip(768, _L14, _T768, "quick_gelu"),
    "ViT-L/14@336px": _clip(768, replace(_L14, image_size=336), _T768, "quick_gelu"),
    "ViT-S-32-alt": _clip(256, _vit(32, 384), _text(256, 10)),
    "ViT-S-32": _clip(384, _vit(32, 384), _text(384)),
    "ViT-M-32-alt": _clip(384, _vit(32, 512), _text(384)),
    "ViT-M-32": _clip(512, _vit(32, 512), _T512),
    "ViT-S-16-alt": _clip(256, _vit(16, 384), _text(256, 10)),
    "ViT-S-16": _clip(384, _vit(16, 384), _text(384)),
    "ViT-M-16-alt": _clip(384, replace(_vit(16, 512), layer_scale=1e-4), _text(384)),
    "ViT-M-16": _clip(512, _vit(16, 512), _T512),
    **_sizes("ViT-B-32{}", _clip(512, _B32, _T512), None, 256),
    "ViT-B-32-quickgelu": _clip(512, _B32, _T512, "quick_gelu"),
    "ViT-B-32-plus-256": _clip(640, _vit(32, 896, size=256), _T640),
    "ViT-B-16": _clip(512, _B16, _T512),
    "ViT-B-16-quickgelu": _clip(512, _B16, _T512, "quick_gelu"),
    "ViT-B-16-text-plus": _clip(768, _B16, _T768),
    **_sizes("ViT-B-16-plus{}", _clip(640, _vit(16, 896), _T640), None, 240),
    **_sizes("ViT-B-16-SigLIP{}", _siglip(_BASE, 16), None, 256, 384, 512),
    **_sizes("ViT-B-16-SigLIP-i18n{}", _siglip(_BASE, 16, vocab=250_000), 256),
    **_sizes("ViT-B-32-SigLIP2{}", _siglip(_BASE, 32, vocab=_GEMMA), 256),
    **_sizes("ViT-B-16-SigLIP2{}", _siglip(_BASE, 16, vocab=_GEMMA), None, 256, 384, 512),
    **_sizes("ViT-L-16{}", _clip(768, _L16, _T768), None, 320),
    **_sizes("ViT-L-16-SigLIP{}", _siglip(_LARGE, 16), 256, 384),
    **_sizes("ViT-L-16-SigLIP2{}", _siglip(_LARGE, 16, vocab=_GEMMA), 256, 384, 512),
    **_sizes("ViT-L-14{}", _clip(768, _L14, _T768), None, 280, 336),
    **_sizes("ViT-L-14{}-quickgelu", _clip(768, _L14, _T768, "quick_gelu"), None, 336),
    **_sizes("ViT-L-14-CLIPA{}", _clipa(768, _L14, _T768), None, 336),
    "ViT-SO400M-14-SigLIP": _siglip(_SO400M, 14, length=16),
    **_sizes("ViT-SO400M-14-SigLIP{}", _siglip(_SO400M, 14), 378, 384),
    **_sizes(
        "ViT-SO400M-16-SigLIP-i18n{}", _siglip(_SO400M, 16, vocab=250_000, projection=False), 256
    ),
    **_sizes("ViT-SO400M-14-SigLIP2{}", _siglip(_SO400M, 14, vocab=_GEMMA), None, 378, 384),
    **_sizes("ViT-SO400M-16-SigLIP2{}", _siglip(_SO400M, 16, vocab=_GEMMA), 256, 384, 512),
    "ViT-B-16-SigLIP2-naflex": _naflex(_siglip(_BASE, 16, vocab=_GEMMA)),
    "ViT-SO400M-16-SigLIP2-naflex": _naflex(_siglip(_SO400M, 16, vocab=_GEMMA)),
    **_sizes(
        "ViT-gopt-16-SigLIP2{}", _siglip(_GIANT, 16, text=_SO400M, vocab=_GEMMA), 256, 384
    ),
    "ViT-H-16": _clip(1024, _H16, _T1024),
    **_sizes("ViT-H-14{}", _clip(1024, _H14, _T1024), None, 336),
    **_sizes("ViT-H-14{}-quickgelu", _clip(1024, _H14, _T1024, "quick_gelu"), None, 378),
    **_sizes("ViT-H-14-CLIPA{}", _clipa(1024, _H14, _T1024), None, 336),
    **_sizes("ViT-g-14{}", _clip(1024, _g14, _T1024), None, 336),
    **_sizes("ViT-bigG-14{}", _clip(1280, _bigG14, _T1280), None, 336),
    **_sizes("ViT-bigG-14-CLIPA{}", _clipa(1280, _bigG14, _T1280), None, 336),
    "ViT-e-14": _clip(1280, _vit(14, 1792, 56, heads=16, mlp=8.5715), _text(1280, 36)),
    **_sizes("ViT-S-16{}-worldwide", _worldwide(384, _vit(16, 384), _text(384)), None, 384),
    "ViT-S-16-mT5-worldwide": _worldwide(384, _vit(16, 384), _text(384), mt5=True),
    **_sizes("ViT-M-16{}-worldwide", _worldwide(512, _vit(16, 512), _T512), None, 384),
    "ViT-M-16-mT5-worldwide": _worldwide(512, _vit(16, 512), _T512, mt5=True),
    **_sizes("ViT-B-32{}-worldwide", _worldwide(512, _B32, _T512), None, 384),
    "ViT-B-32-mT5-worldwide": _worldwide(512, _B32, _T512, mt5=True),
    **_sizes("ViT-B-16{}-worldwide", _worldwide(512, _B16, _T512), None, 384),
    "ViT-L-14-worldwide": _worldwide(768, _L14, _T768),
    "ViT-H-14-quickgelu-worldwide": _worldwide(1024, _H14, _T1024, "quick_gelu"),
    **_sizes("ViT-H-14{}-worldwide", _worldwide(1024, _H14, _T1024), 378),
    **_sizes("ViT-bigG-14{}-worldwide", _worldwide(1280, _bigG14, _T1280), None, 378),
    **dict.fromkeys(
        ("MobileCLIP-B", "MobileCLIP2-B"), _unit_pixels(_clip(512, ConvStemConfig(), _T512))
    ),
    "MobileCLIP2-L-14": _clip(
        768, replace(_L14, projection_bias=True), replace(_T768, causal=False)
    ),
    "PE-Core-T-16-384": _pe_core(16, 384, 192, 12, 3, _T512),
    "PE-Core-S-16-384": _pe_core(16, 384, 384, 12, 6, _T512),
    "PE-Core-B-16": _pe_core(16, 224, 768, 12, 12, _T1024),
    "PE-Core-L-14-336": _pe_core(14, 336, 1024, 24, 16, _T1024),
    "PE-Core-bigG-14-448": _pe_core(
        14, 448, 1536, 50, 16, _text(1280, 24), mlp=8960 / 1536, class_token=False, length=72
    ),
    "EVA01-g-14": _eva(1024, _T768, **_EVA01),
    "EVA01-g-14-plus": _eva(1024, _T1024, **_EVA01),
    "EVA02-B-16": _eva(512, _T512, patch_size=16, **_BASE, **_EVA02),
    **_sizes("EVA02-L-14{}", _eva(768, _T768, patch_size=14, **_LARGE, **_EVA02), None, 336),
    "EVA02-E-14": _eva(1024, _T1024, **_EVA02_E),
    "EVA02-E-14-plus": _eva(1024, _T1280, **_EVA02_E),
    "convnext_tiny": _convnext(1024, 224, (3, 3, 9, 3), 96, _T512),
    "convnext_small": _convnext(512, 224, _CONVNEXT, 96, _T512),
    "convnext_base": _convnext(512, 224, _CONVNEXT, 128, _T512),
    "convnext_base_w": _convnext(640, 256, _CONVNEXT, 128, _T640),
    "convnext_base_w_320": _convnext(640, 320, _CONVNEXT, 128, _T640),
    "convnext_large": _convnext(768, 224, _CONVNEXT, 192, _T768),
    "convnext_large_d": _convnext(768, 256, _CONVNEXT, 192, _text(768, 16), head="mlp"),
    "convnext_large_d_320": _convnext(768, 320, _CONVNEXT, 192, _text(768, 16), head="mlp"),
    "convnext_xlarge": _convnext(1024, 256, _CONVNEXT, 256, _text(1024, 20)),
    "convnext_xxlarge": _convnext(1024, 256, (3, 4, 30, 3), 384, _T1024, norm_epsilon=1e-5),
    "convnext_xxlarge_320": _convnext(1024, 320, (3, 4, 30, 3), 384, _T1024, norm_epsilon=1e-5),
    "roberta-ViT-B-32": _clip(512, _B32, BertConfig(vocab_size=50_265), "quick_gelu"),
    "xlm-roberta-base-ViT-B-32": _clip(512, _B32, BertConfig()),
    "xlm-roberta-large-ViT-H-14": _clip(1024, _H14, BertConfig(**_LARGE)),
    "AltCLIP": _clip(768, _L14, BertConfig(head="norm", pool="first", **_LARGE), "quick_gelu"),
    "ChineseCLIP-ViT-B-16": _clip(512, _B16, BertConfig(**_CHINESE), "quick_gelu"),
    **_sizes(
        "ChineseCLIP-ViT-L-14{}", _clip(768, _L14, BertConfig(**_CHINESE), "quick_gelu"), None, 336
    ),
    "ChineseCLIP-ViT-H-14": _clip(1024, _H14, BertConfig(**_CHINESE | _LARGE), "quick_gelu"),
    "TIPSv2-B-14": _tips(768, 12, 12),
    "TIPSv2-L-14": _tips(1024, 24, 16),
    "TIPSv2-SO-14": _tips(1152, 27, 16, 27, 4304 / 1152),
    **{name: _dino(tower) for name, tower in TOWERS.items()},
    "coca_base": _coca(
        512, _vit(18, 768, size=288), replace(_T768, vocab_size=64_000), queries=False
    ),
}  # fmt: skip

# The grid of arXiv:2506.04598; its CLIP of B/16 with the wider text tower is ViT-B-16-text-plus.
for _patch in (14, 16, 32):
    for _size, _width, _depth, _heads, _words, _first_mlp in (
        ("S", 384, 12, 6, _text(384), False),
        ("M", 512, 12, 8, _T512, False),
        ("B", 768, 12, 12, _T768 if _patch == 16 else _T512, _patch == 16),
        ("L", 1024, 24, 16, _T768, True),
        ("H", 1280, 32, 16, _T1024, True),
    ):
        _tower = _vit(_patch, _width, _depth, heads=_heads)
        _name = f"ViT-{_size}-{_patch}"
        ARCHITECTURES.setdefault(_name, _clip(_words.width, _tower, _words))
        ARCHITECTURES[f"mammut_{_name}"] = _mammut(_tower, _words, _first_mlp)
        ARCHITECTURES[f"coca_{_name}"] = _coca(_words.width, _tower, _words)
for _name in ("S-32", "S-16", "M-32", "B-32", "B-16-text-plus", "L-14"):  # CLIP, sigmoid loss
    ARCHITECTURES[f"ViT-{_name}-SigLIP"] = replace(
        ARCHITECTURES[f"ViT-{_name}"], init_logit_scale=10.0, init_logit_bias=-10.0
    )

_RESNETS = {
    "RN50": (1024, _resnet((3, 4, 6, 3), 64, 224), _T512),
    "RN101": (512, _resnet((3, 4, 23, 3), 64, 224), _T512),
    "RN50x4": (640, _resnet((4, 6, 10, 6), 80, 288), _T640),
    "RN50x16": (768, _resnet((6, 8, 18, 8), 96, 384), _T768),
    "RN50x64": (1024, _resnet((3, 15, 36, 10), 128, 448), _text(1024, 12)),
}
for _name, _parts in _RESNETS.items():
    ARCHITECTURES[_name] = _clip(*_parts, "quick_gelu")
    ARCHITECTURES[f"{_name}-quickgelu"] = ARCHITECTURES[_name]
    ARCHITECTURES[f"{_name}-gelu"] = _clip(*_parts)


def available_models() -> list[str]:
    """List the names of known architectures; OpenAI's names mean OpenAI's models.

    They are architectures, which `create_model` initialises at random. For trained weights, see
    `load`.

    >>> import clip_jax
    >>> clip_jax.available_models()[:3]
    ['ViT-B/32', 'ViT-B/16', 'ViT-L/14']
    """
    return list(ARCHITECTURES)


def get(name: str) -> CLIPConfig:
    """Return an architecture by name. Raises InputError, which lists similar names."""
    if name not in ARCHITECTURES:
        close = difflib.get_close_matches(name, ARCHITECTURES, n=5, cutoff=0.3)
        raise InputError(
            f"no architecture {name!r}; did you mean one of {close or [*ARCHITECTURES]}?"
        )
    return ARCHITECTURES[name]


@functools.cache
def name_of(config: CLIPConfig) -> str:
    """Return the name of an architecture here, or else a description of its size."""

    def shape(c: CLIPConfig) -> CLIPConfig:
        plain = {name: getattr(CLIPConfig, name) for name in ("remat", "unroll", "attention")}
        return replace(c, dtype="bfloat16", init_logit_scale=1.0, **plain)

    for name, published in ARCHITECTURES.items():
        if shape(published) == shape(config):
            return name
    return f"{config.vision.short_name}-{config.text.short_name}"
