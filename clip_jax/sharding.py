"""The device mesh and the one table that says how every parameter lies on it.

Read the table as: path → the names of its dimensions → (through `DIMENSIONS`) mesh axes. It is
strict both ways: a parameter without a row and a row without a parameter are errors that name it.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from clip_jax.models import attention
from clip_jax.models.clip import CLIPConfig, Params
from clip_jax.models.layers import Layout
from clip_jax.models.resnet import SPLIT_STAGES, ResNetConfig
from clip_jax.models.vit import ViTConfig

AnyMesh = Mesh | AbstractMesh  # of devices, or of their numbers alone
BATCH_AXES = ("data", "fsdp")
DIMENSIONS = {"D": "fsdp", "N": "tensor", "F": "tensor", "V": "tensor"}


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices along each axis; at most one may be −1: what is left."""

    data: int = -1  # batch split, parameters copied
    fsdp: int = 1  # batch split, parameters and optimizer state split too
    tensor: int = 1  # heads and MLP channels split

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"mesh sizes must be positive, at most one of them -1, got data={self.data}, "
                f"fsdp={self.fsdp}, tensor={self.tensor}."
            )


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Return the devices along each axis. ValueError unless all are used."""
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = max(devices // known, 1)
    if math.prod(sizes) != devices:
        raise ValueError(
            f"mesh data={config.data} × fsdp={config.fsdp} × tensor={config.tensor} does not use "
            f"all {devices} devices; change --mesh.data, --mesh.fsdp or --mesh.tensor."
        )
    return sizes[0], sizes[1], sizes[2]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices (default: all) as `data × fsdp × tensor`, every axis Auto."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1 or devices[0].platform != "tpu":
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif sizes[0] % len(slices):
        raise ValueError(
            f"mesh data={sizes[0]} must be a multiple of the {len(slices)} slices, between which "
            "only the data axis may lie; change --mesh.data, --mesh.fsdp or --mesh.tensor."
        )
    else:
        array = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // len(slices), *sizes[1:]), (len(slices), 1, 1), devices,
            allow_split_physical_axes=True,
        )  # fmt: skip
    return Mesh(array, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: AnyMesh) -> int:
    """Count the pieces that a global batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def data_part(mesh: Mesh) -> tuple[int, int]:
    """Return which part of every global batch this process reads, and how many parts there are.

    Processes whose devices hold the same rows (those that share a row by `tensor`) read the same
    part. ValueError if the processes hold unequal or overlapping parts.
    """
    owners = mesh.devices.reshape(batch_shards(mesh), -1)
    rows: dict[int, set[int]] = {}
    for shard, devices in enumerate(owners):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(shard)
    parts = sorted({tuple(sorted(shards)) for shards in rows.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != len(owners):
        raise ValueError(
            f"mesh {dict(mesh.shape)} gives the {len(rows)} processes unequal parts of a batch; "
            "choose --mesh.tensor so that one divides the other: it and the devices of a process."
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Rows over the batch axes, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def layout(mesh: AnyMesh, backend: attention.Backend = "xla") -> Layout:
    """Split activations by rows and nothing else, and gather the parameters that they meet.

    Left alone, the compiler may follow the parameters instead: activations split by channel over
    `fsdp`, summed over the mesh at every matmul.
    """
    rows = PartitionSpec(BATCH_AXES)
    width, words = DIMENSIONS["D"], DIMENSIONS["V"]
    # In a shard_map a parameter's gradient is summed to where the parameter lies. Unchecked, the
    # sum over `data` comes last and is of the shards alone.
    mapped = functools.partial(jax.shard_map, mesh=mesh, out_specs=rows, check_vma=False)

    @functools.partial(mapped, in_specs=(PartitionSpec(words, width), rows))
    def lookup(table: Float[Array, "v d"], ids: Int[Array, "b L"]) -> Float[Array, "b L D"]:
        table = jax.lax.all_gather(table, width, axis=1, tiled=True)
        found = ids - jax.lax.axis_index(words) * table.shape[0]
        mine = (found >= 0) & (found < table.shape[0])  # each device knows some of the words
        return jax.lax.psum(jnp.where(mine[..., None], table[jnp.where(mine, found, 0)], 0), words)

    def einsum(equation: str, x: Array, kernel: Array) -> Array:
        left, right, out = re.split(",|->", equation)
        summed = [DIMENSIONS[n] for n in left if n in right and n not in out and n in "NF"]

        def whole(names: str) -> PartitionSpec:  # rows over the batch axes, channels not split
            axes = {"B": BATCH_AXES, "D": None}
            return PartitionSpec(*(axes.get(n, DIMENSIONS.get(n)) for n in names))

        kernel_spec = PartitionSpec(*(DIMENSIONS.get(n) for n in right))

        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(whole(left), kernel_spec), out_specs=whole(out),
            check_vma=False,
        )  # fmt: skip
        def local(x: Array, kernel: Array) -> Array:
            if "D" in right:
                kernel = jax.lax.all_gather(kernel, width, axis=right.index("D"), tiled=True)
            y = jnp.einsum(equation, x, kernel)
            return jax.lax.psum(y, summed) if summed else y

        return local(x, kernel)

    def conv(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
        @functools.partial(mapped, in_specs=(rows, PartitionSpec(None, None, None, width)))
        def local(x: Array, kernel: Array) -> Array:
            kernel = jax.lax.all_gather(kernel, width, axis=3, tiled=True)
            return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)

        return local(x, kernel)

    place = functools.partial(jax.lax.with_sharding_constraint, shardings=batch_sharding(mesh))
    return Layout(place, lookup, _attend(mesh, backend), einsum, conv)


def _attend(mesh: AnyMesh, backend: attention.Backend) -> Callable:
    if backend != "splash":
        return attention.cudnn if backend == "cudnn" else attention.xla
    heads = PartitionSpec(BATCH_AXES, None, DIMENSIONS["N"], None)
    interpret = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"

    def attend(q: Array, k: Array, v: Array, mask: attention.Mask) -> Array:
        # The compiler cannot split a kernel, so each device gets its own rows and heads.
        kernel = functools.partial(attention.splash, mask=mask, interpret=interpret)
        return jax.shard_map(
            kernel, mesh=mesh, in_specs=(heads,) * 3, out_specs=heads, check_vma=False
        )(q, k, v)

    return attend


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """ValueError unless the mesh can split the global batch evenly."""
    shards = batch_shards(mesh)
    if batch_size % shards:
        raise ValueError(
            f"batch_size={batch_size} cannot be split over {shards} batch shards "
            f"(mesh data={mesh.shape['data']} × fsdp={mesh.shape['fsdp']}); choose a multiple of "
            f"{shards} with --batch-size, or another mesh."
        )


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
    "token_embedding": "V D",
    "positional_embedding": "L -",
    "ln_final/scale": "-",
    "ln_final/bias": "-",
    "text_projection": "D E",
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
    rows |= _under("text", TEXT) | _under("text/transformer/resblocks", BLOCK)
    if config.text.projection_bias:
        rows["text/text_projection_bias"] = "-"
    if isinstance(config.vision, ResNetConfig):
        return rows | resnet_rows(config.vision)
    return rows | vit_rows(config.vision)


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
    if vision.projection:
        rows["proj"] = "D E"
    return _under("visual", rows)


def _under(prefix: str, rows: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}/{path}": names for path, names in rows.items()}


def path_name(path: tuple[Any, ...]) -> str:
    """Write a tree path as `visual/conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_shardings(config: CLIPConfig, params: Params, mesh: AnyMesh) -> Params:
    """Look every parameter up in the table. Arrays or shapes in, NamedShardings out."""
    rows = table(config)
    used = set()

    def sharding(path: tuple[Any, ...], x: Any) -> NamedSharding:
        name = path_name(path)
        if name not in rows:
            raise ValueError(f"parameter {name} {x.shape} has no row in sharding.table.")
        used.add(name)
        dims = rows[name].split()
        if len(dims) != len(x.shape):
            raise ValueError(f"parameter {name} {x.shape} does not fit its row {rows[name]!r}.")
        axes = []
        for dim, size in zip(dims, x.shape, strict=True):
            axis = DIMENSIONS.get(dim)
            if axis and size % mesh.shape[axis]:
                raise ValueError(
                    f"{name} {x.shape}: dimension {dim}={size} cannot be split over mesh axis "
                    f"{axis}={mesh.shape[axis]}; change --mesh.{axis}."
                )
            axes.append(axis)
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = jax.tree_util.tree_map_with_path(sharding, params)
    if unused := rows.keys() - used:
        raise ValueError(f"rows of sharding.table match no parameter: {sorted(unused)}.")
    return shardings


def like_params(tree: Any, shardings: Params, mesh: AnyMesh) -> Any:
    """Shard whatever mirrors the parameters (moments, averages) as they are; scalars are copied.

    Raises ValueError for an array whose path does not end in a parameter's path.
    """
    flat = {path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(shardings)}

    def sharding(path: tuple[Any, ...], x: Any) -> NamedSharding:
        if not np.ndim(x):
            return replicated(mesh)
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            if (name := "/".join(parts[start:])) in flat:
                return flat[name]
        raise ValueError(f"{'/'.join(parts)} {x.shape} mirrors no parameter.")

    return jax.tree_util.tree_map_with_path(sharding, tree)
