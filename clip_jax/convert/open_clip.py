"""open_clip's format: OpenAI's names with more options, beside an `open_clip_config.json`."""

import functools
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_jax.convert import bert, openai, timm, verify
from clip_jax.convert.open_clip_config import (
    CONFIG_NAME,
    check_tokenizer,
    is_custom,
    model_cfg,
    preprocess_cfg,
    read_config,
    write_tokenizer,
)
from clip_jax.convert.settings import write_json
from clip_jax.convert.state_dict import TORCH, Convention, Row, from_params, table, to_params
from clip_jax.convert.target import Assumptions, Inexpressible, Target, check_assumptions
from clip_jax.convert.tensor_files import Tensors, write_safetensors
from clip_jax.convert.weights import DType, Weights, cast
from clip_jax.data.tokenizers.clip_bpe import FULL_VOCAB_SIZE
from clip_jax.errors import InputError
from clip_jax.models.bert import BertConfig
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.decoder import CoCaConfig, DecoderConfig, MaMMUTConfig
from clip_jax.models.images import Patches
from clip_jax.models.layers import Activation
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

WEIGHTS_NAME = "open_clip_model.safetensors"
# Files that open_clip's own loader looks for, in its order.
WEIGHTS_NAMES = (
    WEIGHTS_NAME,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".npz")
_PROJECTION = Convention(
    names=(
        (r"text_projection$", "text_projection/weight"),
        (r"text_projection_bias$", "text_projection/bias"),
    ),
    axes=((r"text_projection$", "E D -> D E"),),
)


def rows(config: CLIPConfig) -> list[Row]:
    """Return the table of parameters."""
    family = timm.family_of(config.vision)
    convention = family.convention if family else Convention()
    if isinstance(config.text, BertConfig):
        convention += bert.open_clip_convention(config.text)
    if config.text.projection_bias:
        convention += _PROJECTION
    if config.decoder is None:
        return table(config, convention + openai.CONVENTION)
    return table(config, convention + _decoder(config) + openai.BLOCKS + TORCH)


def _decoder(config: CLIPConfig) -> Convention:
    is_mammut = isinstance(config.decoder, MaMMUTConfig)
    blocks = config.decoder.cross_every if isinstance(config.decoder, MaMMUTConfig) else 1
    is_fused = typing.cast(ViTConfig, config.vision).width == config.embed_dim
    decoder = Convention(
        names=(
            (r"^text/class_embedding", "text/cls_emb"),
            (r"^decoder/image_projection", "map_viz2txt_kv"),
            (r"^decoder/vocab", "text/text" if is_mammut else "text_decoder/text"),
            (r"^decoder/", "text_decoder/"),
            (r"/transformer/layers/self_(\d+)/", rf"/resblocks.{{\1:{blocks}}}/"),
            (r"/transformer/layers/cross/", "/cross_attn/{}/"),
        ),
    )
    # If all widths are the same, the attentional pool's projections are one tensor.
    return decoder if is_fused else _POOL + decoder


_POOL = Convention(
    names=(
        (r"attn_pool/attn/q/kernel", "attn_pool/attn/q_proj_weight"),
        (r"attn_pool/attn/kv/kernel", "attn_pool/attn/[k,v]_proj_weight"),
    ),
)


def find_weights(folder: Path) -> Path:
    """Return the weights file of a folder that open_clip would load."""
    for name in WEIGHTS_NAMES:
        for path in (folder / name, folder / f"{name}.index.json"):
            if path.exists():
                return path
    others = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES)
    if len(others) != 1:
        names = ", ".join(path.name for path in others[:5])
        raise InputError(
            f"{folder} has {len(others)} files of weights ({names or 'none'}); a model folder "
            f"needs exactly one ({', '.join(_SUFFIXES)}), or one called {WEIGHTS_NAME}."
        )
    return others[0]


def read(
    tensors: Tensors,
    source: str,
    config_path: Path | None,
    *,
    activation: Activation | None = None,
) -> Weights:
    """Read a state dict with its configuration; without one, `activation` is needed."""
    tensors = _unwrapped(tensors)
    if config_path is None:
        if decoder := [n for n in tensors if n.startswith(("text_decoder.", "text.cross_attn."))]:
            raise InputError(
                f"{source} has a caption decoder ({decoder[0]}), which tensors alone do not "
                f"describe; put its {CONFIG_NAME} beside it."
            )
        tensors = _flat_names(tensors)
        return openai.read(tensors, source, activation=activation)
    config, preprocess = read_config(config_path)
    weights = openai.without_bookkeeping(tensors)
    if config.decoder is None:
        weights = _flat_names(weights)
    else:
        check_assumptions(
            Weights(config=config, params={}), f"{config_path}: open_clip", _DECODERS_TEXT
        )
    for name in ("logit_scale", "logit_bias"):  # one value, of shape [] or [1]
        if name in weights and weights[name].size == 1:
            weights[name] = weights[name].reshape(())
    params = to_params(rows(config), weights, config, source)
    return Weights(config=config, params=params, preprocess=preprocess)


def _unwrapped(tensors: Tensors) -> Tensors:
    """Remove the prefixes that training wrappers add to names."""
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors


def _flat_names(tensors: Tensors) -> Tensors:
    """Remove the prefix `text.` of open_clip's custom towers."""
    return {name.removeprefix("text."): x for name, x in tensors.items()}


def _assumptions(config: CLIPConfig) -> Assumptions:
    text = config.text
    own = ("quick_gelu",) if text.activation == "quick_gelu" else ("gelu", "gelu_tanh")
    family = timm.family_of(config.vision)
    assumptions: dict[str, Any] = {
        "vision": type(config.vision) if family else (ViTConfig, ResNetConfig),
        "text": (TextConfig, BertConfig),
    }
    every: tuple[Activation, ...] = ("quick_gelu", "gelu", "gelu_tanh")
    if isinstance(text, BertConfig):
        assumptions, own = assumptions | {"text.head": ("linear", "mlp")}, every
    else:
        assumptions |= {"text.pool": ("argmax", "eos", "last"), "text.activation": every}
    if family is None:
        assumptions |= {
            "vision.activation": ("relu",) if isinstance(config.vision, ResNetConfig) else own,
            "vision.pool": ("class_token", "mean", "attention"),
            "vision.class_token": True,
            "vision.patch_bias": False,
            "vision.projection": True,
            "vision.projection_bias": False,
            "vision.max_patches": None,
        }
    if config.decoder is not None:
        assumptions |= _decoder_assumptions(config.decoder)
    if text.tokenizer.file == "clip" and (not text.causal or text.pool == "last"):
        assumptions["text.clip_vocab_size"] = FULL_VOCAB_SIZE
    return assumptions


_DECODERS_TEXT: Assumptions = {
    "text.norm_epsilon": 1e-5,
    "text.mlp_ratio": 4.0,
    "text.activation": ("quick_gelu", "gelu"),
}


def _decoder_assumptions(decoder: DecoderConfig) -> Assumptions:
    """Return the settings that open_clip assumes of a model with a decoder."""
    is_coca = isinstance(decoder, CoCaConfig)
    return {
        "decoder.mlp_ratio": 4.0,
        "vision.pool": ("queries", "class_token") if is_coca else "mean_all",
        "text.correct_class_mask": False if is_coca else (True, False),
        "text.pool": "class_token" if is_coca else "mean",
        "text.projection": is_coca,
        "text.projection_bias": False,
        "text.causal": is_coca,
        **_DECODERS_TEXT,
    }


_REASONS = {
    "vision.activation": "both towers have QuickGELU or neither",
    "text.correct_class_mask": "open_clip has only the other mask",
    "vision.max_patches": "its NaFlex towers are SigLIP's",
    # Other sizes are written as Hugging Face's tokenizer, which can only pad with end of text.
    "text.clip_vocab_size": "a smaller vocabulary's padding with id 0, which matters with "
    "text.causal=False and text.pool='last', cannot be written",
}


def as_computed(weights: Weights) -> Weights:
    """Return the model as open_clip will compute it, with the activation of its timm name.

    Raises Inexpressible if timm has no tower of these sizes.
    """
    vision = weights.config.vision
    family = timm.family_of(vision)
    if family is None or "activation" not in family.free:
        return weights
    named = typing.cast(ViTConfig, timm.TOWERS[timm.name_of(vision)])
    vision = replace(typing.cast(ViTConfig, vision), activation=named.activation)
    return replace(weights, config=replace(weights.config, vision=vision))


def to_tensors(weights: Weights, dtype: DType | None = None) -> Tensors:
    """Return the state dict under open_clip's names. Raises Inexpressible as `check` does."""
    _check_towers(weights)
    tensors = from_params(rows(weights.config), weights.params)
    if is_custom(weights.config) and weights.config.decoder is None:
        towers = {n for n in tensors if not n.startswith(("visual.", "logit_"))}
        tensors = {f"text.{n}" if n in towers else n: x for n, x in tensors.items()}
    return {n: cast(x, dtype) for n, x in tensors.items()} | openai.counters(tensors)


def _check_towers(weights: Weights) -> None:
    assumptions = _assumptions(weights.config)
    check_assumptions(weights, "open_clip's own towers", assumptions, _REASONS)
    ours, theirs = (w.config.vision.activation for w in (weights, as_computed(weights)))
    if ours != theirs:
        raise Inexpressible(
            f"open_clip would compute the image tower with {theirs}, as the tower's name in timm "
            f"fixes it, and this model has {ours}",
            "use --accept-activation to write it nevertheless, as in open_clip's released folders, "
            "and measure the difference",
        )


def check(weights: Weights) -> None:
    """Raise Inexpressible if open_clip has no such model."""
    _check_towers(weights)
    model_cfg(weights)
    check_tokenizer(weights.config.text)


def write(weights: Weights, folder: Path, *, dtype: DType | None = None) -> None:
    """Write a folder that `open_clip.create_model_and_transforms("local-dir:…")` loads."""
    tensors = to_tensors(weights, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    content = {
        "model_cfg": model_cfg(weights),
        "preprocess_cfg": preprocess_cfg(weights.preprocess),
    }
    write_json(folder / CONFIG_NAME, content)
    write_tokenizer(folder, weights.config.text)


def _outputs(weights: Weights, path: Path, inputs: verify.Inputs) -> verify.Outputs:
    if isinstance(weights.config.decoder, MaMMUTConfig):
        message = "only LAION's fork of open_clip has MaMMUT, and no package has the fork"
        raise verify.Unverifiable(message)
    with verify.library("open_clip", "open_clip_torch"):
        import open_clip
        import torch

        model = open_clip.create_model(f"local-dir:{path}").eval()

        def encode_image(images: Any, **options: Any) -> Any:
            is_naflex = isinstance(images, Patches)
            return model.encode_image(
                timm.as_dictionary(images) if is_naflex else images, **options
            )

        encode = [encode_image, model.encode_text]
        if not hasattr(model, "text_decoder"):
            return verify.torch_outputs(*encode, model, inputs)
        encode = [functools.partial(f, normalize=False) for f in encode]  # CoCa's default is True
        outputs = verify.torch_outputs(*encode, model, inputs)
        with torch.no_grad():
            written = model(*verify.torch_inputs(inputs))["logits"]
        return outputs | {"caption_logits": written.numpy()}


TARGET = Target(
    write=write,
    reference="open_clip",
    outputs=_outputs,
    as_computed=as_computed,
    check=check,
    names=(CONFIG_NAME, WEIGHTS_NAME),
    use="`open_clip.create_model_and_transforms('local-dir:FOLDER')`.",
    use_naflex="""

The image tower takes images of any aspect ratio (NaFlex), which open_clip 3.3 cannot prepare: its
own transform squashes images to squares, whose embeddings are right for square images only. For
others pass `encode_image` a dictionary of `patches` [batch, length, values], `patch_coord` [batch,
length, 2] (row, column) and `patch_valid` [batch, length], as timm's `ResizeToSequence`, `Patchify`
and `NaFlexCollator` make them. `clip_jax.load(FOLDER)` does all of this.""",
)
