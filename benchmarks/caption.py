"""Compare the captioning speed of clip_jax and open_clip: coca_ViT-B-32 in float32, same weights.

    python benchmarks/caption.py [BATCH_SIZE]

The weights are random and the captions greedy, with 30 tokens each. open_clip runs both towers and
the decoder over the whole caption for every token; clip_jax caches keys and values. The medians of
the rounds are compared. The two do not alternate: once torch has computed in a process,
XLA's products take 1.3 times as long in it.
"""

import argparse
import importlib
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from clip_jax.convert import open_clip as layout
from clip_jax.convert.settings import write_json
from clip_jax.convert.tensor_files import write_safetensors
from clip_jax.inference.loading import load
from clip_jax.models.generation import GenerationConfig, generate

LENGTH, ROUNDS = 30, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("batch_size", nargs="?", type=int, default=8, help="images per batch")
    batch_size = parser.parse_args().batch_size
    warnings.simplefilter("ignore")
    # open_clip imports it, but only beam search uses it; transformers has removed it.
    transformers.generation.BeamSearchScorer = object
    import open_clip

    importlib.reload(importlib.import_module("open_clip.coca_model"))
    settings = open_clip.get_model_config("coca_ViT-B-32")
    torch.manual_seed(0)
    module = importlib.import_module("open_clip.coca_model")
    own = {name: x for name, x in settings.items() if name != "custom_text"}
    reference = module.CoCa(**own).eval()
    with torch.no_grad():
        reference.text_decoder.text_projection.normal_(std=0.2)  # open_clip leaves it uninitialised
    images = np.random.default_rng(0).normal(size=(batch_size, 224, 224, 3)).astype(np.float32)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tensors = {name: x.numpy() for name, x in reference.state_dict().items()}
        write_safetensors(folder / layout.WEIGHTS_NAME, tensors, {"format": "pt"})
        config = {"model_cfg": settings, "preprocess_cfg": {}}
        write_json(folder / "open_clip_config.json", config)
        model = load(folder)
    clip = replace(model.clip, config=replace(model.config, dtype="float32", unroll=12))
    generation = GenerationConfig(max_length=LENGTH, min_length=LENGTH - 1)

    @jax.jit
    def write(params, images):
        return generate(clip, params, clip.encode_image_and_tokens(params, images)[1], generation)

    def ours() -> np.ndarray:
        return np.asarray(write(model.params, images))

    def theirs() -> np.ndarray:
        with torch.inference_mode():
            return reference.generate(
                pixels, generation_type="top_k", top_k=1, seq_len=LENGTH, min_seq_len=LENGTH - 1
            ).numpy()

    ids, seconds = [], []
    for run in (ours, theirs):
        ids.append(run())
        times = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        seconds.append(statistics.median(times))
    fast, slow = (batch_size / took for took in seconds)
    same = np.mean(ids[0][:, : ids[1].shape[1]] == ids[1])
    print(
        f"clip_jax {fast:.2f} captions/s, open_clip {slow:.2f}: ratio {fast / slow:.1f}; "
        f"{same:.0%} of the ids are the same"
    )


if __name__ == "__main__":
    main()
