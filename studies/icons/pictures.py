"""Draw the best and the worst classes of an evaluation, and results of searches.

    python studies/icons/pictures.py classes evaluation/classes/images.csv best_and_worst.png
    python studies/icons/pictures.py search icons 'icons/drawn/test/*.tar' search.png

The files that `images.csv` names must be where they were.
"""

import argparse
import csv
import glob
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import clip_jax

SIDE, GAP = 32, 4
STEP = SIDE + GAP
LABEL = 170  # width of the text at the left of a row
WRONG = "#c62828"
QUERIES = (
    "umbrella in the rain",
    "shopping cart",
    "bicycle",
    "snowflake",
    "hot drink",
    "lock",
    "money",
    "hospital building",
    "two people talking",
    "listen to music",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    of_classes = commands.add_parser("classes", help="Draw the best and the worst classes.")
    of_classes.add_argument("images", type=Path, help="images.csv of an evaluation.")
    of_classes.add_argument("picture", type=Path, help="Picture to write.")
    of_classes.add_argument("--count", type=int, default=10, help="Number of classes of a kind.")
    of_classes.add_argument("--fewest", type=int, default=8, help="Fewest icons of a class.")
    of_classes.set_defaults(draw=draw_classes)
    of_search = commands.add_parser("search", help="Draw the icons that are nearest to queries.")
    of_search.add_argument("model", help="Model to search with.")
    of_search.add_argument("tars", help="Pattern of tars with icons.")
    of_search.add_argument("picture", type=Path, help="Picture to write.")
    of_search.add_argument("--queries", nargs="+", default=QUERIES, help="Texts.")
    of_search.add_argument("--top", type=int, default=12, help="Number of icons for each query.")
    of_search.set_defaults(draw=draw_search)
    options = parser.parse_args()
    options.draw(options)


def draw_classes(options: argparse.Namespace) -> None:
    """Draw a row for each class: its icons, the wrong ones with a frame; the worst at the right."""
    of_class = defaultdict(list)
    with options.images.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            of_class[row["class"]].append(row)
    large = {name: rows for name, rows in of_class.items() if len(rows) >= options.fewest}
    share = {name: np.mean([float(row["acc1"]) for row in rows]) for name, rows in large.items()}
    order = sorted(share, key=lambda name: (-share[name], -len(large[name]), name))
    best, worst = order[: options.count], order[: -options.count - 1 : -1]
    columns = max(len(large[name]) for name in (*best, *worst))
    half = LABEL + columns * STEP + 3 * GAP
    sheet, pen = blank(2 * half, 2 * len(best))
    for left, names in ((GAP, best), (GAP + half, worst)):
        for number, name in enumerate(names):
            top = GAP + 2 * number * STEP
            note(pen, left, top, f"{name}: {share[name]:.0%} of {len(large[name])}")
            wrong = Counter(row["predicted"] for row in large[name] if row["predicted"] != name)
            if wrong:
                taken = ", ".join(other for other, _ in wrong.most_common(3))
                note(pen, left, top + STEP, f"taken for {taken}")
            for column, row in enumerate(sorted(large[name], key=lambda row: -float(row["acc1"]))):
                with Image.open(row["image"]) as icon:
                    framed = row["predicted"] != name
                    paste(sheet, icon, left + LABEL + column * STEP, top, framed)
    save(sheet, options.picture)


def draw_search(options: argparse.Namespace) -> None:
    """Draw a row for each query: the icons that are nearest to it, the nearest first."""
    icons = [icon for path in sorted(glob.glob(options.tars)) for icon in pngs(Path(path))]
    model = clip_jax.load(options.model)
    images = model.encode_image(model.preprocess(icons), batch_size=256)
    texts = model.encode_text(model.tokenize(list(options.queries), truncate=True))
    similarity = model.similarity(images, texts)
    width = LABEL + options.top * STEP + 2 * GAP
    sheet, pen = blank(width, len(options.queries))
    for number, (query, column) in enumerate(zip(options.queries, similarity.T, strict=True)):
        top = GAP + number * STEP
        note(pen, GAP, top, query)
        for rank, index in enumerate(np.argsort(-column, kind="stable")[: options.top]):
            paste(sheet, icons[index], GAP + LABEL + rank * STEP, top)
    save(sheet, options.picture)


def pngs(path: Path) -> list[Image.Image]:
    """Read the images of a tar."""
    with tarfile.open(path) as tar:
        return [
            Image.open(tar.extractfile(member)).convert("RGB")
            for member in tar
            if member.name.endswith(".png")
        ]


def blank(width: int, rows: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (width, rows * STEP + GAP), "white")
    return sheet, ImageDraw.Draw(sheet)


def note(pen: ImageDraw.ImageDraw, left: int, top: int, text: str) -> None:
    pen.text((left, top + SIDE // 2), text, "black", ImageFont.load_default(13), anchor="lm")


def paste(sheet: Image.Image, icon: Image.Image, left: int, top: int, framed: bool = False) -> None:
    """Draw an icon, with a coloured frame if it was classified wrongly."""
    picture = icon.convert("RGB").resize((SIDE, SIDE))
    if framed:
        picture = ImageOps.expand(picture, 2, WRONG)
        left, top = left - 2, top - 2
    sheet.paste(picture, (left, top))


def save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(64).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
