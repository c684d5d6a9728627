"""Export models that run without this package: StableHLO for JAX, ONNX for everything else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from clip_jax.convert import card
from clip_jax.convert.conversion import check_free
from clip_jax.convert.formats import read_weights
from clip_jax.convert.target import Inexpressible
from clip_jax.convert.verify import Verification, our_outputs, random_inputs, relative_difference
from clip_jax.convert.weights import DType, Weights
from clip_jax.errors import InputError, check_ranges
from clip_jax.export import onnx, patches, stablehlo
from clip_jax.models.clip import CLIPConfig, l2_normalize
from clip_jax.models.generation import begin_and_end
from clip_jax.models.images import NaFlex
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

# Bounds of relative differences that rounding causes over the depth of a model.
BOUNDS: dict[DType, float] = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}

_JS = """\
import { pipeline } from '@huggingface/transformers';
const classify = await pipeline('zero-shot-image-classification', 'FOLDER', { dtype: 'DTYPE' });
const results = await classify('photo.png', ['cat', 'dog']);
"""
# transformers.js 4 has no class for Siglip2; inputs come from another processor.
_NAFLEX_JS = """\
import { PreTrainedModel } from '@huggingface/transformers';
const options = { dtype: 'DTYPE', model_file_name: 'vision_model' };
const vision = await PreTrainedModel.from_pretrained('FOLDER', options);
const { pooler_output } = await vision({ pixel_values, pixel_attention_mask, spatial_shapes });
"""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a model to StableHLO or ONNX, optionally with a numerical check."""

    # Run directory, RUN@STEP, RUN@best, model folder, weights in another format, or icons, the
    # bundled model.
    model: AnyPath
    output: AnyPath  # Folder to write.
    # Format. stablehlo: for JAX on CPU, CUDA and TPU; onnx: for browsers, phones, servers.
    format: Literal["stablehlo", "onnx"]
    dtype: DType = "float32"  # Type of weights and computation; onnx has no bfloat16.
    # Number of first channels of embeddings, for a model trained for it (Matryoshka). None: all.
    dim: int | None = None
    layout: onnx.Layout = "transformers-js"  # For onnx: program that loads the folder.
    normalize: bool = False  # For onnx: normalise embeddings; immich's always are.
    # Run the export (by onnxruntime or JAX) and compare; exit code 1 if outputs differ by more
    # than 1e-5 (float32), 0.01 (float16) or 0.03 (bfloat16), or token ids of a few texts differ.
    verify: bool = False
    existing: bool = False  # Write nothing; verify the existing output.
    overwrite: bool = False  # Replace an existing output.

    def __post_init__(self) -> None:
        check_ranges(self, dim="[1, inf)")
        if self.format == "onnx" and self.dtype == "bfloat16":
            raise InputError(
                "dtype='bfloat16' is not supported by onnxruntime on CPUs; use --dtype float16 or "
                "--format stablehlo."
            )
        if self.format == "stablehlo" and (self.normalize or self.layout != "transformers-js"):
            raise InputError("--layout and --normalize need --format onnx.")


def export(config: ExportConfig) -> Verification | None:
    """Export a model; with `verify`, run the export and compare its outputs with the model's.

    Raises InputError if the model cannot be read or exported, or the output exists.
    """
    if not config.existing:
        check_free(config.model, config.output, config.overwrite)
        if config.output.is_file():
            raise InputError(
                f"{config.output} is a file; export writes a folder, so choose another output."
            )
        files.check_destination(config.output, "OUTPUT", folder=True)
    weights = read_weights(config.model, dim=config.dim)
    if not config.existing:
        with files.written_whole(config.output) as partial:
            partial.mkdir(parents=True, exist_ok=True)
            if config.format == "stablehlo":
                stablehlo.write(weights, partial, dtype=config.dtype)
            else:
                _write_onnx(weights, partial, config)
        card.write(config.output, config.model, weights, _use(config, weights.config))
    if not (config.verify or config.existing):
        return None
    with files.local(config.output) as here:
        return verify(config, weights, here)


def _write_onnx(weights: Weights, folder: Path, config: ExportConfig) -> None:
    dtype, normalize = config.dtype, config.normalize
    try:
        onnx.write(weights, folder, config.layout, dtype=dtype, normalize=normalize)
    except Inexpressible as error:  # of a tokenizer
        raise InputError(f"{error}; use --format stablehlo.") from error


def verify(config: ExportConfig, weights: Weights, folder: Path) -> Verification:
    """Compare an exported folder with the model on the same random inputs."""
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
                f"{folder} returns {name} of shape {list(np.shape(x))}, the model "
                f"{list(ours[name].shape)}; it is another model's, so export it again."
            )
        differences[name] = relative_difference(x, ours[name])
    if (file := weights.config.text.tokenizer.file) == "clip" or (file and config.format == "onnx"):
        layout = config.layout if config.format == "onnx" else None
        differences["texts_with_other_ids"] = onnx.other_ids(folder, layout, weights.config.text)
    return Verification(runtime=runtime, bound=BOUNDS[config.dtype], **differences)


def _use(config: ExportConfig, model: CLIPConfig) -> str:
    name, captions = config.output.name, ""
    if model.decoder is not None:
        begin, end = begin_and_end(model.text, model.decoder.start)
        captions = (
            f"It writes captions, which begin with token id {begin} and end with {end}: "
            "`docs/how-to/export.md` of clip_jax has the loop.\n\n"
        )
    naflex = isinstance(model.vision.image_spec, NaFlex)
    if config.format == "stablehlo":
        reader = stablehlo.READER.replace("{folder}", name)
        images = "`images.npy` [batch, height, width, 3] are normalised pixels"
        if naflex:
            reader = reader.replace('np.load("images.npy")', 'dict(np.load("images.npz"))')
            images = f"`images.npz` has {patches.DESCRIPTION}"
        return (
            f"It needs only JAX, on CPU, CUDA or TPU; {images},\n"
            "`tokens.npy` [batch, tokens] token ids, see `manifest.json`:\n\n"
            f"```python\n{reader}```\n\n"
            f"{captions}`clip_jax.load` reads the folder, too."
        )
    if config.layout == "immich":
        return (
            "A folder for immich's machine learning: `visual/`, `textual/`, normalised embeddings."
        )
    dtype = "fp16" if config.dtype == "float16" else "fp32"
    code = _NAFLEX_JS if naflex else _JS
    code = code.replace("FOLDER", name).replace("DTYPE", dtype)
    return (
        f"For transformers.js:\n\n```js\n{code}```\n\n"
        "`onnx/model*.onnx` is the full model, `vision_model` and `text_model` its towers; "
        f"any ONNX runtime loads them.\n\n{captions}"
    ).rstrip()
