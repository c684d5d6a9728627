"""What the dimensions of every parameter are: path → their names, by the key of `layers`.

Further names: `depth`, the scanned axis; `O`, channels of a convolution; `W`, the width of a table
of words; `-`, what is never split (gains, biases, positions, the words of that table).
"""

from clip_jax.models.clip import CLIPConfig
from clip_jax.models.decoder import CoCaConfig, MaMMUTConfig
from clip_jax.models.resnet import SPLIT_STAGES, ResNetConfig
from clip_jax.models.vit import ViTConfig

# A block's parameters; `depth` is the scanned axis and is never split.
BLOCK = {
    "ln_1/scale": "depth -",
    "ln_1/bias": "depth -",
    "attn/in_proj/kernel": "depth D S N K",
    "attn/in_proj/bias": "depth S N K",
    "attn/out_proj/kernel": "depth N K D",
    "attn/out_proj/bias": "depth -",
    "ln_2/scale": "depth -",
    "ln_2/bias": "depth -",
    "mlp/c_fc/kernel": "depth D F",
    "mlp/c_fc/bias": "depth F",
    "mlp/c_proj/kernel": "depth F D",
    "mlp/c_proj/bias": "depth -",
}
TEXT = {
    "token_embedding": "- W",
    "positional_embedding": "L -",
    "ln_final/scale": "-",
    "ln_final/bias": "-",
}
VIT = {
    "conv1/kernel": "P Q C D",
    "positional_embedding": "L -",
    "ln_post/scale": "-",
    "ln_post/bias": "-",
}
VIT_MAP_POOL = {
    "attn_pool/latent": "- - -",
    "attn_pool/q/kernel": "D N K",
    "attn_pool/q/bias": "N K",
    "attn_pool/kv/kernel": "D S N K",
    "attn_pool/kv/bias": "S N K",
    "attn_pool/proj/kernel": "N K D",
    "attn_pool/proj/bias": "-",
    "attn_pool/norm/scale": "-",
    "attn_pool/norm/bias": "-",
    "attn_pool/mlp/c_fc/kernel": "D F",
    "attn_pool/mlp/c_fc/bias": "F",
    "attn_pool/mlp/c_proj/kernel": "F D",
    "attn_pool/mlp/c_proj/bias": "-",
}

# A block that attends to another sequence. What is attended to may have another width.
CROSS = {
    "ln_1/scale": "depth -",
    "ln_1/bias": "depth -",
    "ln_1_kv/scale": "depth -",
    "ln_1_kv/bias": "depth -",
    "attn/q/kernel": "depth D N K",
    "attn/q/bias": "depth N K",
    "attn/kv/kernel": "depth D S N K",
    "attn/kv/bias": "depth S N K",
} | {path: names for path, names in BLOCK.items() if "in_proj" not in path}
VIT_QUERY_POOL = {
    "attn_pool/query": "- -",
    "attn_pool/attn/q/kernel": "D N K",
    "attn_pool/attn/q/bias": "N K",
    "attn_pool/attn/kv/kernel": "D S N K",
    "attn_pool/attn/kv/bias": "S N K",
    "attn_pool/attn/out_proj/kernel": "N K D",
    "attn_pool/attn/out_proj/bias": "-",
} | {f"attn_pool/{ln}/{part}": "-" for ln in ("ln_q", "ln_k") for part in ("scale", "bias")}

RESNET_POOL = {
    "attnpool/positional_embedding": "L -",
    "attnpool/c_proj/kernel": "N K E",
    "attnpool/c_proj/bias": "E",
} | {
    f"attnpool/{name}_proj/{part}": names
    for name in "qkv"
    for part, names in (("kernel", "D N K"), ("bias", "N K"))
}


def table(config: CLIPConfig) -> dict[str, str]:
    """Return path → dimension names for the parameters of one architecture."""
    rows = {"logit_scale": ""}
    if config.init_logit_bias is not None:
        rows["logit_bias"] = ""
    rows |= _under("text", TEXT)
    if isinstance(config.decoder, MaMMUTConfig):
        rows |= _layers("text", config.decoder.cross_every, config.decoder.first_mlp)
        rows |= {"decoder/image_projection": "D -", "decoder/vocab_projection": "D V"}
    else:
        rows |= _under("text/transformer/resblocks", BLOCK)
    if isinstance(config.decoder, CoCaConfig):
        rows |= _layers("decoder", 1, True) | {"decoder/vocab_projection": "D V"}
        rows |= {"decoder/ln_final/scale": "-", "decoder/ln_final/bias": "-"}
    if config.text.pool == "class_token":
        rows["text/class_embedding"] = "-"
    if config.text.projection:
        rows["text/text_projection"] = "D E"
    if config.text.projection_bias:
        rows["text/text_projection_bias"] = "-"
    if isinstance(config.vision, ResNetConfig):
        return rows | resnet_rows(config.vision)
    return rows | vit_rows(config.vision)


def _layers(tower: str, blocks: int, first_mlp: bool) -> dict[str, str]:
    """Return the rows of layers that attend to the image."""
    rows = _under("cross", CROSS)
    for i in range(blocks):
        rows |= _under(f"self_{i}", BLOCK)
    if not first_mlp:
        rows = {p: n for p, n in rows.items() if not p.startswith(("self_0/mlp", "self_0/ln_2"))}
    return _under(f"{tower}/transformer/layers", rows)


def resnet_rows(vision: ResNetConfig) -> dict[str, str]:
    """Return the rows of a ResNet, of which the late stages are split."""
    norms = [f"bn{i}" for i in (1, 2, 3)]
    kernels = {f"conv{i}/kernel": "P Q C O" for i in (1, 2, 3)}
    for stage, depth in enumerate(vision.layers, start=1):
        names = "P Q C D" if stage in SPLIT_STAGES else "P Q C O"
        for i in range(depth):
            block = f"layer{stage}/{i}"
            kernels |= {f"{block}/conv{j}/kernel": names for j in (1, 2, 3)}
            norms += [f"{block}/bn{j}" for j in (1, 2, 3)]
            if i == 0:
                kernels[f"{block}/downsample/0/kernel"] = names
                norms.append(f"{block}/downsample/1")
    parameters = {f"{norm}/{part}": "-" for norm in norms for part in ("scale", "bias")}
    statistics = {f"{norm}/{part}": "-" for norm in norms for part in ("mean", "var")}
    return _under("visual", kernels | parameters | RESNET_POOL) | _under(
        "batch_stats/visual", statistics
    )


def vit_rows(vision: ViTConfig) -> dict[str, str]:
    """Return the rows of a vision transformer with its options."""
    rows = VIT | {f"transformer/resblocks/{path}": names for path, names in BLOCK.items()}
    if vision.layer_scale is not None:
        gammas = ("ls_1/gamma", "ls_2/gamma")
        rows |= {f"transformer/resblocks/{path}": "depth -" for path in gammas}
    if vision.class_token:
        rows["class_embedding"] = "-"
    if vision.pre_norm:
        rows |= {"ln_pre/scale": "-", "ln_pre/bias": "-"}
    if vision.patch_bias:
        rows["conv1/bias"] = "-"
    if vision.pool == "map":
        rows |= VIT_MAP_POOL
    if vision.pool == "queries":
        rows |= VIT_QUERY_POOL
    if vision.projection:
        rows["proj"] = "D E"
    return _under("visual", rows)


def _under(prefix: str, rows: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}/{path}": names for path, names in rows.items()}
