"""Images with a right caption and a wrong one made of the same words or objects.

ARO (Yuksekgonul et al., 2023, arXiv:2210.01936): relations and attributes of Visual Genome,
swapped. SugarCrepe (Hsieh et al., 2023, arXiv:2306.14610): fluent captions with one thing replaced,
swapped or added.
"""

import json
from collections.abc import Sequence
from importlib import resources

import numpy as np
from jaxtyping import Bool
from PIL import Image

from clip_jax.data.images import ImageLike, decode
from clip_jax.data.sources import SampleError, text_of
from clip_jax.errors import InputError
from clip_jax.evals.datasets import Contrasted, checked, images_beside
from clip_jax.storage.files import AnyPath, matching, read_text

_FEWEST = 25  # minimum number of cases of an attribute pair in ARO's mean


# Relations that ARO leaves out of its mean: swapping their objects changes nothing.
_SYMMETRIC = frozenset(
    (resources.files("clip_jax.evals") / "aro_symmetric.txt").read_text().splitlines()
)


def open_aro(annotations: AnyPath, images: AnyPath) -> Contrasted:
    """Open `visual_genome_relation.json` or `visual_genome_attribution.json`.

    Images are cropped to a case's bounding box. Raises InputError for a file in another format.
    """
    layout = (
        "ARO's format: a list of cases with image_path, bbox_x, bbox_y, bbox_w, bbox_h, "
        "true_caption, false_caption and relation_name or attributes"
    )
    with checked(annotations, layout):
        cases = json.loads(read_text(annotations))
        rows = [
            (
                images / case["image_path"],
                tuple(int(case[f"bbox_{side}"]) for side in "xywh"),
                (text_of(case["true_caption"]), text_of(case["false_caption"])),
                case["relation_name"] if "relation_name" in case else "_".join(case["attributes"]),
            )
            for case in cases
        ]
    relations = bool(cases) and "relation_name" in cases[0]

    def load(index: int) -> tuple[ImageLike, tuple[str, str]]:
        path, (x, y, width, height), captions, _ = rows[index]
        image: Image.Image = decode(path)
        try:
            return image.crop((x, y, x + width, y + height)), captions
        except (ValueError, OverflowError, Image.DecompressionBombError) as error:
            raise SampleError(f"box of {width} x {height} pixels at {x}, {y}: {error}") from error

    return Contrasted(
        len(rows),
        load,
        [row[3] for row in rows],
        _SYMMETRIC,
        1 if relations else _FEWEST,
        key=lambda i: str(rows[i][0]),
    )


def open_sugar_crepe(folder: AnyPath) -> Contrasted:
    """Open SugarCrepe's files (`swap_obj.json`, ...) with COCO's images in `val2017/` or `images/`.

    Raises InputError for a file in another format.
    """
    images, rows = images_beside(folder), []
    for file in matching(folder, "*.json"):
        with checked(file, "SugarCrepe's format: cases with filename, caption, negative_caption"):
            content = json.loads(read_text(file))
            rows += [
                (images / case["filename"], (case["caption"], case["negative_caption"]), file.stem)
                for case in (content.values() if isinstance(content, dict) else content)
            ]
    if not rows:
        raise InputError(
            f"no .json of SugarCrepe's in {folder}; add its files, such as swap_obj.json."
        )
    return Contrasted(
        len(rows),
        lambda i: rows[i][:2],
        [row[2] for row in rows],
        name_groups=True,
        key=lambda i: str(rows[i][0]),
    )


def composition(
    won: Bool[np.ndarray, " cases"], groups: Sequence[str], data: Contrasted
) -> dict[str, float]:
    """Return the share of cases won, `acc`, and its mean over groups, `acc_macro` (ARO's number).

    Also `acc/GROUP` if the data set reports groups. Without a group that counts, there is no mean.
    """
    values = {"acc": float(won.mean())}
    members = {group: np.array([g == group for g in groups]) for group in sorted(set(groups))}
    counted = [
        won[of].mean()
        for group, of in members.items()
        if group not in data.left_out and of.sum() >= data.fewest
    ]
    if counted:
        values["acc_macro"] = float(np.mean(counted))
    if data.name_groups:
        values |= {f"acc/{group}": float(won[of].mean()) for group, of in members.items()}
    return values
