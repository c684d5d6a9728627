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
# # Use a trained CLIP: zero-shot, search, linear probe
#
# A trained CLIP maps images and texts into one embedding space. This notebook uses it for zero-shot
# classification, prompt ensembling, search and a linear probe. The last section shows what happens
# with images unlike the training data.
#
# | | |
# |---|---|
# | Hardware | two CPU cores |
# | Time | about a minute, plus 2 to 5 minutes for training if there is no `runs/digits` yet |
# | Also needs | `pip install scikit-image` for the photographs |
#
# By default the notebook uses the run directory `runs/digits`, which the notebook `quickstart` or
# `clip-jax train digits` writes. For another model, set the environment variable
# `CLIP_JAX_NOTEBOOK_MODEL` before you start Jupyter. It takes a run directory, or weights from
# OpenAI, open_clip or Hugging Face. `CLIP_JAX_NOTEBOOK_STEPS` shortens the training.

# %%
# %matplotlib inline
import os
from dataclasses import replace
from pathlib import Path

import jax
import matplotlib
import numpy as np
import skimage.data
from IPython.display import Image
from matplotlib.figure import Figure

import clip_jax
from clip_jax import sharding
from clip_jax.data import digits
from clip_jax.display import STYLE
from clip_jax.evals.evaluator import compiled, embed_for_probe
from clip_jax.evals.linear_probe import Problem, few_per_class
from clip_jax.evals.pictures import contact_sheet, with_probabilities
from clip_jax.evals.prompts import ensemble
from clip_jax.evals.zero_shot import top_k_accuracy
from clip_jax.models.clip import l2_normalize

matplotlib.rcParams.update(STYLE)
pictures = Path("pictures")
config = clip_jax.load_config("digits")
steps = int(os.environ.get("CLIP_JAX_NOTEBOOK_STEPS", config.steps))
trained = "runs/digits" if steps == config.steps else f"runs/digits-{steps}"
path = Path(os.environ.get("CLIP_JAX_NOTEBOOK_MODEL", trained))
if path == Path(trained) and not (path / "result.json").exists():
    optim = replace(config.optim, warmup_steps=steps // 8)
    clip_jax.train_model(config, path, steps=steps, optim=optim)
model = clip_jax.load(path)
vision = model.config.vision
print(f"{type(vision).__name__}, {vision.image_size} pixels, {model.config.embed_dim} dimensions")

# %% [markdown]
# ## Zero-shot classification
#
# The test images show the numbers 10 to 99, five images each, by writers that are not in the
# training set. Each class has a text, its prompt. Here the prompt is the number in words, such as
# "forty-two". The prediction is the class whose prompt is most similar to the image.

# %%
numbers = np.arange(10, 100)
images, labels = digits.evaluation_set(
    digits.DigitsConfig(), numbers.tolist(), 5, vision.image_size
)
labels = labels - numbers[0]
embeddings = np.asarray(l2_normalize(model.encode_image(model.preprocess(list(images)))))

prompts = [digits.prompts(number, 2) for number in numbers.tolist()]
ways = len(digits.TEMPLATES)
texts = [prompt for group in prompts for prompt in group]
classes = np.asarray(l2_normalize(model.encode_text(model.tokenize(texts))))
classes = classes.reshape(len(numbers), ways, -1)

chosen = np.arange(0, len(images), len(images) // 16)[:16]
scale = np.exp(model.params["logit_scale"])
names = [group[0] for group in prompts]
logits = scale * embeddings[chosen] @ classes[:, 0].T
contact_sheet(
    pictures / "predictions.png",
    [images[i] for i in chosen],
    [with_probabilities(row, names) for row in logits],
    right=[bool(row.argmax() == labels[i]) for row, i in zip(logits, chosen, strict=True)],
    title="The three most probable of 90 labels (green: correct, red: wrong)",
)
Image(pictures / "predictions.png")

# %% [markdown]
# Look at the second and third labels: they often share a digit with the correct one, or have the
# digits in the other order.
#
# ## Prompt ensembling
#
# There are 13 ways to write each number, and each way alone gives a classifier. Without labelled
# images you cannot know which way is best. An ensemble avoids the choice: it averages the
# normalised embeddings of all prompts of a class. It costs nothing at test time, because there is
# still one embedding for each class.

# %%
accuracies = {
    prompts[32][way]: top_k_accuracy(embeddings @ classes[:, way].T, labels, 1)
    for way in range(ways)
}
single = np.mean(list(accuracies.values()))
averaged = ensemble(classes.swapaxes(0, 1))
accuracies["ensemble of all"] = all_prompts = top_k_accuracy(embeddings @ averaged.T, labels, 1)
order = sorted(accuracies, key=accuracies.get)

figure = Figure(figsize=(7.5, 3.6), dpi=90, layout="constrained")
axes = figure.subplots()
for row, name in enumerate(order):
    color = "tab:orange" if name == "ensemble of all" else "tab:blue"
    axes.plot(accuracies[name], row, "o", color=color)
    axes.annotate(
        f"{accuracies[name]:.1%}", (accuracies[name], row), xytext=(8, 0),
        textcoords="offset points", va="center", fontsize=8, color=color,
    )  # fmt: skip
axes.set_yticks(range(len(order)), order)
axes.set(
    xlabel="top-1 accuracy among 90 numbers", title="Zero-shot accuracy by prompt (here for 42)"
)
axes.xaxis.set_major_formatter("{x:.1%}")
axes.margins(x=0.12)
axes.grid(color="#eeeeee")
display(figure)
print(f"one prompt {single:.1%} on average, ensemble {all_prompts:.1%}")

# %% [markdown]
# Compare the orange point with the blue ones: the ensemble is about as good as the best prompt.
#
# ## Search images by text
#
# Search ranks the images by their similarity to a query. Each row below shows the eight best of 450
# images for one query. The test set has five images of each number, so five of eight can be
# correct.

# %%
queries = {42: "a photo of the number forty-two", 17: "the digits 1 7 in handwriting"}
query_embeddings = l2_normalize(model.encode_text(model.tokenize(list(queries.values()))))
similarity = np.asarray(query_embeddings @ embeddings.T)
best = np.argsort(-similarity, axis=1)[:, :8]
results = [
    (number, i, row[i])
    for number, row, hits in zip(queries, similarity, best, strict=True)
    for i in hits
]
contact_sheet(
    pictures / "search.png",
    [images[i] for _, i, _ in results],
    [[f"{numbers[labels[i]]}  ({value:.2f})"] for _, i, value in results],
    right=[bool(numbers[labels[i]] == number) for number, i, _ in results],
    title="Upper row: “{}”. Lower row: “{}”.".format(*queries.values()),
)
Image(pictures / "search.png")

# %% [markdown]
# Below each image you see its number and, in brackets, the cosine similarity to the query. The
# correct images (green) should come first.
#
# ## Linear probe
#
# If you have a few labelled images, you can train a linear classifier (logistic regression) on
# frozen image features. As in the CLIP paper, the features are the output of the image encoder
# before the projection.
#
# Here the probe learns 90 numbers from 1, 4 or 16 labelled images of each, by writers of the
# training set. It is tested on the held-out writers. A second probe on raw pixels is the baseline.

# %%
mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices())
labelled, train_labels = digits.evaluation_set(
    digits.DigitsConfig(), numbers.tolist(), 16, vision.image_size, hands="training"
)
train_labels = train_labels - numbers[0]
embed = compiled(embed_for_probe, model.clip, mesh)
inputs = {
    "features": [sharding.in_batches(embed, mesh, model.params, x) for x in (labelled, images)],
    "pixels": [x.reshape(len(x), -1) / np.float32(255) for x in (labelled, images)],
}
probes = {}
for name, (train_inputs, test_inputs) in inputs.items():
    for shots in (1, 4, 16):
        rows = few_per_class(train_labels, shots, np.random.default_rng(0))
        probe = Problem(train_inputs[rows], train_labels[rows], mesh).fit(1.0, max_steps=200)
        probes[name, shots] = probe.accuracy(test_inputs, labels)
        print(f"{name:8} {shots:2} per class  {probes[name, shots]:.1%}")

# %%
figure = Figure(figsize=(5, 3), dpi=90, layout="constrained")
axes = figure.subplots()
for name in inputs:
    axes.plot([1, 4, 16], [probes[name, shots] for shots in (1, 4, 16)], "o-", label=name)
axes.axhline(all_prompts, color="black", linestyle="--", linewidth=1, label="zero-shot")
axes.set_xscale("log", base=2)
axes.set(xticks=[1, 4, 16], xticklabels=[1, 4, 16], ylim=(0, 1))
axes.set(xlabel="labelled images per class", title="Top-1 accuracy on held-out writers")
axes.yaxis.set_major_formatter("{x:.0%}")
axes.legend(loc="lower right")
display(figure)

# %% [markdown]
# The features need one labelled image per class where the pixels need far more than 16. The dashed
# line is the zero-shot classifier, which needs none.
#
# ## Outside the training data
#
# Here are eight photographs from scikit-image as the model receives them: resized, cropped to the
# square in the centre, and with three channels. Below each is its original size in pixels.

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
pixels = model.preprocess(photos)
preprocess = model.image_preprocess
shown = np.clip(pixels * np.array(preprocess.std) + np.array(preprocess.mean), 0, 1)
shown = [(255 * image).astype(np.uint8) for image in shown]
contact_sheet(
    pictures / "photographs.png",
    shown,
    [
        [name.replace("_", " "), " × ".join(map(str, photo.shape[1::-1]))]
        for name, photo in zip(photographs, photos, strict=True)
    ],
    title=f"Photographs at {vision.image_size} × {vision.image_size} pixels",
)
Image(pictures / "photographs.png")

# %%
image_embeddings = l2_normalize(model.encode_image(pixels))
text_embeddings = l2_normalize(model.encode_text(model.tokenize(list(photographs.values()))))
similarity = np.asarray(text_embeddings @ image_embeddings.T)
figure = Figure(figsize=(7, 4), dpi=90, layout="constrained")
axes = figure.subplots()
axes.imshow(similarity, cmap="YlGn", vmax=1.4)
for (row, column), value in np.ndenumerate(similarity):
    axes.text(column, row, f"{value:z.2f}", ha="center", va="center", fontsize=8)
axes.set(yticks=range(8), yticklabels=photographs.values(), title="Cosine similarity")
axes.set_xticks(range(8), [name.replace("_", " ") for name in photographs], rotation=45, ha="right")
correct = similarity.argmax(axis=0) == np.arange(len(photos))
print(f"photographs closest to their own description: {correct.sum()} of {len(photos)}")
display(figure)

# %% [markdown]
# A model trained on images from the web has the largest values on the diagonal. The digits model
# does not: it has seen neither photographs nor these words. Its similarities are high all the same,
# so a high similarity does not tell you that a model knows the subject. Set
# `CLIP_JAX_NOTEBOOK_MODEL` to a model trained on photographs and compare.
#
# ## The same on the command line
#
# ```
# clip-jax predict MODEL --images photos --labels seven forty-two --template "the number {}"
# clip-jax embed MODEL photos embeddings            # embed a folder of images once
# clip-jax search MODEL embeddings --text "..."     # search it as often as you like
# clip-jax demo MODEL --embeddings embeddings       # both in a web demo
# ```
