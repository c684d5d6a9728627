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
# # CLIP from nothing, in minutes
#
# An image tower and a text tower learn together that a picture and its caption belong to each
# other. Afterwards any words are a classifier: the nearest text wins. Here this happens in small,
# with data that ships inside: real handwritten digits, two side by side, captioned in varied words.
#
# Training takes 2 to 5 minutes on two CPU cores that do nothing else. To see only how everything
# goes, set the environment variable `CLIP_JAX_NOTEBOOK_STEPS` to 100 before you start (less than a
# minute): the same pictures, of a model that has not learned to read yet.

# %%
# %matplotlib inline
import json
import os
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

import numpy as np
from IPython.display import Image
from matplotlib.figure import Figure

import clip_jax
from clip_jax.config import load_config
from clip_jax.data import digits
from clip_jax.evals.pictures import contact_sheet, similarity_matrix, with_probabilities
from clip_jax.models.clip import l2_normalize
from clip_jax.train import train

root = next(
    folder
    for folder in (Path.cwd(), *Path.cwd().parents)
    if (folder / "configs" / "digits.py").exists()
)
config = load_config(root / "configs" / "digits.py")
STEPS = int(os.environ.get("CLIP_JAX_NOTEBOOK_STEPS", config.steps))
workdir = root / "runs" / f"quickstart-{STEPS}"

# %% [markdown]
# ## The data
#
# What the model trains on. Each pair is made when it is asked for: scans drawn from those of the
# training writers, bent and shaded a little, and one of 13 ways to say the number.

# %%
size = config.model.vision.image_size
source = digits.DigitsSource(config.data.source, size)
rng = np.random.default_rng(0)
pairs = [source.load(index, rng) for index in rng.choice(len(source), 16, replace=False)]
images, captions = zip(*pairs, strict=True)
contact_sheet(
    workdir / "pictures" / "pairs.png",
    images,
    [wrap(caption, 24, break_on_hyphens=False) for caption in captions],
    title=f"Training pairs, {size} × {size} pixels",
)
Image(workdir / "pictures" / "pairs.png")

# %% [markdown]
# Two things are kept from the model: three pages of writers, and every fifth number. So there are
# two questions to ask in the end, both in handwriting it never met: does it read numbers it was
# trained on, and does it read numbers that never occurred?

# %%
seen, unseen = digits.number_split(config.data.source.digits)
print(f"{len(seen)} numbers to train on; {len(unseen)} never shown: {unseen}")

# %% [markdown]
# ## Training
#
# As `clip-jax train configs/digits.py`, with a warm-up that is an eighth of the run however short
# that is, and more frequent reports for the curves below.
# Run again, this cell finds its checkpoint and goes on from there; stop it whenever you like.
#
# The outputs saved in this notebook are of a short run of 400 steps, under a third of the config's,
# on a busy machine (its images per second are low). It reads half of the numbers, some with the
# digits swapped: which digits comes first, which order later. The whole run reads nearly all.

# %%
config = replace(
    config,
    steps=STEPS,
    optim=replace(config.optim, warmup_steps=STEPS // 8),
    report_every=max(STEPS // 32, 1),
    evals=(replace(config.evals[0], every_steps=200),),
)
result = train(config, workdir)

# %% [markdown]
# ## The curves
#
# `metrics.jsonl` has a line for each report and one for each evaluation. In a batch of 128 pairs
# each image must find its caption among all 128. That cannot reach 100% here: with 80 numbers, some
# captions in the batch fit just as well. (Pairs whose captions are the same word for word are left
# out of each other's negatives.) What counts is the panel on the right, on held-out handwriting.

# %%
rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
panels = {
    "loss": {"loss": "loss"},
    "accuracy within a batch": {
        "image → text": "image_to_text_accuracy",
        "text → image": "text_to_image_accuracy",
    },
    "zero-shot top-1 of 100 numbers": {
        "seen numbers": "zero_shot/seen/top1",
        "never seen": "zero_shot/unseen/top1",
    },
}
page = Figure(figsize=(10, 3), dpi=90, layout="constrained")
for axes, (title, lines) in zip(page.subplots(1, 3), panels.items(), strict=True):
    for label, name in lines.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), ".-", label=label, linewidth=1.4)
    axes.set(title=title, xlabel="step", xlim=(0, STEPS))
    axes.set_ylim(0, None if title == "loss" else 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eeeeee")
    if len(lines) > 1:
        axes.legend(frameon=False)
        axes.yaxis.set_major_formatter("{x:.0%}")
display(page)

# %% [markdown]
# ## The similarity matrix
#
# Twelve images of held-out writers against a caption for each. The last six numbers were never
# trained on. Numbers with a digit in common at one place (12 and 72) should be somewhat alike; the
# same digits at other places (27 and 72) are another number, which the model has to tell from them.

# %%
model = clip_jax.load(workdir)
numbers = [12, 21, 24, 42, 47, 74, 14, 17, 27, 72, 46, 65]
images, _ = digits.evaluation_set(config.data.source, numbers, 1, size)
captions = [digits.prompts(number, 2)[i] for i, number in enumerate(numbers)]

image_features = l2_normalize(model.encode_image(model.preprocess(list(images))))
text_features = l2_normalize(model.encode_text(model.tokenize(captions)))
similarity = np.asarray(text_features @ image_features.T)
similarity_matrix(
    workdir / "pictures" / "similarity.png",
    similarity,
    images,
    captions,
    title="Held-out writers; the last six numbers were never trained on",
)
print(f"own caption nearest: {np.mean(similarity.argmax(0) == np.arange(len(numbers))):.0%}")
Image(workdir / "pictures" / "similarity.png")

# %% [markdown]
# ## Predictions
#
# Classification goes CLIP's way. All captions of a number are averaged into one embedding, for each
# of the 100 numbers; an image gets the nearest. Similarities times the learned `logit_scale`,
# through a softmax, are probabilities. Training draws this sheet at its end; the upper half was
# trained on, the lower half never.

# %%
for name in ("seen", "unseen"):
    print(f"{name + ' numbers':15} top-1 {result[f'zero_shot/{name}/top1']:.1%}")
Image(workdir / "evals" / "predictions.png")

# %% [markdown]
# ## Words of your own
#
# The labels need not be these. Here are a few with a word that no caption had, so the model should
# be less sure of them.

# %%
labels = ["scribbled twenty-one", "scribbled twelve", "scribbled seventy-two", "scribbled 27"]
text_features = l2_normalize(model.encode_text(model.tokenize(labels)))
logits = np.exp(model.params["logit_scale"]) * np.asarray(image_features @ text_features.T)
for number in (12, 21, 27, 72):
    print(number, with_probabilities(logits[numbers.index(number)], labels))

# %% [markdown]
# What lies in the work directory, and where to go from here:
#
# ```
# clip-jax evaluate WORKDIR                               the accuracies again, from the checkpoint
# clip-jax convert WORKDIR exported --to hugging-face     the weights, elsewhere
# clip-jax train configs/pairs.py --data.source.path pairs.csv     your own pairs
# ```
