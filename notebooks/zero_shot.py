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
# # What to do with a trained CLIP
#
# A trained CLIP puts images and texts into one space. This notebook looks at what that is good
# for: comparing photographs with descriptions, naming what is in an image (and why several prompts
# are better than one), and features for a classifier of your own.
#
# It runs with any model that `clip_jax.load` reads. Set the environment variable
# `CLIP_JAX_NOTEBOOK_MODEL` to a run's work directory or to OpenAI's, open_clip's or Hugging Face's
# weights; otherwise it takes `runs/digits`, which `clip-jax train configs/digits.py` makes in 5
# minutes. The outputs saved here are of that run: a small model that has seen handwritten numbers
# and nothing else.

# %%
# %matplotlib inline
import os
from pathlib import Path

import jax
import numpy as np
import skimage.data
from IPython.display import Image
from matplotlib.figure import Figure

import clip_jax
from clip_jax import sharding
from clip_jax.data import digits
from clip_jax.evals.linear_probe import Problem, few_per_class, probe_features
from clip_jax.evals.pictures import contact_sheet, similarity_matrix, with_probabilities
from clip_jax.evals.prompts import ensemble
from clip_jax.evals.zero_shot import top_k_accuracy
from clip_jax.models.clip import l2_normalize

root = next(
    folder
    for folder in (Path.cwd(), *Path.cwd().parents)
    if (folder / "configs" / "digits.py").exists()
)
pictures = root / "runs" / "zero_shot"
model = clip_jax.load(os.environ.get("CLIP_JAX_NOTEBOOK_MODEL", root / "runs" / "digits"))
vision = model.config.vision
print(f"{type(vision).__name__}, {vision.image_size} pixels, {model.config.embed_dim} dimensions")

# %% [markdown]
# ## Photographs
#
# Eight photographs that ship with scikit-image, and what the model gets of them: the shorter side
# brought to its size, the square in the middle, three channels, also of a gray one.

# %%
photographs = {
    "astronaut": "an astronaut in an orange suit",
    "brick": "a wall of bricks",
    "camera": "a man behind a camera on a tripod",
    "cat": "a tabby cat looking at you",
    "coffee": "a cup of coffee with a spoon",
    "grass": "grass from above",
    "hubble_deep_field": "galaxies in the night sky",
    "rocket": "a rocket on its launch pad",
}
photos = [getattr(skimage.data, name)() for name in photographs]
seen = model.preprocess(photos)
preprocess = model.image_preprocess
shown = np.clip(seen * np.array(preprocess.std) + np.array(preprocess.mean), 0, 1)
contact_sheet(
    pictures / "photographs.png",
    [(255 * image).astype(np.uint8) for image in shown],
    [
        [f"{name}", "x".join(map(str, photo.shape))]
        for name, photo in zip(photographs, photos, strict=True)
    ],
)
Image(pictures / "photographs.png")

# %% [markdown]
# The cosine of each photograph with each description. A model of the web's images has its largest
# numbers on the diagonal. Ours has no reason to: it never met a photograph nor any of these words.
# It gives numbers all the same, and nothing in them warns you. A model speaks about what it was
# trained on.

# %%
image_features = l2_normalize(model.encode_image(seen))
text_features = l2_normalize(model.encode_text(model.tokenize(list(photographs.values()))))
similarity = np.asarray(text_features @ image_features.T)
similarity_matrix(
    pictures / "similarity.png",
    similarity,
    [(255 * image).astype(np.uint8) for image in shown],
    list(photographs.values()),
)
right = similarity.argmax(axis=0) == np.arange(len(photos))
print(f"own description nearest: {right.sum()} of {len(photos)}")
Image(pictures / "similarity.png")

# %% [markdown]
# ## Naming what is in an image
#
# Now what the model knows: two handwritten digits, by writers it never met. The labels are texts,
# so any number is a class, also those that never occurred in training. (The numbers from 10 to 99;
# those below have fewer ways to be said.)

# %%
numbers = list(range(10, 100))
images, labels = digits.evaluation_set(digits.DigitsConfig(), numbers, 5, vision.image_size)
labels = labels - numbers[0]
features = np.asarray(l2_normalize(model.encode_image(model.preprocess(list(images)))))

prompts = [digits.prompts(number, 2) for number in numbers]
ways = len(digits.TEMPLATES)
texts = [prompt for group in prompts for prompt in group]
embedded = np.asarray(l2_normalize(model.encode_text(model.tokenize(texts))))
embedded = embedded.reshape(len(numbers), ways, -1)

chosen = np.arange(0, len(images), len(images) // 15)[:16]
scale = np.exp(model.params["logit_scale"])
names = [group[0] for group in prompts]
logits = scale * features[chosen] @ embedded[:, 0].T
contact_sheet(
    pictures / "predictions.png",
    [images[i] for i in chosen],
    [with_probabilities(row, names) for row in logits],
    right=[bool(row.argmax() == labels[i]) for row, i in zip(logits, chosen, strict=True)],
    title="One prompt for each number: the word alone",
)
Image(pictures / "predictions.png")

# %% [markdown]
# ## Several prompts for each class
#
# The same number can be said in thirteen ways. Each way alone is a classifier, and which is best
# you would not know without labelled images. The mean of all, taken in embedding space and scaled
# to unit length, is about as good as the best, and costs nothing afterwards: there is still one
# vector for each class.

# %%
accuracies = {
    prompts[32][way]: top_k_accuracy(features @ embedded[:, way].T, labels, 1)
    for way in range(ways)
}
averaged = ensemble(embedded.swapaxes(0, 1))
accuracies["all together"] = together = top_k_accuracy(features @ averaged.T, labels, 1)
order = sorted(accuracies, key=accuracies.get)

page = Figure(figsize=(7.5, 3.6), dpi=90, layout="constrained")
axes = page.subplots()
bars = axes.barh(
    order,
    [accuracies[name] for name in order],
    color=["tab:orange" if name == "all together" else "tab:blue" for name in order],
)
axes.bar_label(bars, fmt=" {:.1%}", fontsize=8)
axes.set(xlim=(0, 1.08), xlabel="top-1 among 90 numbers", title="Ways to say it, here of 42")
axes.xaxis.set_major_formatter("{x:.0%}")
axes.spines[["top", "right"]].set_visible(False)
axes.tick_params(labelsize=8)
display(page)
single = np.mean([value for name, value in accuracies.items() if name != "all together"])
print(f"one way {single:.1%} on average, all together {together:.1%}")

# %% [markdown]
# ## Features for a classifier of your own
#
# With a few labelled images, a linear classifier (logistic regression) on frozen features is often
# all that is needed. It takes the image tower's output before the projection, as the paper does.
# Here it learns the 90 numbers from 1, 4 or 16 images of each, in the hands of the training
# writers, and is asked about the held-out ones; beside it the same classifier on the bare pixels.
# Without any labelled image there is the zero-shot classifier above.

# %%
mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices())
known, known_labels = digits.evaluation_set(
    digits.DigitsConfig(), numbers, 16, vision.image_size, hands="training"
)
known_labels = known_labels - numbers[0]
inputs = {
    "features": [probe_features(model.clip, model.params, x, mesh) for x in (known, images)],
    "pixels": [x.reshape(len(x), -1) / np.float32(255) for x in (known, images)],
}
found = {}
for name, (train, test) in inputs.items():
    for shots in (1, 4, 16):
        some = few_per_class(known_labels, shots, np.random.default_rng(0))
        probe = Problem(train[some], known_labels[some], mesh).fit(1.0, max_steps=200)
        found[name, shots] = probe.accuracy(test, labels)
        print(f"{name:8} {shots:2} of each  {found[name, shots]:.1%}")

# %%
page = Figure(figsize=(5, 3), dpi=90, layout="constrained")
axes = page.subplots()
for name in inputs:
    axes.plot([1, 4, 16], [found[name, shots] for shots in (1, 4, 16)], "o-", label=name)
axes.axhline(together, color="black", linestyle="--", linewidth=1, label="zero-shot")
axes.set_xscale("log", base=2)
axes.set(xticks=[1, 4, 16], xticklabels=[1, 4, 16], ylim=(0, 1))
axes.set(xlabel="labelled images of each number", title="Top-1 on held-out writers")
axes.yaxis.set_major_formatter("{x:.0%}")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, fontsize=8, loc="lower right")
display(page)

# %% [markdown]
# The same on the command line, with labels of your own and folders of any size:
#
# ```
# clip-jax predict MODEL --images photos --labels seven forty-two --template "the number {}"
# clip-jax embed MODEL photos embeddings          any number of images, once
# clip-jax search MODEL embeddings --text "..."   as often as you like
# clip-jax demo MODEL --embeddings embeddings     both, as a page in the browser
# ```
