"""PEFT's format of low-rank adapters, beside a folder of Hugging Face's CLIP or SigLIP model.

Facts are from huggingface/peft: `tuners/lora`, `utils/save_and_load.py`. Of `out_proj` in SigLIP's
pooling head, PEFT ignores an adapter until it is merged: adapters of that attention are refused.
"""

import fnmatch
import functools
import itertools
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from clip_jax.convert import hugging_face, verify
from clip_jax.convert.on_demand import loaded, read_together
from clip_jax.convert.settings import Settings, number_of, read_json, write_json
from clip_jax.convert.state_dict import check_floating, flatten, from_params, to_params
from clip_jax.convert.target import Inexpressible, Target
from clip_jax.convert.tensor_files import Tensors, read_tensors, write_safetensors
from clip_jax.convert.weights import Adapters, DType, Weights, cast
from clip_jax.errors import InputError, naming
from clip_jax.models import lora
from clip_jax.models.clip import Params

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_BASE = "base_model_name_or_path"  # in the configuration: the weights that adapters change
_PREFIX = "base_model.model."
_POOLING = "vision_model.head.attention"
# Settings that do not change what adapters compute, or that `read` follows; values of others.
_KNOWN = (
    "alpha_pattern",
    "auto_mapping",
    _BASE,
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
)
# PEFT's patterns of modules are regular expressions, some of which never end. Names with `.` and
# `.*` are also patterns of fnmatch, which takes linear time.
_PATTERN = re.compile(r"\^?(?:[\w-]|\\\.|\.\*|\.){1,200}\$?")
_MOST_PATTERNS = 10_000
_ADVICE = "merge the adapters in PEFT (merge_and_unload), and convert the result."
_VALUES = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}


def _adapters_of(weights: Weights) -> Adapters:
    if weights.adapters is None:
        raise Inexpressible("--to peft needs a run that trains `lora`, and its own image size")
    return weights.adapters


def check(weights: Weights) -> None:
    """Raise Inexpressible if the model has no adapters, or PEFT cannot have them."""
    settings = _adapters_of(weights).lora
    hugging_face.check(weights)
    rows = {row.ours: row for row in hugging_face.rows(weights.config)}
    for each in lora.adapted(weights.config, settings):
        is_pooling = rows[each.kernel].names[0].startswith(_POOLING)
        if is_pooling or each.kernel == "visual/conv1/kernel":
            raise Inexpressible(
                f"PEFT cannot have adapters of {each.kernel}", "leave it out of lora.targets"
            )


def write(weights: Weights, folder: Path, *, dtype: DType | None = None) -> None:
    """Write a run's adapters. Raises Inexpressible as `check` does."""
    check(weights)
    adapters = _adapters_of(weights)
    rows = {row.ours: row for row in hugging_face.rows(weights.config)}
    flat, tensors, rank = flatten(adapters.params), {}, adapters.lora.rank
    for each in lora.adapted(weights.config, adapters.lora):
        row, blocks, parts = rows[each.kernel], math.prod(each.depth), sum(each.chosen)
        a, b = (np.asarray(flat[f"{each.prefix}lora_{name}"]) for name in "ab")
        a, b = a.reshape(blocks, -1, parts, rank), b.reshape(blocks, parts, rank, -1)
        for block in range(blocks):
            for part, name in enumerate(itertools.compress(row.names_of(block), each.chosen)):
                module = _PREFIX + name.removesuffix(".weight")
                tensors[f"{module}.lora_A.weight"] = cast(a[block, :, part].T, dtype)
                tensors[f"{module}.lora_B.weight"] = cast(b[block, part].T, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    modules = sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors})
    write_json(
        folder / CONFIG_NAME,
        {
            **_VALUES,
            _BASE: adapters.base,
            "r": rank,
            "lora_alpha": adapters.lora.alpha,
            "use_rslora": adapters.lora.rank_stabilized,
            "target_modules": modules,
            "inference_mode": True,
        },
    )


def _pattern(text: str, where: str) -> re.Pattern[str]:
    """Compile a key of `alpha_pattern`, which matches a module's name, or its end after a dot."""
    if not _PATTERN.fullmatch(text):
        raise InputError(
            f"{where}: the pattern {text!r:.99} is not supported: it must be a module's name, in "
            f"which .* is any text; {_ADVICE}"
        )
    glob = re.sub(
        r"\\\.|\.\*|\.", lambda x: {"\\.": ".", ".*": "*", ".": "?"}[x[0]], text.strip("^$")
    )
    starts = ("",) if text.startswith("^") else ("", "*.")
    return re.compile("|".join(fnmatch.translate(start + glob) for start in starts))


def read(folder: Path, open_base: Callable[[str], Weights]) -> Weights:
    """Read adapters, to be merged on demand into their base, which `open_base` opens by its path.
    Raises InputError for what is not supported, by name."""
    path, file = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    adapters, settings = read_tensors(file), Settings(read_json(path), str(path))
    check_floating(adapters, str(file))
    for name, value in settings.values.items():
        if value and name not in _KNOWN and value not in ("gaussian", _VALUES.get(name)):
            raise InputError(f"{path}: {name}={value!r:.99} is not supported; {_ADVICE}")
    if not (base := settings.get(_BASE, "", str)):
        raise InputError(f"{path}: set base_model_name_or_path to the path of the weights.")
    alphas = settings.get("alpha_pattern", {}, dict)
    if len(alphas) > _MOST_PATTERNS:
        raise InputError(
            f"{path}: alpha_pattern has {len(alphas)} entries, and at most {_MOST_PATTERNS} are "
            f"supported; {_ADVICE}"
        )
    patterns = [(_pattern(text, f"{path}: alpha_pattern"), text) for text in alphas]
    with naming(path):
        weights = open_base(base)

    def merge() -> Params:
        return _merged(weights, adapters, settings, patterns, folder)

    # A base that is a run could else be read by shard, without the adapters.
    return replace(weights, params=read_together(weights.params, merge), read_sharded=None)


def _merged(
    weights: Weights,
    adapters: Tensors,
    settings: Settings,
    patterns: Sequence[tuple[re.Pattern[str], str]],
    folder: Path,
) -> Params:
    """Merge adapters into their base; `patterns` are those of `alpha_pattern`, with their texts."""
    path, file = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    base, alphas = settings.values[_BASE], settings.get("alpha_pattern", {}, dict)
    rows, adapters = hugging_face.rows(weights.config), dict(adapters)
    tensors = from_params(rows, weights.params)
    for module in sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in adapters}):
        key, pair = f"{module}.weight", [f"{_PREFIX}{module}.lora_{x}.weight" for x in "AB"]
        a, b = (np.asarray(adapters.pop(name, ()), np.float32) for name in pair)
        kernel = np.asarray(tensors.get(key, ()), np.float32)
        fits = b.shape[1:] == a.shape[:1] and b.shape[:1] + a.shape[1:] == kernel.shape
        if not fits or not a.size:
            raise InputError(
                f"{file}: {pair[0]} {a.shape} and lora_B {b.shape} fit no linear map of {base}, "
                f"whose {key} is {kernel.shape}; {_ADVICE}"
            )
        if module.startswith(_POOLING) and b.any():
            raise InputError(f"{file}: PEFT ignores {pair[0]} until it is merged; {_ADVICE}")
        text = next((text for pattern, text in patterns if pattern.match(module)), None)
        alpha = number_of(alphas.get(text, settings.number("lora_alpha", 8)), f"{path}: {text}")
        scale = alpha / (len(a) ** 0.5 if settings.values.get("use_rslora") else len(a))
        tensors[key] = kernel + np.float32(scale) * (b @ a)
    if adapters:
        raise InputError(f"{file}: {min(adapters)} is not supported; {_ADVICE}")
    return loaded(to_params(rows, tensors, weights.config, str(folder)))


def _rounded(weights: Weights, dtype: DType | None) -> Params:
    adapters = _adapters_of(weights)
    arrays = jax.tree.map(lambda x: cast(x, dtype), adapters.params)
    return lora.merge(adapters.weights, arrays, weights.config, adapters.lora)


def _load(weights: Weights, path: Path) -> verify.Reference:
    """Load a run's adapters by PEFT, upon a copy of the weights that the run began with."""
    with tempfile.TemporaryDirectory() as folder:
        base = replace(weights, params=_adapters_of(weights).weights)
        hugging_face.write(base, Path(folder))
        return load_upon(weights, path, Path(folder))


def load_upon(weights: Weights, path: Path, base: Path) -> verify.Reference:
    """Load adapters by PEFT, upon a folder of Hugging Face's."""
    with verify.library("peft", "peft"):
        from peft import PeftModel

        adapt = functools.partial(PeftModel.from_pretrained, model_id=path)
        return hugging_face.load(weights, base, adapt, "peft")


def base_of(folder: Path) -> str:
    """Return the path of the weights that the adapters of a folder change."""
    return Settings(read_json(folder / CONFIG_NAME), str(folder)).get(_BASE, "", str)


TARGET = Target(
    write=write,
    load=_load,
    rounded=_rounded,
    check=check,
    names=(CONFIG_NAME, WEIGHTS_NAME),
    use="`peft.PeftModel.from_pretrained(BASE, FOLDER)`, where BASE is transformers' model of the "
    "weights at `base_model_name_or_path`. If these are no Hugging Face folder, write one by "
    "`clip-jax convert` with `--to hugging-face`. `clip_jax.load(FOLDER)` merges the adapters.",
)
