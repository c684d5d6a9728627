"""The device mesh and the table that says how every parameter is sharded over it.

The table maps a parameter's path to the names of its dimensions (`CLIPConfig.dimensions`, defined
by each module for its own parameters), and these to mesh axes (`DIMENSIONS`). Parameters that the
model does not have, and missing ones, are errors that name them.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from clip_jax.display import Display
from clip_jax.errors import InputError, check_ranges
from clip_jax.models import attention
from clip_jax.models.clip import CLIPConfig, Params, path_name
from clip_jax.models.layers import Layout

AnyMesh = Mesh | AbstractMesh  # of devices, or of the axis sizes alone
AXES = ("data", "fsdp", "tensor")  # of a mesh, in the order of its devices
BATCH_AXES = AXES[:2]
ROWS = 256  # default number of rows per batch, over all devices
DIMENSIONS = {"D": "fsdp", "N": "tensor", "F": "tensor", "V": "tensor"}
# A token embedding is sharded along its width: a vocabulary of 901,629, say, does not divide.
WIDTH = ("tensor", "fsdp")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis; at most one may be −1, for all that remain."""

    data: int = -1  # Data parallelism: the batch is sharded, parameters are replicated.
    # Devices that split batch, parameters and optimizer state (fully sharded data parallelism).
    fsdp: int = 1
    # Devices that split attention heads and MLP channels (tensor parallelism).
    tensor: int = 1

    def __post_init__(self) -> None:
        check_ranges(self, "mesh.", **dict.fromkeys(AXES, "[-1, inf)"))
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes or sizes.count(-1) > 1:
            raise InputError(
                f"mesh sizes must be positive, at most one of them -1, got --mesh.data={self.data} "
                f"--mesh.fsdp={self.fsdp} --mesh.tensor={self.tensor}."
            )


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Return the devices along each axis. Raises InputError unless all are used."""
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        others = -math.prod(sizes)
        sizes[sizes.index(-1)] = max(devices // others, 1)
    if math.prod(sizes) != devices:
        raise InputError(
            f"mesh data={config.data} × fsdp={config.fsdp} × tensor={config.tensor} does not use "
            f"all {devices} devices; change --mesh.data, --mesh.fsdp or --mesh.tensor."
        )
    return sizes[0], sizes[1], sizes[2]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices (default: all) as `data × fsdp × tensor`, every axis Auto.

    >>> import clip_jax
    >>> mesh = clip_jax.make_mesh(clip_jax.MeshConfig(fsdp=1))
    >>> mesh.axis_names
    ('data', 'fsdp', 'tensor')
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1 or devices[0].platform != "tpu":
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif sizes[0] % len(slices):
        raise InputError(
            f"mesh data={sizes[0]} must be a multiple of the {len(slices)} slices, since only the "
            "data axis may span slices; change --mesh.data, --mesh.fsdp or --mesh.tensor."
        )
    else:
        array = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // len(slices), *sizes[1:]),
            (len(slices), 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_mesh(
    config: MeshConfig, devices: int, device: AbstractDevice | None = None
) -> AbstractMesh:
    """Return the mesh of devices that are not at hand, of the kind of `device`. Raises InputError
    unless all are used."""
    sizes, types = mesh_sizes(config, devices), (AxisType.Auto,) * 3
    return AbstractMesh(sizes, AXES, axis_types=types, abstract_device=device)


def batch_shards(mesh: AnyMesh) -> int:
    """Return the number of shards of a global batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def shards_of_heads(mesh: AnyMesh) -> int:
    """Return over how many devices the heads of attention are split."""
    return mesh.shape[DIMENSIONS["N"]]


def data_part(mesh: Mesh) -> tuple[int, int]:
    """Return which shard of every global batch this process reads, and the number of shards.

    Processes whose devices hold the same rows (along `tensor`) read the same shard. Raises
    InputError if the processes' shards are unequal or overlap.
    """
    owners = mesh.devices.reshape(batch_shards(mesh), -1)
    rows: dict[int, set[int]] = {}
    for shard, devices in enumerate(owners):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(shard)
    parts = sorted({tuple(sorted(shards)) for shards in rows.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != len(owners):
        raise InputError(
            f"mesh {dict(mesh.shape)} gives the {len(rows)} processes unequal shards of a batch; "
            "set --mesh.tensor to a divisor or a multiple of the devices per process."
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Shard rows over the batch axes, and no other dimension."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_rows(
    rows: Shaped[np.ndarray, "B ..."], length: int, on: NamedSharding
) -> Shaped[Array, "length ..."]:
    """Pad rows by zeros to `length`; put them on the mesh. Every process must have all of them."""
    if len(rows) < length:
        rows = np.pad(rows, [(0, length - len(rows)), *[(0, 0)] * (rows.ndim - 1)])
    return jax.make_array_from_callback(rows.shape, on, rows.__getitem__)


def compute_batches(
    function: Callable[..., Any], batches: Iterable[tuple[Any, ...]], display: Display
) -> Shaped[np.ndarray, "B ..."]:
    """Run a compiled function on batches that are on the mesh, and join the results."""
    results: list[Any] = []
    for batch in batches:
        if results:  # one behind, so that the devices never wait for the host
            results[-1] = np.asarray(results[-1])
        results.append(function(*batch))
        display.add(len(results[-1]))
    return np.concatenate([np.asarray(x) for x in results])


def in_batches(
    function: Callable[..., Any],
    mesh: Mesh,
    params: Any,
    *rows: Any,
    batch_size: int = ROWS,
    name: str = "",
) -> Shaped[np.ndarray, "B ..."]:
    """Run a compiled function of parameters and rows over all rows, `batch_size` at a time.

    Rows are images or token ids, which every process has. The last batch is padded with zeros,
    whose results are dropped. With a `name`, more than a few batches show a progress bar.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1.")
    count, shards = len(jax.tree.leaves(rows)[0]), batch_shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    starts = range(0, max(count, 1), batch_size)  # without rows, zeros give the result's shape

    def batch_at(start: int) -> tuple[Any, ...]:
        length = padded_size(min(count - start, batch_size), shards, batch_size)

        def put(x: Any) -> Array:
            return put_rows(np.asarray(x[start : start + batch_size]), length, batch_sharding(mesh))

        return params, *jax.tree.map(put, rows)

    with Display(name, count, quiet=not name or len(starts) < 8) as display:
        return compute_batches(function, map(batch_at, starts), display)[:count]


def padded_size(rows: int, shards: int, batch_size: int) -> int:
    """Return how many rows to compute for `rows`: a power of two for each of `shards` devices, at
    most the full batch; so few shapes are compiled."""
    each = -(-rows // shards)
    return shards * min(batch_size // shards, 1 << max(each - 1, 0).bit_length())


def layout(mesh: AnyMesh, backend: attention.Backend = "xla") -> Layout:
    """Shard activations by rows only, and gather parameters where they are used.

    Otherwise the compiler may shard activations like the parameters: by channel over `fsdp`, with
    an all-reduce at every matmul.
    """
    rows = PartitionSpec(BATCH_AXES)
    width = DIMENSIONS["D"]
    # In a shard_map a parameter's gradient is reduce-scattered to the parameter's sharding. Without
    # check_vma, the sum over `data` comes last, of the shards alone.
    mapped = functools.partial(jax.shard_map, mesh=mesh, out_specs=rows, check_vma=False)

    def gather(x: Array, over: str, axis: int) -> Array:
        # On an axis of one device, a CPU would copy an image tower's kernels for every batch.
        return jax.lax.all_gather(x, over, axis=axis, tiled=True) if mesh.shape[over] > 1 else x

    @functools.partial(mapped, in_specs=(PartitionSpec(None, WIDTH), rows))
    def lookup(table: Float[Array, "V w"], ids: Int[Array, "b L"]) -> Float[Array, "b L D"]:
        # Each device looks up its own width for the texts of all that share the table, and sends
        # the others theirs: b·L·D numbers, where the table would be V·D.
        x = table[gather(ids, width, 0)]
        if mesh.shape[width] > 1:
            x = jax.lax.all_to_all(x, width, split_axis=0, concat_axis=2, tiled=True)
        return gather(x, WIDTH[0], 2)

    def einsum(equation: str, x: Array, kernel: Array) -> Array:
        left, right, out = re.split(",|->", equation)
        over = {DIMENSIONS[n] for n in left if n in right and n not in out and n in "NF"}
        summed = [axis for axis in over if mesh.shape[axis] > 1]

        def spec_of(names: str) -> PartitionSpec:  # rows over the batch axes, channels not split
            axes = {"B": BATCH_AXES, "D": None}
            return PartitionSpec(*(axes.get(n, DIMENSIONS.get(n)) for n in names))

        kernel_spec = PartitionSpec(*(DIMENSIONS.get(n) for n in right))

        @functools.partial(mapped, in_specs=(spec_of(left), kernel_spec), out_specs=spec_of(out))
        def local(x: Array, kernel: Array) -> Array:
            if "D" in right:
                kernel = gather(kernel, width, right.index("D"))
            y = jnp.einsum(equation, x, kernel)
            return jax.lax.psum(y, summed) if summed else y

        return local(x, kernel)

    def conv(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
        @functools.partial(mapped, in_specs=(rows, PartitionSpec(None, None, None, width)))
        def local(x: Array, kernel: Array) -> Array:
            kernel = gather(kernel, width, 3)
            return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)

        return local(x, kernel)

    by_rows = functools.partial(jax.lax.with_sharding_constraint, shardings=batch_sharding(mesh))
    whole_heads = mesh.shape[DIMENSIONS["N"]] == 1
    return Layout(by_rows, lookup, _attend(mesh, backend), einsum, conv, whole_heads)


def _attend(mesh: AnyMesh, backend: attention.Backend) -> Callable[..., Array]:
    """Return attention on this mesh; a device's kernel computes its own rows and heads."""
    tensor = DIMENSIONS["N"]
    axes = (BATCH_AXES, None, None, tensor, None)  # of [B, L, S, N, K]; of [B, L, D] heads stay
    specs = {1: axes[:1], 3: axes[:3], 4: axes[:2] + axes[3:], 5: axes}
    specs = {ndim: PartitionSpec(*names) for ndim, names in specs.items()}
    # An abstract mesh runs nothing.
    device: Any = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    interpret = device is not None and device.platform == "cpu"

    def split(kernel: Callable[..., Array], ndim: int) -> Callable[..., Array]:
        mapped = functools.partial(
            jax.shard_map, kernel, mesh=mesh, out_specs=specs[ndim], check_vma=False
        )
        return lambda *arrays: mapped(in_specs=tuple(specs[x.ndim] for x in arrays))(*arrays)

    def attend(
        qkv: attention.QKV, heads: int, causal: bool = False, lengths: attention.Lengths = None
    ) -> Float[Array, "B L *NK"]:
        dim, local_heads = math.prod(qkv.shape[2:]) // 3 // heads, heads // mesh.shape[tensor]
        if local_heads != heads and qkv.ndim != 5:
            raise ValueError(f"qkv {qkv.shape}: sharded heads need five axes [B, L, S, N, K].")
        chosen = backend
        if backend == "auto":
            chosen = attention.choose(device, qkv.shape[1], local_heads, dim, qkv.dtype)
        if chosen == "cudnn" and not isinstance(mesh, Mesh):
            # JAX traces cuDNN's kernel only beside cuDNN; `short` computes and saves the same.
            chosen = "short"
        match chosen:
            case "short":
                from clip_jax.models.short_attention import short  # imports Pallas

                attention.check_short(device, qkv.shape[1], local_heads, dim, qkv.dtype)
                vmem = attention.vmem(device)
                return short(qkv, lengths, local_heads, causal, split, interpret, vmem)
            case "splash":

                def kernel(qkv: Array, lengths: attention.Lengths = None) -> Array:
                    return attention.splash(qkv, local_heads, causal, lengths, interpret=interpret)

                arrays = (qkv,) if lengths is None else (qkv, lengths)
                return split(kernel, 3 if qkv.ndim == 3 else 4)(*arrays)
            case "cudnn":
                return attention.cudnn(qkv, heads, causal, lengths)
        return attention.xla(qkv, heads, causal, lengths)

    return attend


def check_batch_size(batch_size: int, mesh: AnyMesh) -> None:
    """Raise InputError unless the mesh can split the global batch evenly."""
    shards = batch_shards(mesh)
    if batch_size % shards:
        raise InputError(
            f"batch_size={batch_size} cannot be split over {shards} batch shards "
            f"(mesh data={mesh.shape['data']} × fsdp={mesh.shape['fsdp']}); choose a multiple of "
            f"{shards} with --batch-size or --lengths.multiple, or another mesh."
        )


def param_shardings(
    config: CLIPConfig, params: Params, mesh: AnyMesh, rows: Mapping[str, str] | None = None
) -> Params:
    """Return the NamedSharding of every parameter, from arrays or shapes.

    `rows` are the names of their dimensions, by default those of the model alone.
    """
    rows = rows or config.dimensions()
    used = set()

    def sharding(path: tuple[Any, ...], x: Any) -> NamedSharding:
        name = path_name(path)
        if name not in rows:
            raise ValueError(f"the model has no parameter {name} {x.shape}.")
        used.add(name)
        dims = rows[name].split()
        if len(dims) != len(x.shape):
            raise ValueError(f"parameter {name} {x.shape} must have dimensions {rows[name]!r}.")
        axes = [WIDTH if dim == "W" else DIMENSIONS.get(dim) for dim in dims]
        for dim, size, axis in zip(dims, x.shape, axes, strict=True):
            parts = {a: mesh.shape[a] for a in ([axis] if isinstance(axis, str) else axis or ())}
            if size % math.prod(parts.values()):
                over = " × ".join(f"{a}={n}" for a, n in parts.items())
                raise InputError(
                    f"{name} {x.shape}: dimension {dim}={size} cannot be split over mesh axis "
                    f"{over}; change " + " or ".join(f"--mesh.{a}" for a in parts) + "."
                )
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = jax.tree_util.tree_map_with_path(sharding, params)
    if unused := rows.keys() - used:
        raise ValueError(f"parameters of the model are missing: {sorted(unused)}.")
    return shardings


def like_params(
    tree: Any, shardings: Params, mesh: AnyMesh, others: NamedSharding | None = None
) -> Any:
    """Shard arrays that mirror parameters (moments, averages) like them; scalars are replicated.

    A dimension of length 1, along which a moment is a mean, is not split. An array whose path does
    not end in a parameter's path gets the sharding `others`; without it, ValueError is raised.
    """
    flat = {path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(shardings)}

    def sharding(path: tuple[Any, ...], x: Any) -> NamedSharding:
        if not np.ndim(x):
            return replicated(mesh)
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            if (name := "/".join(parts[start:])) in flat:
                axes = zip(x.shape, flat[name].spec, strict=True)
                spec = PartitionSpec(*(None if size == 1 else axis for size, axis in axes))
                return NamedSharding(mesh, spec)
        if others is not None:
            return others
        raise ValueError(f"{'/'.join(parts)} {x.shape} mirrors no parameter.")

    return jax.tree_util.tree_map_with_path(sharding, tree)
