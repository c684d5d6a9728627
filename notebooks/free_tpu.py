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
# # Free TPUs: train on Kaggle, Colab or TRC
#
# This notebook installs clip_jax, trains a bundled config on all devices of the machine, evaluates
# it, classifies images, and exports the model. It runs unchanged on a TPU, a GPU or a CPU.
#
# **It has not been run on a TPU yet.** The outputs below are from two CPU cores, and CI runs it on
# a CPU.
#
# - [Kaggle](https://www.kaggle.com/code) lends a v5e-8, eight chips with 16 GB each, for some hours
#   a week. Choose the accelerator *TPU VM v5e-8*, and switch the internet on.
# - [Colab](https://colab.research.google.com) lends a v5e-1, one such chip. Choose *Runtime*,
#   *Change runtime type*, *v5e-1 TPU*.
# - [TPU Research Cloud](https://sites.research.google/trc/) gives slices of Cloud TPU to those who
#   apply. There, follow the tutorial
#   [A pod](https://github.com/clip-jax/clip_jax/blob/main/docs/tutorials/pod.md) instead.
#
# Kaggle and Colab change their limits: look at your quota there. Eight chips of a v5e are one host,
# so one process sees all devices.
#
# ## Install
#
# The next cell does nothing where clip_jax is installed. After an installation that changed
# packages which Python had loaded, restart the session, and run the notebook again.

# %%
# %matplotlib inline
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/clip-jax/clip_jax"
if importlib.util.find_spec("clip_jax") is None:
    has_tpu = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    extras = "onnx,tpu" if has_tpu else "onnx"
    package = f"clip-jax-pods[{extras}] @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

# %% [markdown]
# ## Devices
#
# A v5e-8 shows eight devices of the kind `TPU v5 lite`. If you see a CPU on a machine with a TPU,
# JAX was installed without libtpu: see
# [Troubleshooting](https://github.com/clip-jax/clip_jax/blob/main/docs/how-to/troubleshooting.md).

# %%
import jax

devices = jax.devices()
on_cpu = devices[0].platform == "cpu"
print(f"{len(devices)} × {devices[0].device_kind}")

# %% [markdown]
# ## Train
#
# The config `digits` trains a small CLIP on pictures of two handwritten digits, which ship with the
# package. The default mesh is data-parallel: each device has all parameters and an equal part of
# the batch of 128. On a CPU, this notebook takes 600 of the 1,600 steps.
#
# The run directory has everything. If the session ends, the same cell resumes the run from its last
# checkpoint, so keep the directory: on Kaggle in `/kaggle/working`, on Colab in a mounted Drive.

# %%
from dataclasses import replace

import clip_jax

config = clip_jax.load_config("digits")
steps = int(os.environ.get("CLIP_JAX_NOTEBOOK_STEPS", 600 if on_cpu else config.steps))
config = replace(
    config,
    steps=steps,
    optim=replace(config.optim, warmup_steps=steps // 8),
    report_every=max(steps // 12, 1),
    checkpoint=replace(config.checkpoint, every_steps=200),
)
result = clip_jax.train_model(config, "runs/free")

# %% [markdown]
# The first line names the mesh: `data=8` on a v5e-8. A step of this model is far too small for a
# TPU, which waits for the CPU most of the time. Train models such as
# `vit_b16` there, on real pairs.
#
# ## Evaluate
#
# `evaluate_model` measures the saved weights again. The numbers of the `unseen` classes occurred in
# no training caption. After 600 steps, the model still confuses the order of digits: expect about
# 60% here, and 95% after all 1,600 steps, which the notebook `quickstart` takes.

# %%
metrics = clip_jax.evaluate_model("runs/free")
for name in ("zero_shot/seen/top1", "zero_shot/unseen/top1"):
    print(f"{name:24} {metrics[name]:.1%}")

# %% [markdown]
# ## Classify
#
# Any labels will do. These images are from writers that training left out.

# %%
from IPython.display import Image

from clip_jax.data import digits
from clip_jax.evals.pictures import contact_sheet

model = clip_jax.load("runs/free")
numbers = [12, 21, 42, 47]
size = config.model.vision.image_size
images, _ = digits.evaluation_set(config.data.source, numbers, 1, size)
labels = ["scribbled twelve", "scribbled twenty-one", "scribbled 42", "scribbled forty-seven"]

image = model.encode_image(model.preprocess(list(images)), normalize=True)
text = model.encode_text(model.tokenize(labels), normalize=True)
probabilities = model.probabilities(image, text)
best = [[labels[row.argmax()], f"{row.max():.0%}"] for row in probabilities]
sheet = Path("runs/free/classified.png")
contact_sheet(sheet, images, best, title="The most probable label")
Image(sheet)

# %% [markdown]
# ## Export
#
# Two folders to download: one for transformers (PyTorch), and one for ONNX Runtime. Verify them on
# a CPU, where products of float32 are exact: `clip-jax export RUN OUTPUT --format onnx --verify`.

# %%
model.save("exported/hugging_face", "hugging-face", overwrite=True)
clip_jax.export_model("runs/free", "exported/onnx", "onnx", verify=False, overwrite=True)
for path in sorted(Path("exported").rglob("*")):
    if path.is_file():
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")

# %% [markdown]
# ## Your own data
#
# Kaggle mounts data sets below `/kaggle/input`. A folder of images by class, a table, or tars of
# pairs train like this:
#
# ```
# clip-jax train pairs --data.source.path '/kaggle/input/NAME/*.tar' --batch-size 1024 --steps 10000
# ```
#
# In this notebook, `clip_jax.train_model` takes the same config. Free the devices first: a TPU
# belongs to one process, so restart the session before you start the command.
#
# How much fits on a v5e-8? Any machine with the extra `tpu` says so, without a TPU:
#
# ```
# clip-jax plan vit_b16 --topology v5litepod-8 --batch-size 1024 --mesh.fsdp 1
# ```
