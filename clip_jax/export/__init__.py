"""Models that run without this package: StableHLO for JAX, ONNX for everything else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from clip_jax.convert import card
from clip_jax.convert.conversion import check_free
from clip_jax.convert.formats import read_weights
from clip_jax.convert.verify import our_outputs, random_inputs, relative_difference
from clip_jax.convert.weights import DType, Weights
from clip_jax.errors import InputError
from clip_jax.export import onnx, stablehlo
from clip_jax.models.clip import CLIPConfig, l2_normalize
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

# Relative differences that each type's rounding explains, over the depth of a model.
BOUNDS: dict[DType, float] = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export, for whom, and whether to verify it."""

    model: AnyPath  # a run's work directory, a model folder, or a foreign file
    output: AnyPath  # folder to write
    # stablehlo: JAX on CPU, CUDA and TPU, without this package; onnx: browsers, phones, servers
    format: Literal["stablehlo", "onnx"]
    dtype: DType = "float32"  # of the weights and the computation; onnx has no bfloat16
    layout: onnx.Layout = "transformers-js"  # with onnx: who loads the folder
    normalize: bool = False  # with onnx: the towers' features have unit length (immich's always)
    # run the result (by onnxruntime or JAX), compare with the model; exit code 1 if they
    # differ by more than the type's rounding: float32 1e-5, float16 0.01, bfloat16 0.03; token ids
    # of a few texts too, which must be the same
    verify: bool = False
    existing: bool = False  # write nothing: verify what lies at the output already
    overwrite: bool = False  # replace what is at the output

    def __post_init__(self) -> None:
        if self.format == "onnx" and self.dtype == "bfloat16":
            raise InputError(
                "dtype='bfloat16': onnxruntime's CPU multiplies none; take --dtype float16, or "
                "--format stablehlo."
            )
        if self.format == "stablehlo" and (self.normalize or self.layout != "transformers-js"):
            raise InputError("--layout and --normalize are choices of --format onnx.")


@dataclass(frozen=True)
class Verification:
    """Relative differences ‖a − b‖/‖b‖ between the export's numbers (a) and the model's (b)."""

    runtime: str
    bound: float
    image_features: float
    text_features: float
    logits: float | None  # None: the folder computes none
    caption_logits: float | None = None  # of a decoder, for all words; None likewise
    texts_with_other_ids: int | None = None  # by the folder's tokenizer.json; None: none

    @property
    def max_relative_difference(self) -> float:
        values = (self.image_features, self.text_features, self.logits, self.caption_logits)
        return float(np.max([x for x in values if x is not None]))  # NaN if one is

    @property
    def passed(self) -> bool:
        return self.max_relative_difference <= self.bound and not self.texts_with_other_ids


def export(config: ExportConfig) -> Verification | None:
    """Write the folder; with `verify` run it and compare with the model's numbers.

    Raises InputError where the model cannot be read or exported, or something is at the output.
    """
    if not config.existing:
        check_free(config.model, config.output, config.overwrite)
        if config.output.is_file():
            raise InputError(f"{config.output} is a file; export writes a folder.")
        files.check_destination(config.output, "the output", folder=True)
    weights = read_weights(config.model)
    if not config.existing:
        with files.written_whole(config.output) as partial:
            partial.mkdir(parents=True, exist_ok=True)
            if config.format == "stablehlo":
                stablehlo.write(weights, partial, dtype=config.dtype)
            else:
                onnx.write(
                    weights, partial, config.layout, dtype=config.dtype, normalize=config.normalize
                )
        card.write(config.output, config.model, weights, _use(config, weights.config))
    if not (config.verify or config.existing):
        return None
    with files.local(config.output) as here:
        return verify(config, weights, here)


def verify(config: ExportConfig, weights: Weights, folder: Path) -> Verification:
    """Run an exported folder and the model on the same random inputs."""
    images, tokens = random_inputs(weights.config)
    ours = our_outputs(weights.config, weights.params, images, tokens)
    runtime = f"jax {jax.__version__}"
    if config.format == "stablehlo":
        theirs = stablehlo.outputs(folder, weights.config, images, tokens)
        if weights.config.decoder is not None:
            spoken = stablehlo.spoken(weights.config, tokens)
            written = our_outputs(weights.config, weights.params, images, spoken)
            ours["caption_logits"] = written["caption_logits"]
    else:
        import onnxruntime

        runtime = f"onnxruntime {onnxruntime.__version__}"
        theirs = onnx.outputs(folder, config.layout, weights.config, config.dtype, images, tokens)
        if config.normalize or config.layout == "immich":
            ours |= {name: l2_normalize(ours[name]) for name in ("image_features", "text_features")}
    differences: dict[str, Any] = dict.fromkeys(ours)
    for name, x in theirs.items():
        if x.shape != ours[name].shape:
            raise InputError(
                f"{folder} gives {name} of shape {list(np.shape(x))}, the model "
                f"{list(ours[name].shape)}: it is another model's."
            )
        differences[name] = relative_difference(x, ours[name])
    if (file := weights.config.text.tokenizer.file) == "clip" or (file and config.format == "onnx"):
        layout = config.layout if config.format == "onnx" else None
        differences["texts_with_other_ids"] = onnx.other_ids(folder, layout, weights.config.text)
    return Verification(runtime, BOUNDS[config.dtype], **differences)


def _use(config: ExportConfig, model: CLIPConfig) -> str:
    name, captions = config.output.name, ""
    if model.decoder is not None:
        captions = (
            f"The model writes captions, which end with the id {model.text.end_id}; "
            "`docs/how-to/export.md` of clip_jax shows the loop that decodes them.\n\n"
        )
    if config.format == "stablehlo":
        reader = stablehlo.READER.replace("{folder}", name)
        return (
            "JAX alone reads it, on CPU, CUDA and TPU; `images.npy` [batch, height, width, 3] are "
            "normalised pixels,\n`tokens.npy` [batch, tokens] ids as `manifest.json` says:\n\n"
            f"```python\n{reader}```\n\n"
            f"{captions}`clip_jax.load` reads the folder too."
        )
    if config.layout == "immich":
        return (
            "A folder for immich's machine learning: `visual/`, `textual/`, features of length 1."
        )
    dtype = "fp16" if config.dtype == "float16" else "fp32"
    return (
        "transformers.js reads it:\n\n```js\n"
        "import { pipeline } from '@huggingface/transformers';\n"
        f"const classify = await pipeline('zero-shot-image-classification', '{name}',"
        f" {{ dtype: '{dtype}' }});\nconst found = await classify('photo.png', ['cat', 'dog']);\n"
        "```\n\n`onnx/model*.onnx` is the whole CLIP, `vision_model` and `text_model` its towers; "
        f"any ONNX runtime takes them.\n\n{captions}"
    ).rstrip()
