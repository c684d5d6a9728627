"""Draw the README's picture: a similarity matrix and zero-shot predictions of a trained model.

    PYTHONPATH=. python benchmarks/readme_picture.py runs/digits docs/images/readme.png

The run directory is that of `clip-jax train digits`. All images are by held-out writers.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

import clip_jax
from clip_jax.data import digits
from clip_jax.evals.pictures import contact_sheet, with_probabilities
from clip_jax.inference.loading import unit

MARGIN = 24  # pixels
NUMBERS = (12, 21, 24, 42, 47, 74, 27, 72)  # 27 and 72 are not in the training set
TEMPLATES = (0, 1, 9, 0, 12, 2, 9, 1)  # which of `digits.TEMPLATES` writes each number's caption


def similarity_matrix(
    path: Path, similarity: np.ndarray, images: Sequence[np.ndarray], texts: Sequence[str]
) -> None:
    """Draw cosine similarities: a row for each text, a column under each image."""
    rows, columns = similarity.shape
    size = (0.5 * columns + 3.4, 0.5 * (rows + 1) + 0.5)
    figure = Figure(size, dpi=100, layout="constrained")
    axis = figure.subplots()
    axis.set_title("Image-caption similarity", fontsize=10)
    axis.imshow(similarity, cmap="viridis")
    middle = similarity.min() + 0.6 * np.ptp(similarity)
    for (row, column), value in np.ndenumerate(similarity):
        color = "white" if value < middle else "black"  # viridis is dark at low values
        text = f"{value:z.2f}".replace("0.", ".")
        axis.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
    for column, image in enumerate(images):
        corners = (column - 0.46, column + 0.46, -0.58, -1.5)  # left, right, bottom, top
        axis.imshow(image, extent=corners, interpolation="nearest")
    axis.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -1.52), xticks=[])
    axis.set_yticks(range(rows), texts, fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("cosine similarity")
    figure.savefig(path, bbox_inches="tight")


def main(workdir: Path, output: Path) -> None:
    model, data = clip_jax.load(workdir), digits.DigitsConfig()
    size, scale = model.config.vision.image_size, np.exp(model.params["logit_scale"])
    images, _ = digits.evaluation_set(data, NUMBERS, 1, size)
    captions = [digits.prompts(n, 2)[i] for n, i in zip(NUMBERS, TEMPLATES, strict=True)]
    texts, pictures = model.encode_text(model.tokenize(captions)), model.encode_image(images)
    similarity = unit(texts) @ unit(pictures).T
    with matplotlib.rc_context({"savefig.dpi": 144}):
        similarity_matrix(output, similarity, images, captions)
    left = Image.open(output).convert("RGB")
    images, labels = digits.evaluation_set(data, digits.number_split(2)[1][2::3], 1, size)
    prompts = [model.tokenize(digits.prompts(number, 2)) for number in range(100)]
    classes = unit([unit(model.encode_text(tokens)).mean(0) for tokens in prompts])
    logits = scale * unit(model.encode_image(images)) @ classes.T
    correct, names = logits.argmax(1) == labels, [digits.number_words(n, 2) for n in range(100)]
    lines = [with_probabilities(row, names) for row in logits]
    with matplotlib.rc_context({"savefig.dpi": 156}):  # as high as the matrix
        title = "Zero-shot predictions for unseen numbers"
        contact_sheet(output, images, lines, right=correct.tolist(), columns=3, title=title)
    right = Image.open(output).convert("RGB")

    width = left.width + right.width + 3 * MARGIN
    height = max(left.height, right.height) + 2 * MARGIN
    picture = Image.new("RGBA", (width, height))  # transparent beyond the rounded corners
    ImageDraw.Draw(picture).rounded_rectangle((0, 0, width - 1, height - 1), MARGIN, "white")
    picture.paste(left, (MARGIN, (height - left.height) // 2))
    picture.paste(right, (width - right.width - MARGIN, (height - right.height) // 2))
    picture.save(output, optimize=True)
    print(f"{output}: {width} × {height} pixels, {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("output", type=Path)
    main(**vars(parser.parse_args()))
