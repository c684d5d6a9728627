"""open_clip's format: OpenAI's names with more options, beside an `open_clip_config.json`."""

from dataclasses import replace
from pathlib import Path

from clip_jax.convert import captioners, openai, timm
from clip_jax.convert.open_clip_config import CONFIG_NAME, model_cfg, read_config, write_tokenizer
from clip_jax.convert.settings import write_json
from clip_jax.convert.state_dict import Row, from_params, join_queries, to_params
from clip_jax.convert.tensor_files import Tensors, write_safetensors
from clip_jax.convert.weights import DType, Weights, cast
from clip_jax.data.tokenizers.clip_bpe import FULL_VOCAB_SIZE
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.layers import Activation
from clip_jax.models.vit import ViTConfig

WEIGHTS_NAME = "open_clip_model.safetensors"
# What open_clip's own loader would take, the first first.
WEIGHTS_NAMES = (
    WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin",
)  # fmt: skip
_TEXT_PREFIXES = (
    "text.transformer.", "text.token_embedding.", "text.positional_embedding", "text.ln_final.",
    "text.text_projection",
)  # fmt: skip


def _is_siglip(config: CLIPConfig) -> bool:
    return isinstance(config.vision, ViTConfig) and config.vision.pool == "map"


def table(config: CLIPConfig) -> list[Row]:
    """OpenAI's rows and those of open_clip's options."""
    if config.decoder is not None:
        return captioners.rows(config)
    rows = timm.rows() + openai.text_rows() if _is_siglip(config) else openai.rows(config)
    if config.text.projection_bias or not config.text.projection:
        rows = [row for row in rows if row.ours != "text/text_projection"]
    if config.text.projection_bias:
        rows += [
            Row("text/text_projection", "text_projection.weight", "E D -> D E"),
            Row("text/text_projection_bias", "text_projection.bias"),
        ]
    if config.init_logit_bias is not None:
        rows.append(Row("logit_bias", "logit_bias"))
    return rows


def find_weights(folder: Path) -> Path:
    """Choose the file of weights in a folder as open_clip does."""
    for name in WEIGHTS_NAMES:
        for path in (folder / name, folder / f"{name}.index.json"):
            if path.exists():
                return path
    others = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt"))
    if len(others) != 1:
        names = ", ".join(path.name for path in others[:5])
        raise InputError(
            f"{folder} holds {len(others)} files of weights ({names or 'none'}); a model's folder "
            f"has exactly one (.safetensors, .bin or .pt), or one called {WEIGHTS_NAME}."
        )
    return others[0]


def read(
    tensors: Tensors,
    source: str,
    config_path: Path | None,
    *,
    activation: Activation | None = None,
    architecture: str | None = None,
) -> Weights:
    """Read a state dict, with its configuration or, without one, told what no tensor shows."""
    tensors = _unwrapped(tensors)
    if config_path is None:
        if decoder := [n for n in tensors if n.startswith(("text_decoder.", "text.cross_attn."))]:
            raise InputError(
                f"{source} has a caption decoder ({decoder[0]}), of which tensors alone do not say "
                f"enough: put its {CONFIG_NAME} beside it."
            )
        tensors = _flat_names(tensors)
        return openai.read(tensors, source, activation=activation, architecture=architecture)
    config, preprocess = read_config(config_path)
    weights = openai.without_bookkeeping(tensors)
    weights = _flat_names(weights) if config.decoder is None else captioners.split(weights)
    for name in ("logit_scale", "logit_bias"):  # one number, of shape [] or [1]
        if name in weights and weights[name].size == 1:
            weights[name] = weights[name].reshape(())
    params = to_params(table(config), weights, config, source)
    return Weights(
        config=config,
        params=params,
        preprocess=preprocess,
        batches_tracked=openai.batches_tracked(tensors),
    )


def _unwrapped(tensors: Tensors) -> Tensors:
    """Take away what training wraps names in."""
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors


def _flat_names(tensors: Tensors) -> Tensors:
    """Take away the `text.` of open_clip's custom towers."""
    return {
        name.removeprefix("text.") if name.startswith(_TEXT_PREFIXES) else name: x
        for name, x in tensors.items()
    }


def check(weights: Weights) -> None:
    """Raise InputError, which lists what open_clip has no settings for."""
    vision, text = weights.config.vision, weights.config.text
    # A tokenizer of our own is written as Hugging Face's, which can only pad with end of text.
    own = text.tokenizer.file == "clip" and text.clip_vocab_size != FULL_VOCAB_SIZE
    wrong = {
        f"padding with id 0 in a vocabulary of {text.clip_vocab_size}, which "
        "text.causal=False and text.pool='last' see": own
        and (not text.causal or text.pool == "last")
    }
    if isinstance(vision, ViTConfig):
        quick = (vision.activation == "quick_gelu", text.activation == "quick_gelu")
        wrong |= {
            "one tower with QuickGELU": quick[0] != quick[1],
        }
        wrong |= {} if _is_siglip(weights.config) else {
            "vision.class_token=False": not vision.class_token,
            "vision.patch_bias": vision.patch_bias,
            "vision.projection=False": not vision.projection,
        }  # fmt: skip
    wrong |= captioners.wrong(weights.config) if weights.config.decoder is not None else {
        "vision.pool": isinstance(vision, ViTConfig) and vision.pool in ("queries", "mean_all"),
        "text.pool": text.pool in ("class_token", "mean"),
    }  # fmt: skip
    if unsupported := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise InputError(
            f"open_clip's own towers cannot express this model's {', '.join(unsupported)}; "
            "choose --to clip-jax."
        )
    if isinstance(vision, ViTConfig) and vision.pool == "map":
        named = timm.as_named(vision)
        if named.activation != vision.activation:
            raise InputError(
                f"open_clip would compute the image tower with {named.activation}, as timm's "
                f"{timm.name_of(vision)} fixes it, and this model has {vision.activation}. Say "
                "--accept-activation to write it all the same, as open_clip's released folders "
                "are; the difference is then measured. Or choose --to hugging-face or clip-jax."
            )


def as_computed(weights: Weights) -> Weights:
    """Return the model as open_clip will compute it: with the activation a timm name fixes."""
    vision = weights.config.vision
    if not isinstance(vision, ViTConfig) or vision.pool != "map":
        return weights
    return replace(weights, config=replace(weights.config, vision=timm.as_named(vision)))


def to_tensors(weights: Weights, dtype: DType | None = None) -> Tensors:
    """Return the state dict under open_clip's names. Raises InputError if it cannot be
    expressed."""
    check(weights)
    tensors = join_queries(from_params(table(weights.config), weights.params))
    if _is_siglip(weights.config):  # open_clip's class with a text tower of its own
        towers = {n for n in tensors if not n.startswith(("visual.", "logit_"))}
        tensors = {f"text.{n}" if n in towers else n: x for n, x in tensors.items()}
    counters = openai.counters(tensors, weights.batches_tracked)
    return {n: cast(x, dtype) for n, x in tensors.items()} | counters


def write(weights: Weights, folder: Path, *, dtype: DType | None = None) -> None:
    """Write a folder that `open_clip.create_model_and_transforms("local-dir:…")` loads."""
    tensors = to_tensors(weights, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    preprocess = weights.preprocess
    content = {
        "model_cfg": model_cfg(weights),
        "preprocess_cfg": {
            "size": preprocess.image_size,
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "interpolation": preprocess.interpolation,
            "resize_mode": preprocess.resize_mode,
            **({"fill_color": preprocess.fill} if preprocess.fill else {}),
        },
    }
    write_json(folder / CONFIG_NAME, content)
    write_tokenizer(folder, weights.config.text)
