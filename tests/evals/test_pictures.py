"""Pictures show everything they are given, inside their borders."""

from pathlib import Path

import numpy as np
from PIL import Image

from clip_jax.evals.pictures import similarity_matrix


def test_similarity_matrix_has_a_column_for_each_image_and_room_for_long_texts(tmp_path: Path):
    images = [np.full((16, 16, 3), (255, 0, 0), np.uint8)] * 12
    similarity = np.linspace(-0.5, 1, 144).reshape(12, 12)
    text = "a text that is much longer than its room " * 20
    similarity_matrix(tmp_path / "long.png", similarity, images, [text] * 12)
    picture = np.asarray(Image.open(tmp_path / "long.png").convert("RGB"))
    red = (picture == (255, 0, 0)).all(-1).any(0)
    assert (np.diff(red.astype(int)) == 1).sum() == 12  # side by side
    assert (picture[:, 0] == 255).all()  # no text is cut off at the left
