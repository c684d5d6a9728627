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
# # Take the weights elsewhere, and back
#
# A run trained here becomes a folder that Hugging Face's `CLIPModel` loads, gives the same
# probabilities there, and comes back bit for bit. Then what is *not* the same: Hugging Face's own
# processor makes other inputs from the same image and the same words, and here one sees where.
#
# It needs `pip install -e '.[test,peers]'` (PyTorch and transformers). The run is a very short one
# on the digits, a minute or two; for one of your own, set the environment variable
# `CLIP_JAX_NOTEBOOK_RUN` to its work directory.

# %%
# %matplotlib inline
import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import skimage
from matplotlib.figure import Figure
from PIL import Image

import clip_jax
from clip_jax.config import load_config
from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.data.digits import DigitsSource
from clip_jax.data.images import Preprocess
from clip_jax.models.clip import count, l2_normalize
from clip_jax.train import train

warnings.simplefilter("ignore")  # PyTorch's and transformers' own
os.environ["HF_HUB_OFFLINE"] = "1"  # everything that is needed lies in the folder
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor  # noqa: E402

transformers.utils.logging.disable_progress_bar()

root = next(
    folder
    for folder in (Path.cwd(), *Path.cwd().parents)
    if (folder / "configs" / "digits.py").exists()
)
config = load_config(root / "configs" / "digits.py")
workdir = Path(os.environ.get("CLIP_JAX_NOTEBOOK_RUN", root / "runs" / "convert"))

# %% [markdown]
# ## A run
#
# A hundred steps, unless the work directory holds a finished run already. The model has hardly
# begun to read then; the numbers have to agree all the same.

# %%
if not (workdir / "result.json").exists():
    STEPS = int(os.environ.get("CLIP_JAX_NOTEBOOK_STEPS", 100))
    short = replace(config.optim, warmup_steps=STEPS // 8)
    train(replace(config, steps=STEPS, optim=short, evals=()), workdir)
model = clip_jax.load(workdir)
print(f"{count(model.params) / 1e6:.2f}M parameters")

# %% [markdown]
# ## To Hugging Face, with proof
#
# As `clip-jax convert WORKDIR OUT --to hugging-face --verify`. The proof is not that the file was
# written: `CLIPModel` loads it, and both run on the same random pixels and token ids.

# %%
out = Path(tempfile.mkdtemp()) / "hugging-face"
proof = convert(
    ConvertConfig(source=workdir, destination=out, to="hugging-face", verify=True)
).verification
print(*sorted(path.name for path in out.iterdir()), sep="\n")
print(f"largest relative difference: {proof.max_relative_difference:.1e}")

# %% [markdown]
# ## The same probabilities
#
# Eight handwritten pairs of digits against their own numbers and two more, here and in PyTorch, for
# the same pixels and the same ids. Our ids end in zeros, Hugging Face's in its padding token; the
# features are read at the end of the text, and what follows it does not count.

# %%
source = DigitsSource(config.data.source, config.model.vision.image_size)
rng = np.random.default_rng(0)
images, captions = zip(
    *(source.load(i, rng) for i in (5, 77, 512, 900, 1500, 31, 64, 8)), strict=True
)
texts = [f"the number {number}" for number in (5, 97, 37, 23, 74, 36, 80, 8, 12, 42)]
pixels, ids = model.preprocess(list(images)), model.tokenize(texts)

image_features = l2_normalize(model.encode_image(pixels))
text_features = l2_normalize(model.encode_text(ids))
scale = np.exp(model.params["logit_scale"])
ours = np.asarray(jax.nn.softmax(scale * image_features @ text_features.T))

reference = CLIPModel.from_pretrained(out).eval()
processor = CLIPProcessor.from_pretrained(out)
their_ids = processor(text=texts, padding="max_length", return_tensors="pt")["input_ids"]
with torch.no_grad():
    theirs = reference(
        pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2), input_ids=their_ids
    ).logits_per_image.softmax(-1)
theirs = theirs.numpy()
print("our ids  ", ids[0])
print("their ids", their_ids[0].numpy())
print(f"largest difference of a probability: {np.abs(ours - theirs).max():.1e}")

# %%
page = Figure(figsize=(8, 2.6), dpi=80, layout="constrained")
for axes, (title, table) in zip(
    page.subplots(1, 2, sharey=True), {"here": ours, "CLIPModel": theirs}.items(), strict=True
):
    axes.imshow(table, vmin=0, vmax=ours.max(), cmap="Greys", aspect="auto")
    axes.set_title(title)
    axes.set_xticks(range(len(texts)), [text.split()[-1] for text in texts])
    axes.set_yticks(range(len(captions)), captions)
display(page)

# %% [markdown]
# ## And back
#
# Everything that a file of Hugging Face's says comes back the same, to the last bit.

# %%
again = clip_jax.load(out)
same = jax.tree.map(np.array_equal, again.params, model.params)
print(f"{sum(jax.tree.leaves(same))} of {len(jax.tree.leaves(same))} arrays are the same bits")
print("activation", again.config.vision.activation, again.config.text.activation)

# %% [markdown]
# ## Where the inputs differ
#
# **Pixels.** OpenAI's centre crop rounds half a pixel to the even side, Hugging Face's cuts it off:
# where 3 (or 7, 11, …) pixels are too many, the two squares are one pixel apart. Here a photograph
# of 227 × 224 pixels, which needs no resizing at all.

# %%
photo = Image.fromarray(skimage.data.chelsea()).resize((227, 224))
ours = Preprocess()(photo)
theirs = CLIPImageProcessor()(photo, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
print(f"mean difference {np.abs(ours - theirs).mean():.3f}")
print(f"moved by a pixel {np.abs(ours[:, :-1] - theirs[:, 1:]).max():.1e}")
page = Figure(figsize=(7.5, 2.7), dpi=72, layout="constrained")
panels = {
    "here, as OpenAI": ours,
    "CLIPImageProcessor": theirs,
    "difference": np.abs(ours - theirs),
}
for axes, (title, picture) in zip(page.subplots(1, 3), panels.items(), strict=True):
    low, high = picture.min(), picture.max()
    axes.imshow((picture - low) / (high - low))
    axes.set(title=title, xticks=[], yticks=[])
display(page)

# %% [markdown]
# **Words.** OpenAI's tokenizer repairs broken encodings (ftfy) and unescapes HTML before it reads;
# Hugging Face's does neither, so captions from the web become other tokens.

# %%
for text in ("a photo of a café", "a photo of a cafÃ©", "black &amp; white", "black & white"):
    ours = [i for i in model.tokenize(text, truncate=True)[0] if i]
    theirs = processor(text=text, truncation=True)["input_ids"]
    theirs = theirs[0] if isinstance(theirs[0], list) else theirs
    verdict = "same" if list(theirs) == ours else f"{len(ours)} tokens here, {len(theirs)} there"
    print(f"{text!r:<24} {verdict}")
