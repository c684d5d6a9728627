"""PEFT's format of low-rank adapters, beside a folder of Hugging Face's CLIP or SigLIP model.

Facts are from huggingface/peft: `tuners/lora`, `utils/save_and_load.py`. SigLIP's pooling head is
an `nn.MultiheadAttention` there, in which PEFT ignores an adapter until it is merged: adapters
of that attention are refused.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.convert import hugging_face, verify
from clip_jax.convert.settings import read_json, write_json
from clip_jax.convert.state_dict import flatten, from_params, to_params
from clip_jax.convert.target import Target
from clip_jax.convert.tensor_files import Tensors, read_tensors, write_safetensors
from clip_jax.convert.weights import DType, Weights, cast
from clip_jax.errors import InputError
from clip_jax.models.lora import adapted

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings that change what an adapter computes, and the values that are supported.
_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "use_dora": (None, False), "bias": (None, "none"),
    "modules_to_save": (None, []), "fan_in_fan_out": (None, False), "lora_bias": (None, False),
    "layer_replication": (None,), "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}  # fmt: skip


def write(weights: Weights, folder: Path, *, dtype: DType | None = None) -> None:
    """Write a run's adapters. Raises InputError if the model has none, or PEFT cannot have them."""
    if weights.adapters is None:
        raise InputError("--to peft writes low-rank adapters: convert a run that trains `lora`.")
    lora, arrays, base = weights.adapters
    names = {row.ours: row for row in hugging_face.rows(weights.config)}
    flat, tensors = flatten(arrays), {}
    for each in adapted(weights.config, lora):
        modules = [name.removesuffix(".weight") for name in names[each.kernel].names]
        if "head.attention" in modules[0] or each.kernel == "visual/conv1/kernel":
            raise InputError(
                f"PEFT cannot have adapters of {', '.join(each.names)}: leave it out of "
                "lora.targets, or convert to hugging-face, which merges them."
            )
        stack = len(each.depth)
        a, b = (np.asarray(flat[f"{each.prefix}lora_{name}"], np.float32) for name in "ab")
        a = a.reshape(*each.depth, -1, *a.shape[-2:])
        b = b.reshape(*b.shape[: stack + 2], -1)
        for block in range(each.depth[0] if stack else 1):
            blocks = names[each.kernel].names_of(block) if stack else names[each.kernel].names
            for part, name in enumerate(blocks):
                if each.chosen[part]:
                    module = _PREFIX + name.removesuffix(".weight")
                    first, second = (x[block] if stack else x for x in (a, b))
                    tensors[f"{module}.lora_A.weight"] = cast(first[:, part].T, dtype)
                    tensors[f"{module}.lora_B.weight"] = cast(second[part].T, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    modules = sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors})
    write_json(folder / CONFIG_NAME, {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": lora.rank,
        "lora_alpha": lora.alpha, "use_rslora": lora.rank_stabilized, "target_modules": modules,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    })  # fmt: skip


def read(folder: Path, read_base: Callable[[str], Weights]) -> Weights:
    """Read adapters and merge them into their base, which `read_base` reads by its path. Raises
    InputError for what is not supported, by name."""
    path = folder / CONFIG_NAME
    content = read_json(path)
    for name, values in _SUPPORTED.items():
        if content.get(name) not in values:
            raise InputError(
                f"{path}: {name}={content.get(name)!r} is not supported. Merge the adapters in "
                "PEFT (merge_and_unload), and read the result."
            )
    base = content.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{path} does not name its base: set base_model_name_or_path to its path.")
    weights = read_base(base)
    rows = hugging_face.rows(weights.config)
    tensors = {name: np.asarray(x) for name, x in from_params(rows, weights.params).items()}
    adapters = read_tensors(folder / WEIGHTS_NAME)
    for name in sorted(adapters):
        module, _, kind = name.removeprefix(_PREFIX).rpartition(".lora_")
        if kind == "B.weight":
            continue
        other, kernel = f"{_PREFIX}{module}.lora_B.weight", f"{module}.weight"
        if kind != "A.weight" or other not in adapters or kernel not in tensors:
            raise InputError(
                f"{folder / WEIGHTS_NAME}: {name} is no adapter of a linear map of {base}."
            )
        tensors[kernel] = _changed(tensors[kernel], adapters, name, other, module, content)
    params = to_params(rows, tensors, weights.config, str(folder))
    return replace(weights, params=params)


def _changed(
    kernel: np.ndarray, adapters: Tensors, first: str, second: str, module: str,
    content: Mapping[str, Any],
) -> np.ndarray:  # fmt: skip
    """Return kernel + scale · B·A, with the module's own rank and alpha."""

    def own(pattern: str, default: Any) -> float:
        values = content.get(pattern) or {}
        keys = (key for key in values if re.match(rf"(.*\.)?({key})$", module))
        return float(values.get(next(keys, ""), default))

    a, b = (np.asarray(adapters[name], np.float32) for name in (first, second))
    if a.ndim != 2 or b.ndim != 2 or (len(b), a.shape[1]) != (len(kernel), kernel[0].size):
        raise InputError(f"{first} {a.shape} and {second} {b.shape} do not fit {kernel.shape}.")
    rank, alpha = (
        own("rank_pattern", content.get("r", 8)),
        own("alpha_pattern", content["lora_alpha"]),
    )
    scale = np.float32(alpha / (rank**0.5 if content.get("use_rslora") else rank))
    return np.asarray(kernel, np.float32) + (scale * (b @ a)).reshape(kernel.shape)


def _outputs(weights: Weights, path: Path, inputs: verify.Inputs) -> verify.Outputs:
    raise verify.Unverifiable("adapters need the folder of their base; see tests/reference")


TARGET = Target(
    write=write, reference="peft", outputs=_outputs, names=(CONFIG_NAME, WEIGHTS_NAME),
    use="`peft.PeftModel.from_pretrained(BASE, FOLDER)`, where BASE is the Hugging Face model "
    "of the weights that the adapters change (`base_model_name_or_path`).",
)  # fmt: skip
