"""An ONNX graph under construction: operators become nodes, arrays become initializers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.convert.state_dict import flatten
from clip_jax.errors import InputError
from clip_jax.models.clip import Params
from clip_jax.models.layers import Activation

OPSET = 20  # first version with Gelu
IR_VERSION = 9  # that of opset 20
INLINE_BYTES = 1_900_000_000  # most weights in one protobuf, whose limit is 2 GB

_ALIGNED = 4096  # bytes; alignment for memory-mapping weights


class Graph:
    """Nodes and weights of one graph; values are referred to by name, as in ONNX."""

    def __init__(self, params: Params, half: bool) -> None:
        self._weights = {path: np.asarray(x, np.float32) for path, x in flatten(params).items()}
        self._half = half
        self._nodes: list[Any] = []
        self._constants: dict[str, np.ndarray] = {}

    def weight(self, path: str, layer: int | None = None) -> np.ndarray:
        """Return a parameter in float32; with `layer`, that layer's of a stack."""
        array = self._weights[path]
        return array if layer is None else array[layer]

    def has(self, path: str) -> bool:
        return path in self._weights

    def op(self, kind: str, *inputs: str | np.ndarray | np.generic, **attributes: Any) -> str:
        """Add a node; arrays among its inputs become constants. Returns its output's name."""
        from onnx import helper

        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        name = f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, names, [name], name=name, **attributes))
        return name

    def constant(self, array: np.ndarray | np.generic) -> str:
        """Add an array unchanged and return its name; equal small arrays are added once."""
        array = np.asarray(array)
        small = array.nbytes <= 64
        key = f"{array.dtype}{array.shape}{array.tobytes().hex()}" if small else ""
        name = key or f"weight_{len(self._constants)}"
        self._constants[name] = array
        return name

    def number(self, array: Any, what: str = "a weight") -> np.ndarray:
        """Cast floats to the graph's type. Raises InputError if float16 would overflow."""
        exact = np.asarray(array, np.float32)
        if not self._half:
            return exact
        with np.errstate(over="ignore"):
            rounded = exact.astype(np.float16)
        if not np.isfinite(rounded).all():
            most = np.abs(exact).max()
            raise InputError(
                f"{what} has values up to {most:.3g}, and float16 ends at 65,504; use "
                "--dtype float32."
            )
        return rounded

    # -------------------------------------------------------------- layers

    def cast(self, x: str, dtype: Any) -> str:
        """Cast a value to a NumPy dtype."""
        from onnx import helper

        return self.op("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def computed(self, x: str) -> str:
        """Cast an input to the graph's type."""
        return self.cast(x, np.float16) if self._half else x

    def exact(self, x: str) -> str:
        """Cast a value to float32."""
        return self.cast(x, np.float32) if self._half else x

    def integers(self, *values: int) -> np.ndarray:
        return np.array(values, np.int64)

    def linear(self, x: str, kernel: np.ndarray, bias: np.ndarray | None = None) -> str:
        """Add x · kernel [in, out] + bias [out]."""
        x = self.op("MatMul", x, self.number(kernel))
        return x if bias is None else self.op("Add", x, self.number(bias))

    def layer_norm(self, x: str, path: str, epsilon: float, layer: int | None = None) -> str:
        names = [name for name in ("scale", "bias") if self.has(f"{path}/{name}")]
        arrays = (self.number(self.weight(f"{path}/{name}", layer)) for name in names)
        return self.op("LayerNormalization", x, *arrays, axis=-1, epsilon=epsilon)

    def activation(self, x: str, kind: Activation) -> str:
        if kind in ("quick_gelu", "swiglu"):
            scaled = self.op("Mul", x, self.number(1.702)) if kind == "quick_gelu" else x
            return self.op("Mul", x, self.op("Sigmoid", scaled))
        if kind == "relu":
            return self.op("Relu", x)
        return self.op("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")

    def dense(self, x: str, path: str, layer: int | None = None) -> str:
        """Add the linear map at a path, its kernel reshaped to a matrix."""
        kernel = self.weight(f"{path}/kernel", layer)
        if not self.has(f"{path}/bias"):
            # The projection after heads maps all axes but the last, others map the first.
            columns = kernel.shape[-1] if path.endswith("out_proj") else kernel[0].size
            return self.linear(x, kernel.reshape(-1, columns))
        bias = self.weight(f"{path}/bias", layer)
        if path.endswith("in_proj") and len(bias) == 2:  # of queries and values
            bias = np.insert(bias, 1, 0, axis=0)
        return self.linear(x, kernel.reshape(-1, bias.size), bias.reshape(-1))

    def heads(self, x: str, path: str, layer: int | None = None) -> list[str]:
        """Add the linear map at a path; return queries, keys or values, each [B, N, L, K]."""
        _, *many, heads, dim = self.weight(f"{path}/kernel", layer).shape
        count = many[0] if many else 1
        x = self.op("Reshape", self.dense(x, path, layer), self.integers(0, 0, count, heads, dim))
        x = self.op("Transpose", x, perm=[2, 0, 3, 1, 4])
        return [self.op("Gather", x, np.int64(index), axis=0) for index in range(count)]

    def attention(
        self,
        out: str,
        q: str,
        k: str,
        v: str,
        *,
        layer: int | None = None,
        mask: str | None = None,
        norm: tuple[str, float] | None = None,
    ) -> str:
        """Add attention of [B, N, L, K], and the linear map at `out` after it.

        Scores and their softmax are float32. `norm` is the path and epsilon of a LayerNorm between.
        """
        heads, dim, _ = self.weight(f"{out}/kernel", layer).shape
        q = self.op("Mul", q, self.number(dim**-0.5))
        scores = self.exact(self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2])))
        if mask is not None:
            scores = self.op("Add", scores, mask)
        shares = self.computed(self.op("Softmax", scores, axis=-1))
        x = self.op("Transpose", self.op("MatMul", shares, v), perm=[0, 2, 1, 3])
        x = self.op("Reshape", x, self.integers(0, 0, heads * dim))
        return self.dense(self.layer_norm(x, *norm, layer) if norm else x, out, layer)

    def mean(self, x: str, valid: str | None = None) -> str:
        """Add the mean over the tokens of [B, L, D]; over those that are 1 in `valid` [B, L]."""
        if valid is None:
            return self.op("ReduceMean", x, self.integers(1), keepdims=0)
        count = self.op("ReduceSum", valid, self.integers(1), keepdims=1)
        shares = self.op("Div", valid, self.op("Max", count, np.float32(1)))
        shares = self.computed(self.op("Unsqueeze", shares, self.integers(1)))
        return self.op("Squeeze", self.op("MatMul", shares, x), self.integers(1))

    def unit(self, x: str) -> str:
        """Add the scaling of rows to unit length."""
        length = self.op("ReduceL2", x, self.integers(-1), keepdims=1)
        return self.op("Div", x, self.op("Max", length, np.float32(1e-12)))

    # -------------------------------------------------------------- the file

    def save(
        self,
        path: Path,
        inputs: Sequence[tuple[str, Any, Sequence[str | int]]],
        outputs: Sequence[tuple[str, str, Sequence[str | int]]],
        inline_bytes: int = INLINE_BYTES,
    ) -> bool:
        """Write the graph to `path`; weights above `inline_bytes` go to `path` + "_data".

        Inputs are (name, NumPy type, shape), outputs (name, value, shape); a string in a shape is a
        dynamic size. Returns whether there is a second file.
        """
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        ends = [helper.make_node("Identity", [x], [name], name=name) for name, x, _ in outputs]
        external = sum(x.nbytes for x in self._constants.values()) > inline_bytes
        if external:
            tensors = list(self._external(path.with_name(f"{path.name}_data")))
        else:
            tensors = [numpy_helper.from_array(x, name) for name, x in self._constants.items()]
        kinds = {name: helper.np_dtype_to_tensor_dtype(np.dtype(x)) for name, x, _ in inputs}
        value_info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self._nodes + ends,
            path.stem,
            [value_info(name, kinds[name], shape) for name, _, shape in inputs],
            [value_info(name, TensorProto.FLOAT, shape) for name, _, shape in outputs],
            tensors,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="clip_jax",
        )
        onnx.save_model(model, str(path))
        return external

    def _external(self, path: Path) -> Iterator[Any]:
        """Write the constants to a file; yield tensors that refer to it.

        Small ones stay in the graph, since shape inference needs them.
        """
        from onnx import TensorProto, helper, numpy_helper

        with path.open("wb") as file:
            for name, x in self._constants.items():
                if x.nbytes < _ALIGNED:
                    yield numpy_helper.from_array(x, name)
                    continue
                file.write(b"\0" * (-file.tell() % _ALIGNED))
                kind = helper.np_dtype_to_tensor_dtype(x.dtype)
                tensor = TensorProto(name=name, data_type=kind, dims=x.shape)
                tensor.data_location = TensorProto.EXTERNAL
                where = {"location": path.name, "offset": file.tell(), "length": x.nbytes}
                for key, value in where.items():
                    tensor.external_data.add(key=key, value=str(value))
                file.write(np.ascontiguousarray(x).tobytes())
                yield tensor
