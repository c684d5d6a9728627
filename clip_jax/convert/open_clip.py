"""open_clip's format: OpenAI's names with more options, beside an `open_clip_config.json`."""

import contextlib
import functools
import tempfile
import typing
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.convert import openai, timm, tokenizer_files, verify
from clip_jax.convert.open_clip_config import (
    CONFIG_NAME,
    check_tokenizer,
    config_of,
    is_custom,
    model_cfg,
    preprocess_cfg,
    read_config,
    write_tokenizer,
)
from clip_jax.convert.open_clip_towers import (
    DECODERS_TEXT,
    decoder_family,
    image_family,
    text_family,
)
from clip_jax.convert.settings import read_json, write_json
from clip_jax.convert.state_dict import TORCH, Row, from_params, table, to_params
from clip_jax.convert.target import Assumptions, Inexpressible, Target, check_assumptions
from clip_jax.convert.tensor_files import Tensors, write_safetensors
from clip_jax.convert.weights import DType, Weights, cast
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.images import Patches
from clip_jax.models.layers import Activation
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
SUFFIXES = (".safetensors", ".bin", ".pt", ".npz")


def rows(config: CLIPConfig) -> list[Row]:
    """Return the table of parameters."""
    image, text = image_family(config.vision), text_family(config.text)
    convention = image.convention(config.vision) + text.convention(config.text)
    if config.decoder is None:
        return table(config, convention + openai.CONVENTION)
    convention += decoder_family(config.decoder).convention(config)
    return table(config, convention + openai.BLOCKS + TORCH)


def find_weights(folder: Path) -> Path:
    """Return the weights file of a folder that open_clip would load."""
    for name in WEIGHTS_NAMES:
        for path in (folder / name, folder / f"{name}.index.json"):
            if path.exists():
                return path
    others = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    if not others and (folder / "checkpoints").is_dir():
        raise InputError(
            f"{folder} has checkpoints but no config.json, which records a run's model. Load the "
            "folder that create_model(config.model, state.params).save(...) writes, or restore the "
            "file."
        )
    if len(others) != 1:
        names = ", ".join(path.name for path in others[:5])
        raise InputError(
            f"{folder} has {len(others)} files of weights ({names or 'none'}); a model folder "
            f"needs exactly one ({', '.join(SUFFIXES)}), or one called {WEIGHTS_NAME}."
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
            Weights(config=config, params={}), f"{config_path}: open_clip", DECODERS_TEXT
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
    families = image_family(config.vision), text_family(config.text)
    image, text = (family.assumptions(config) for family in families)
    decoder = decoder_family(config.decoder).assumptions if config.decoder else {}
    return image | text | decoder | {"preprocess.crop_ratio": 1.0}


_REASONS = {
    "vision.activation": "both towers have QuickGELU or neither",
    "text.correct_class_mask": "open_clip has only the other mask",
    "vision.max_patches": "its NaFlex towers are SigLIP's",
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


def _published_settings(config: CLIPConfig) -> dict[str, Any] | None:
    """Return open_clip's own settings of a published model; None if it has none of this config."""
    import open_clip

    sought = (config.embed_dim, config.vision, config.text)
    for name in open_clip.list_models():
        settings = open_clip.get_model_config(name)
        with contextlib.suppress(InputError):
            theirs, _ = config_of({"model_cfg": settings}, Path(name))
            if (theirs.embed_dim, theirs.vision, theirs.text) == sought:
                return settings
    return None


@contextlib.contextmanager
def _local_dir(weights: Weights, path: Path) -> Generator[Path]:
    """Yield a folder that open_clip loads: `path`, or one that links to a file of weights.

    The file's configuration is that beside it, or without any that of the published model.
    """
    folder, file = (path, find_weights(path)) if path.is_dir() else (path.parent, path)
    config_path = folder / CONFIG_NAME
    if file.name.endswith(".index.json"):
        raise verify.Unverifiable(f"open_clip does not load shards ({file.name})")
    if config_path.exists():
        content = read_json(config_path)
    else:
        content = _published_settings(weights.config) or model_cfg(weights)
    if path.is_dir() and file.name in WEIGHTS_NAMES and "model_cfg" in content:
        yield path
        return
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        for beside in folder.iterdir() if config_path.exists() else ():
            if beside.name.startswith(("tokenizer", "special_tokens", "vocab", "merges")):
                (temporary / beside.name).symlink_to(beside.resolve())
        with file.open("rb") as stream:
            is_safetensors = stream.read(9)[8:] == b"{"
        name = WEIGHTS_NAME if is_safetensors else "open_clip_pytorch_model.bin"
        (temporary / name).symlink_to(file.resolve())
        write_json(temporary / CONFIG_NAME, {"model_cfg": content} | content)
        yield temporary


def _load(weights: Weights, path: Path) -> verify.Reference:
    """Load a folder or a file by open_clip."""
    decoder = weights.config.decoder
    if decoder is not None and (reason := decoder_family(decoder).unverifiable):
        raise verify.Unverifiable(reason)
    folder = path if path.is_dir() else path.parent
    notes: list[str] = []
    if not (folder / CONFIG_NAME).exists():
        notes.append("architecture and activation: the file stores none")
    tokenize: Callable[[Sequence[str]], np.ndarray] | None = None
    with (
        verify.library("open_clip", "open_clip_torch"),
        _local_dir(weights, path) as folder,
    ):
        import open_clip

        name = f"local-dir:{folder}"
        model, _, transform = open_clip.create_model_and_transforms(name)
        model.eval()
        settings = read_json(folder / CONFIG_NAME)["model_cfg"]["text_cfg"]
        if settings.get("hf_tokenizer_name") and not tokenizer_files.exist(folder):
            notes.append("token ids: the folder has no tokenizer")
        else:
            tokenizer = open_clip.get_tokenizer(name)
            tokenize = lambda texts: tokenizer(list(texts)).numpy()  # noqa: E731
    is_naflex = weights.preprocess.max_patches is not None
    if is_naflex:
        notes.append("preprocessing: open_clip squashes images to squares")
    return verify.Reference(
        name=verify.named("open_clip_torch"),
        outputs=functools.partial(_outputs, model),
        preprocess=None if is_naflex else verify.torch_transform(transform),
        tokenize=tokenize,
        notes=tuple(notes),
    )


def _outputs(model: Any, inputs: verify.Inputs) -> verify.Outputs:
    """Return the outputs of one of open_clip's models."""
    import torch

    def encode_image(images: Any, **options: Any) -> Any:
        is_naflex = isinstance(images, Patches)
        return model.encode_image(timm.as_dictionary(images) if is_naflex else images, **options)

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
    load=_load,
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
