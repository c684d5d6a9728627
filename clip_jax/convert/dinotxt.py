"""dino.txt's own files: the head and the text tower, without the image tower.

Meta's programs write state dicts: DINOv3's `dinov3_vitl16_dinotxt_…_and_text_encoder` is one file,
DINOv2's `dinov2_vitl14_reg4_dinotxt_…` two, `…_vision_head.pth` and `…_text_encoder.pth`. Names and
sizes are those of `dinov3/eval/text` and `dinov2/hub/text`. The image tower is read from elsewhere.
"""

from pathlib import Path
from typing import cast

import numpy as np

from clip_jax.convert.state_dict import TORCH, Convention, Row, table, to_params
from clip_jax.convert.tensor_files import Tensors, read_tensors
from clip_jax.convert.weights import Weights, count_blocks, mlp_ratio, shape_of
from clip_jax.data.images import Preprocess
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.image_head import ImageHeadConfig
from clip_jax.models.images import IMAGENET_MEAN, IMAGENET_STD
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

PROBE = "visual_model.head.ln_final.weight"  # a tensor by which the files are recognised
_HEAD, _TEXT = "visual_model.head.", "text_model."
_PROJECTION = "text_model.head.linear_projection.weight"
_HEAD_WIDTH = 64  # channels of a head of the text tower, as in the published one
_SHARE = 0.875  # of the crop, in Meta's evaluation: 224 pixels of 256
# DINOv2's two files: the end of a name → the module whose tensors the file has.
_FILES = {"*_vision_head.pth": _HEAD, "*_text_encoder.pth": _TEXT}

CONVENTION = Convention(
    names=(
        (r"^image_head/transformer/resblocks/", "visual_model/head/blocks/{}/"),
        (r"^image_head/ln_post/", "visual_model/head/ln_final/"),
        (r"^image_head/proj/", "visual_model/head/linear_projection/"),
        (r"^(visual_model/.*)/ln_([12])/", r"\1/norm\2/"),
        (r"^(visual_model/.*)/ls_([12])/", r"\1/ls\2/"),
        (r"^(visual_model/.*)/in_proj/", r"\1/qkv/"),
        (r"^(visual_model/.*)/out_proj/", r"\1/proj/"),
        (r"^(visual_model/.*)/c_gate/", r"\1/w1/"),
        (r"^(visual_model/.*)/c_fc/", r"\1/w2/"),
        (r"^(visual_model/.*)/c_proj/", r"\1/w3/"),
        (r"^text/text_projection$", "text_model/head/linear_projection/weight"),
        (r"^text/", "text_model/backbone/"),
        (r"^(text_model/backbone)/transformer/resblocks/", r"\1/blocks/{}/"),
        (r"^(text_model/.*)/ln_1/", r"\1/attention_norm/"),
        (r"^(text_model/.*)/ln_2/", r"\1/ffn_norm/"),
        (r"^(text_model/.*)/attn/in_proj/", r"\1/attention/qkv/"),
        (r"^(text_model/.*)/attn/out_proj/", r"\1/attention/proj/"),
        (r"^(text_model/.*)/mlp/c_fc/", r"\1/feed_forward/fc1/"),
        (r"^(text_model/.*)/mlp/c_proj/", r"\1/feed_forward/fc2/"),
    ),
    axes=((r"^(image_head/proj/kernel|text/text_projection)$", "E D -> D E"),),
)


def has_files(folder: Path) -> bool:
    """Return whether a folder has DINOv2's two files."""
    return all(any(folder.glob(pattern)) for pattern in _FILES)


def read_files(folder: Path) -> Tensors:
    """Read DINOv2's two files under the names of DINOv3's."""
    tensors: Tensors = {}
    for pattern, prefix in _FILES.items():
        paths = sorted(folder.glob(pattern))
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            raise InputError(f"{folder} has {names}; keep one {pattern}.")
        own = {f"{prefix}{name}": x for name, x in read_tensors(paths[0]).items()}
        blocks = f"{_HEAD}block_list."
        tensors |= {name.replace(blocks, f"{_HEAD}blocks."): x for name, x in own.items()}
    return tensors


def read(tensors: Tensors, source: str, base: Weights | None) -> Weights:
    """Read a head and a text tower, with the image tower of `base`.

    A file without a logit scale gets the one with which training begins. Raises InputError without
    `base`, or if it has another width.
    """
    if base is None:
        raise InputError(
            f"{source} has dino.txt's head and text tower, and no image tower: set --base to a "
            "folder of DINOv2 with registers or of DINOv3, or to hf:OWNER/NAME to download it: "
            "clip-jax convert FILE NEW --to clip-jax --base hf:OWNER/NAME."
        )
    config = _infer(tensors, source, base)
    params = to_params(_rows(config), _without_scale(tensors), config, source)
    scale = np.log(np.float32(config.init_logit_scale))
    if "logit_scale" in tensors:
        scale = np.asarray(tensors["logit_scale"]).reshape(())
    params |= {"visual": base.params["visual"], "logit_scale": scale}
    preprocess = Preprocess(
        image_size=config.vision.image_size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        crop_ratio=_SHARE,
    )
    return Weights(config=config, params=params, preprocess=preprocess)


def _rows(config: CLIPConfig) -> list[Row]:
    rows = table(config, CONVENTION + TORCH)
    return [row for row in rows if row.ours.split("/")[0] in ("image_head", "text")]


def _without_scale(tensors: Tensors) -> Tensors:
    return {name: x for name, x in tensors.items() if name != "logit_scale"}


def _infer(tensors: Tensors, source: str, base: Weights) -> CLIPConfig:
    """Return the architecture, of which tensors show all but the text tower's number of heads."""
    if base.only_tower == "text":
        raise InputError(f"{base.path} has no image tower; set --base to one.")
    (width,) = shape_of(tensors, PROBE, 1, source)
    tower = cast(ViTConfig, base.config.vision)
    if tower.pooled_width(base.config.embed_dim) != width:
        raise InputError(
            f"{source} has a head for an image tower of width {width}, and {base.path} has a "
            f"{tower.summary}; set --base to the tower that the head was trained on."
        )
    embed_dim, text_width = shape_of(tensors, _PROJECTION, 2, source)
    backbone = f"{_TEXT}backbone."
    length, _ = shape_of(tensors, f"{backbone}positional_embedding", 2, source)
    words, _ = shape_of(tensors, f"{backbone}token_embedding.weight", 2, source)
    hidden, _ = shape_of(tensors, f"{backbone}blocks.0.feed_forward.fc1.weight", 2, source)
    text = TextConfig(
        context_length=length,
        vocab_size=words,
        width=text_width,
        depth=count_blocks(tensors, f"{backbone}blocks."),
        num_heads=max(text_width // _HEAD_WIDTH, 1),
        mlp_ratio=mlp_ratio(text_width, hidden),
        activation="gelu",
        biases="none",
    )
    return CLIPConfig(
        embed_dim=embed_dim,
        vision=tower,
        text=text,
        image_head=ImageHeadConfig(depth=count_blocks(tensors, f"{_HEAD}blocks.")),
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
