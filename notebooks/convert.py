# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Convert a model to PyTorch and back
#
# This notebook exports a trained model to the Hugging Face format and loads it in PyTorch as
# `CLIPModel`. It checks that both give the same probabilities, and that the way back restores every
# parameter bit for bit. The last section shows where Hugging Face's preprocessing differs from
# OpenAI's.
#
# | | |
# |---|---|
# | Hardware | two CPU cores |
# | Time | about a minute, plus 2 to 5 minutes for training if there is no `runs/digits` yet |
# | Also needs | PyTorch, transformers (the extra `peers`) and scikit-image |
#
# By default the notebook uses the run directory `runs/digits`, which the notebook `quickstart` or
# `clip-jax train digits` writes. For another run on the digits data set, set the environment
# variable `CLIP_JAX_NOTEBOOK_RUN` to its run directory. `CLIP_JAX_NOTEBOOK_STEPS` shortens the
# training.

# %%
# %matplotlib inline
import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import matplotlib
import numpy as np
import skimage
from matplotlib.figure import Figure
from PIL import Image

import clip_jax
from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.data import digits
from clip_jax.data.images import Preprocess
from clip_jax.display import STYLE
from clip_jax.models.clip import count

warnings.simplefilter("ignore")  # from PyTorch and transformers
os.environ["HF_HUB_OFFLINE"] = "1"  # all files are local
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor  # noqa: E402

transformers.utils.logging.disable_progress_bar()
matplotlib.rcParams.update(STYLE)

# %% [markdown]
# ## A trained model
#
# Train the bundled digits config, unless the run directory holds a finished run.

# %%
config = clip_jax.load_config("digits")
steps = int(os.environ.get("CLIP_JAX_NOTEBOOK_STEPS", config.steps))
default = "runs/digits" if steps == config.steps else f"runs/digits-{steps}"
workdir = Path(os.environ.get("CLIP_JAX_NOTEBOOK_RUN", default))
if not (workdir / "result.json").exists():
    optim = replace(config.optim, warmup_steps=steps // 8)
    clip_jax.train_model(config, workdir, steps=steps, optim=optim)
model = clip_jax.load(workdir)
print(f"{count(model.params) / 1e6:.2f} million parameters")

# %% [markdown]
# ## Export to Hugging Face, with a numerical check
#
# The next cell does the same as `clip-jax convert runs/digits OUTPUT --to hugging-face --verify`.
# The check loads the written files into `CLIPModel` and compares the outputs of both models for
# random pixels and token ids.

# %%
exported = Path(tempfile.mkdtemp()) / "hugging-face"
verification = convert(
    ConvertConfig(source=workdir, destination=exported, to="hugging-face", verify=True)
).verification
print(*sorted(path.name for path in exported.iterdir()), sep="\n")
print(f"largest relative difference: {verification.max_relative_difference:.1e}")

# %% [markdown]
# The folder has everything that `from_pretrained` needs. A difference below 1e-5 is float32
# rounding.
#
# ## The same probabilities in PyTorch
#
# Both models classify eight images by held-out writers among ten labels, two of which fit no image.
# The numbers are easy to confuse, so that the probabilities are not all 0% or 100%.
#
# Both models get the same pixels. The token ids differ only in the padding: zeros here, the
# end-of-text token in Hugging Face. Both models read the text embedding at the first end-of-text
# token, so the padding has no effect.

# %%
numbers = [13, 17, 19, 23, 27, 61, 62, 94]
images, _ = digits.evaluation_set(digits.DigitsConfig(), numbers, 1, model.config.vision.image_size)
texts = [f"the number {digits.number_words(number, 2)}" for number in [*numbers, 44, 92]]
pixels, ids = model.preprocess(list(images)), model.tokenize(texts)

ours = model.probabilities(model.encode_image(pixels), model.encode_text(ids))

hf_model = CLIPModel.from_pretrained(exported).eval()
processor = CLIPProcessor.from_pretrained(exported)
hf_ids = processor(text=texts, padding="max_length", return_tensors="pt")["input_ids"]
with torch.no_grad():
    hf_logits = hf_model(
        pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2), input_ids=hf_ids
    ).logits_per_image
theirs = hf_logits.softmax(-1).numpy()
print("ids in clip_jax    ", ids[0])
print("ids in Hugging Face", hf_ids[0].numpy())
print(f"largest difference of a probability: {np.abs(ours - theirs).max():.1e}")

# %%
figure = Figure(figsize=(10, 4.2), dpi=80, layout="constrained")
for axes, (title, table) in zip(
    figure.subplots(1, 2, sharey=True),
    {"clip_jax": ours, "CLIPModel (PyTorch)": theirs}.items(),
    strict=True,
):
    axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        color = "white" if value > 0.6 else "black"
        label = f"{value:.0%}" if value >= 0.005 else ""
        axes.text(column, row, label, ha="center", va="center", fontsize=8, color=color)
    axes.set_title(title)
    names = [text.removeprefix("the number ") for text in texts]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(numbers)), [f"image of {number}" for number in numbers])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
display(figure)

# %% [markdown]
# The two tables agree in every cell, also where the model is unsure or wrong. Correct predictions
# are on the diagonal.
#
# ## Convert back
#
# `clip_jax.load` reads the Hugging Face folder. Compare every parameter with the original.

# %%
restored = clip_jax.load(exported)
same = jax.tree.leaves(jax.tree.map(np.array_equal, restored.params, model.params))
print(f"{sum(same)} of {len(same)} arrays are identical")
print("activation:", restored.config.vision.activation)

# %% [markdown]
# ## Where the preprocessing differs
#
# **Images.** If the centre crop removes an odd number of pixels, OpenAI's preprocessing rounds half
# a pixel to the even side and Hugging Face's rounds down. For an excess of 3, 7, 11, … pixels the
# two crops differ by one pixel. This photograph has 227 × 224 pixels, so it needs no resizing.

# %%
photo = Image.fromarray(skimage.data.chelsea()).resize((227, 224))
ours = Preprocess()(photo)
theirs = CLIPImageProcessor()(photo, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
print(f"mean difference: {np.abs(ours - theirs).mean():.3f}")
print(f"after a shift by one pixel: {np.abs(ours[:, :-1] - theirs[:, 1:]).max():.1e}")
figure = Figure(figsize=(7.5, 2.8), dpi=72, layout="constrained")
panels = {
    "clip_jax (as OpenAI)": ours,
    "CLIPImageProcessor": theirs,
    "absolute difference": np.abs(ours - theirs),
}
for axes, (title, picture) in zip(figure.subplots(1, 3), panels.items(), strict=True):
    low, high = picture.min(), picture.max()
    axes.imshow((picture - low) / (high - low))
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
display(figure)

# %% [markdown]
# The two crops look alike, but the difference is visible along edges. It vanishes after a shift by
# one pixel. Pixel values are normalised: a difference of 0.1 is about a tenth of their standard
# deviation.
#
# **Texts.** OpenAI's tokenizer first repairs broken encodings (with ftfy) and decodes HTML
# entities. Hugging Face's does neither, so some captions from the web get different tokens.

# %%
for text in ("a photo of a café", "a photo of a cafÃ©", "black &amp; white", "black & white"):
    ours = [i for i in model.tokenize(text, truncate=True)[0] if i]
    theirs = np.ravel(processor(text=text, truncation=True)["input_ids"]).tolist()
    verdict = f"{len(ours)} tokens in clip_jax, {len(theirs)} in Hugging Face"
    print(f"{text!r:<24} {'same tokens' if theirs == ours else verdict}")

# %% [markdown]
# The second and the third text differ. If your captions come from the web, clean them before you
# use Hugging Face's tokenizer, or pass it the token ids from `model.tokenize`.
