"""timm's own folders, of an image tower alone: `timm.create_model("local-dir:FOLDER")`.

`config.json` has timm's name of the tower and, in `model_args`, what differs from the tower of that
name. Towers of DINOv2 and DINOv3 are supported, and those of SigLIP are read. DINO's embedding is
the class token after the norm, with which it was trained; timm's default for DINOv3 is the mean of
the patches.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from clip_jax.convert import timm, verify
from clip_jax.convert.dino import ASSUMPTIONS, alone
from clip_jax.convert.settings import Settings, Table, by_table, count_of, read_json, write_json
from clip_jax.convert.state_dict import TORCH, Row, from_params, table, to_params
from clip_jax.convert.target import Assumptions, Inexpressible, Target, check_assumptions
from clip_jax.convert.tensor_files import read_tensors, write_safetensors
from clip_jax.convert.weights import DType, Weights, mlp_ratio
from clip_jax.convert.weights import cast as cast_array
from clip_jax.data.images import Preprocess
from clip_jax.errors import InputError, naming
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.dino import DinoConfig
from clip_jax.models.images import IMAGENET_MEAN, IMAGENET_STD
from clip_jax.models.vit import ViTConfig
from clip_jax.serialize import from_dict

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
_WEIGHTS_NAMES = (WEIGHTS_NAME, "pytorch_model.bin")
_PREFIX = "visual.trunk."
_ALIGNED = 8  # to multiples of which the width of DINOv3's gated MLP is rounded up
_SIZES: Table = {
    "patch_size": ("patch_size", 16), "embed_dim": ("width", 768), "depth": ("depth", 12),
    "num_heads": ("num_heads", 12), "init_values": ("layer_scale", 1e-5),
}  # fmt: skip
_INERT = ("global_pool", "num_classes", "dynamic_img_size", "swiglu_align_to", "in_chans")
_CROPS = {"center": "shortest", "squash": "squash"}  # timm's crop_mode → our resize_mode


def is_folder(path: Path) -> bool:
    """Return whether a folder is timm's: whether its configuration names an architecture."""
    config = path / CONFIG_NAME
    return config.is_file() and isinstance(read_json(config).get("architecture"), str)


def read(folder: Path) -> Weights:
    """Read a folder. Raises InputError, which names what is missing or not supported."""
    path = folder / CONFIG_NAME
    content = read_json(path)
    file = next((folder / n for n in _WEIGHTS_NAMES if (folder / n).exists()), None)
    if file is None:
        raise InputError(f"{folder} has none of {', '.join(_WEIGHTS_NAMES)}; add the weights.")
    # Older files have the settings of pixels at the top.
    pixels = Settings(content.get("pretrained_cfg", content), f"{path}: pretrained_cfg")
    with naming(path):
        tower = _read_tower(content, pixels, path)
        preprocess = _read_pixels(pixels, tower.image_size)
    config = replace(alone(tower), image_mean=preprocess.mean, image_std=preprocess.std)
    tensors = {f"{_PREFIX}{name}": x for name, x in read_tensors(file).items()}
    if isinstance(tower, DinoConfig):
        tensors = timm.from_file(tensors, tower, str(file))
    params = to_params(_rows(config), tensors, config, str(file))
    return Weights(config=config, params=params, preprocess=preprocess, only_tower="image")


def _read_tower(content: dict[str, Any], pixels: Settings, path: Path) -> ViTConfig:
    """Return the tower of a name, for DINO's with the sizes of `model_args`."""
    name = str(content["architecture"]).partition(".")[0]
    if name not in timm.ALONE:
        raise InputError(
            f"{path}: architecture={name!r:.99} is not supported as a tower alone; use one of "
            f"{', '.join(timm.ALONE)}."
        )
    named = timm.ALONE[name]
    if not isinstance(named, DinoConfig):
        Settings(content.get("model_args") or {}, f"{path}: model_args", _INERT).finish()
        return named
    args = Settings(content.get("model_args") or {}, f"{path}: model_args", _INERT)
    size = pixels.get("input_size", [3, named.image_size, named.image_size], list)
    args.used.add("img_size")
    if named.has_table:  # of positions
        size = args.values.get("img_size") or size
    sides = size if isinstance(size, list) else [size]
    if len({*map(str, sides[-2:])}) != 1:
        raise InputError(f"{path}: image size {size!r:.99} is not supported: it must be square.")
    count = "reg_tokens" if named.has_table else "num_reg_tokens"
    defaults = {theirs: (ours, getattr(named, ours)) for theirs, (ours, _) in _SIZES.items()}
    tower = replace(
        named,
        image_size=count_of(sides[-1], f"{path}: image size"),
        registers=args.count(count, named.registers) if named.registers else 0,
        **args.fields(defaults),
    )
    packed = 2 if named.activation == "swiglu" and named.has_table else 1
    if (ratio := args.get("mlp_ratio", None, object)) is not None:
        hidden = int(tower.width * args.number("mlp_ratio", ratio)) // packed
        tower = replace(tower, mlp_ratio=mlp_ratio(tower.width, hidden))
    args.finish()
    return tower


def _read_pixels(section: Settings, size: int) -> Preprocess:
    mode = section.get("crop_mode", "center", str)
    if mode not in _CROPS:
        raise InputError(
            f"{section.where}.crop_mode={mode!r:.99} is not supported; use {', '.join(_CROPS)}."
        )
    share = section.number("crop_pct", 0.875)
    if not 0.1 <= share <= 1:
        raise InputError(
            f"{section.where}.crop_pct={share} is not supported; it must be from 0.1 to 1."
        )
    values = {
        "crop_ratio": size / int(size / share),  # timm rounds the resized side down
        "mean": section.get("mean", list(IMAGENET_MEAN), list),
        "std": section.get("std", list(IMAGENET_STD), list),
        "interpolation": section.get("interpolation", "bicubic", str),
        "resize_mode": _CROPS[mode],
        "image_size": size,
    }
    return from_dict(Preprocess, values, section.where)


def _rows(config: CLIPConfig) -> list[Row]:
    tower = config.vision
    if isinstance(tower, DinoConfig):
        convention = timm.dino_convention(tower)
    else:
        convention = timm.family_named(tower).convention + TORCH
    return [row for row in table(config, convention) if row.ours.startswith("visual/")]


def _assumptions(weights: Weights) -> Assumptions:
    tower = weights.config.vision
    has_table = isinstance(tower, DinoConfig) and tower.has_table
    return ASSUMPTIONS | {
        "vision.activation": ("gelu", "swiglu"),
        "vision.biases": "qkv" if has_table else ("qv", "none"),
        "vision.norm_epsilon": 1e-6 if has_table else 1e-5,
    }


_REASONS = {"only_tower": "use --tower image"}


def check(weights: Weights) -> None:
    """Raise Inexpressible if timm has no such tower."""
    check_assumptions(weights, "timm", _assumptions(weights), _REASONS)
    tower = cast(DinoConfig, weights.config.vision)
    if tower.activation == "swiglu" and not tower.has_table and tower.mlp_width % _ALIGNED:
        raise Inexpressible(
            f"timm rounds the width of a gated MLP, {tower.mlp_width}, to a multiple of {_ALIGNED}"
        )


def write(weights: Weights, folder: Path, *, dtype: DType | None = None) -> None:
    """Write a folder that `timm.create_model("local-dir:…", pretrained=True)` loads."""
    check(weights)
    tower, pixels = cast(DinoConfig, weights.config.vision), weights.preprocess
    tensors = from_params(_rows(weights.config), weights.params)
    tensors = {
        name.removeprefix(_PREFIX): cast_array(x, dtype)
        for name, x in timm.to_file(tensors, tower).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    modes = {ours: theirs for theirs, ours in _CROPS.items()}
    content = {
        "architecture": timm.dino_name(tower),
        "num_classes": 0,
        "num_features": tower.width,
        "global_pool": "token",
        "model_args": _write_args(tower),
        "pretrained_cfg": {
            "input_size": [3, tower.image_size, tower.image_size],
            "fixed_input_size": True,
            "interpolation": pixels.interpolation,
            "crop_pct": _crop_pct(pixels),
            "crop_mode": modes[pixels.resize_mode],
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    write_json(folder / CONFIG_NAME, content)


def _crop_pct(pixels: Preprocess) -> float:
    """Return the share by which timm resizes to the same side."""
    share = pixels.image_size / pixels.shorter_side
    is_exact = int(pixels.image_size / share) == pixels.shorter_side
    return share if is_exact else pixels.image_size / (pixels.shorter_side + 0.5)


def _write_args(tower: DinoConfig) -> dict[str, Any]:
    packed = 2 if tower.activation == "swiglu" and tower.has_table else 1
    args = {
        "img_size": tower.image_size,
        **by_table(_SIZES, tower),
        "mlp_ratio": mlp_ratio(tower.width, packed * tower.mlp_width),
        "global_pool": "token",
    }
    if tower.registers or not tower.has_table:
        args["reg_tokens" if tower.has_table else "num_reg_tokens"] = tower.registers
    if tower.activation == "swiglu" and not tower.has_table:
        args["swiglu_align_to"] = _ALIGNED
    return args


def _load(weights: Weights, path: Path) -> verify.Reference:
    """Load a folder by timm."""
    with verify.library("timm", "timm"):
        import timm as library
        import torch

        options = {"pretrained": True, "num_classes": 0, "global_pool": "token"}
        model = library.create_model(f"local-dir:{path}", **options).eval().float()
        settings = library.data.resolve_data_config(model.pretrained_cfg)
        transform = library.data.create_transform(**settings)

    def outputs(inputs: verify.Inputs) -> verify.Outputs:
        with torch.no_grad():
            return {"image_features": model(verify.torch_inputs(inputs)[0]).numpy()}

    return verify.Reference(
        name=verify.named("timm"), outputs=outputs, preprocess=verify.torch_transform(transform)
    )


TARGET = Target(
    write=write,
    load=_load,
    check=check,
    has_single_towers=True,
    names=(CONFIG_NAME, WEIGHTS_NAME),
    use_tower=lambda weights: (
        "`timm.create_model('local-dir:FOLDER', pretrained=True, num_classes=0)`."
    ),
)
