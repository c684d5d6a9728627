"""Rewrite the pictures of the pages by the commands that the pages show.

    python docs/builder/pictures.py WORK [NAME ...]

WORK is a folder for models and results, which later calls use again. The first call trains three
small models (about 20 minutes on two CPU cores) and compiles a step for a TPU slice (the extra
`tpu`). The demo and the report are photographed in Chromium (the extras `demo` and `browser`).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from builder.drawings import DEVICES, figure, themes

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs/images"
BLUE, ORANGE, GREEN, PURPLE = DEVICES
TEST = "shapes/folders/test"
PORT = 7861


def run(command: str, *made: str) -> None:
    """Run a command in the folder of work, unless the files that it makes exist."""
    if made and all(Path(name).exists() for name in made):
        return
    print(f"$ {command}", flush=True)
    program = f'clip-jax() {{ "{sys.executable}" -m clip_jax "$@"; }}; {command}'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run(["bash", "-ec", program], check=True, env=environment)


def shapes() -> None:
    run("clip-jax sample-data shapes", "shapes")
    run("clip-jax train class_folders", "runs/class_folders/result.json")


def canvases() -> None:
    run("clip-jax sample-data canvases --aspect 3 --train 200", "canvases")
    run("clip-jax train shapes_naflex", "runs/shapes_naflex/result.json")


def embedded() -> None:
    shapes()
    run(f"clip-jax embed runs/class_folders {TEST} embeddings", "embeddings")


def block(page: str, kind: str, containing: str) -> str:
    """Return the code block of a page that contains some text."""
    text = (ROOT / f"docs/how-to/{page}.md").read_text()
    every = re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)
    return next(text for text in every if containing in text)


def smaller(path: Path) -> None:
    """Write a PNG with a palette, in which pictures of few colours take a third of the bytes."""
    with Image.open(path) as picture:
        flat = picture.convert("RGB").quantize(255, dither=Image.Dither.NONE)
    flat.save(path, optimize=True)


# ------------------------------------------------------------------ sheets of images


def nearest() -> None:
    """Search results: how-to/command-line.md."""
    embedded()
    text = "a photo of a red star"
    search = f'clip-jax search runs/class_folders embeddings --text "{text}" --top 10'
    run(f"{search} --sheet {IMAGES}/nearest.png")
    smaller(IMAGES / "nearest.png")


def attention() -> None:
    """Attention maps of square images: how-to/command-line.md."""
    shapes()
    run(block("command-line", "bash", "--attention"))
    shutil.copy("attention.png", IMAGES)
    smaller(IMAGES / "attention.png")


def naflex_attention() -> None:
    """Attention maps at native aspect ratios: how-to/naflex.md."""
    canvases()
    run(block("naflex", "bash", "--attention"))
    shutil.copy("naflex_attention.png", IMAGES)
    smaller(IMAGES / "naflex_attention.png")


def errors() -> None:
    """Wrongly classified images of an evaluation: how-to/evaluate.md."""
    shapes()
    evaluate = "clip-jax evaluate runs/class_folders --dataset folder:shapes/folders"
    run(f"{evaluate} --output report", "report/folders/errors.png")
    with Image.open("report/folders/errors.png") as sheet:
        rows = sheet.crop((0, 0, sheet.width, min(sheet.height, round(sheet.width * 0.405))))
        rows.save(IMAGES / "errors.png")
    smaller(IMAGES / "errors.png")


def samples() -> None:
    """Pairs of the sample data: how-to/data.md."""
    import csv

    from clip_jax.evals.pictures import contact_sheet

    shapes()
    with open("shapes/pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = rows[7 :: len(rows) // 10][:10]
    pictures, lines = [], []
    for row in chosen:
        with Image.open(Path("shapes", row["image"])) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
        words = row["caption"].split()
        lines.append([" ".join(part) for part in (words[:2], words[2:4], words[4:])])
    contact_sheet(IMAGES / "samples.png", pictures, lines, columns=5)
    smaller(IMAGES / "samples.png")


def duplicates() -> None:
    """Training images that are near a test image, and the bits that differ: how-to/prepare.md."""
    from clip_jax.evals.pictures import contact_sheet
    from clip_jax.prepare.near import distances, perceptual_hash

    shapes()
    hashes, pictures = [], []
    for split in ("train", "test"):
        files = sorted(Path("shapes/folders", split).glob("*/*.png"))
        opened = [Image.open(file).convert("RGB") for file in files]
        pairs = [(x, code) for x in opened if (code := perceptual_hash(x)) is not None]
        pictures.append([np.asarray(picture) for picture, _ in pairs])
        hashes.append(np.array([code for _, code in pairs]))
    bits = distances(hashes[0][:, None], hashes[1][None])
    nearest_test = bits.argmin(1)
    least = bits.min(1)
    order = np.argsort(least, kind="stable")
    near = int((least <= 40).sum())  # the default of --near-distance
    chosen = [*order[:near][:: near // 3][:3], *order[near:][::100][:3]]
    sheets = ([pictures[0][i] for i in chosen], [pictures[1][nearest_test[i]] for i in chosen])
    verdicts = ["dropped" if least[i] <= 40 else "kept" for i in chosen]
    lines = [
        ["nearest test image", f"{least[i]} bits: {verdict}"]
        for i, verdict in zip(chosen, verdicts, strict=True)
    ]
    contact_sheet(
        IMAGES / "duplicates.png",
        [*sheets[0], *sheets[1]],
        [*[["training image"]] * len(chosen), *lines],
        columns=len(chosen),
    )
    smaller(IMAGES / "duplicates.png")


def similarity() -> None:
    """Cosines of images and texts: how-to/library.md."""
    import clip_jax

    shapes()
    model = clip_jax.load("runs/class_folders")
    names = [
        "red circle",
        "red star",
        "blue star",
        "blue circle",
        "green triangle",
        "yellow square",
    ]
    files = [f"{TEST}/{name.replace(' ', '_')}/002.png" for name in names]
    texts = model.encode_text(model.tokenize([f"a photo of a {name}" for name in names]))
    images = model.encode_image(model.preprocess(files))
    cosines = model.similarity(images, texts).T
    drawn = Figure((5.6, 4.6), dpi=120, layout="constrained")
    panel = drawn.subplots()
    panel.imshow(cosines, cmap="viridis")
    middle = cosines.min() + 0.6 * np.ptp(cosines)
    for (row, column), value in np.ndenumerate(cosines):
        ink = "white" if value < middle else "black"
        panel.text(column, row, f"{value:z.2f}", ha="center", va="center", fontsize=9, color=ink)
    for column, file in enumerate(files):
        corners = (column - 0.46, column + 0.46, -0.58, -1.5)
        panel.imshow(np.asarray(Image.open(file)), extent=corners)
    panel.set(xlim=(-0.5, len(files) - 0.5), ylim=(len(names) - 0.5, -1.52), xticks=[])
    panel.set_yticks(range(len(names)), [f"a photo of a {name}" for name in names], fontsize=9)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    drawn.savefig(IMAGES / "similarity.png", bbox_inches="tight")
    smaller(IMAGES / "similarity.png")


def patches() -> None:
    """How images of four aspect ratios become 36 patches: how-to/naflex.md."""
    from clip_jax.data.images import decode
    from clip_jax.models.images import NaFlex

    canvases()
    spec = NaFlex(max_patches=36, patch_size=8)
    files: dict[float, Path] = {}
    for file in sorted(Path("canvases/folders/test").glob("*/*.png")):
        with Image.open(file) as picture:
            files[picture.width / picture.height] = file
    chosen = [files[min(files, key=lambda x, r=ratio: abs(x - r))] for ratio in (0.4, 1, 1.7, 2.8)]
    pictures = [decode(file) for file in chosen]
    sizes = [spec.fit(*picture.size) for picture in pictures]
    highest = max(height for _, height in sizes)
    drawn = Figure((8.4, 3.6), dpi=120, layout="constrained")
    panels = drawn.subplots(1, len(sizes), width_ratios=[width for width, _ in sizes])
    for panel, picture, (width, height) in zip(panels, pictures, sizes, strict=True):
        top = highest - height
        box = (0, width, highest, top)
        panel.imshow(np.asarray(picture.resize((width, height))), extent=box)
        panel.vlines(range(0, width + 1, 8), top, highest, color="white", linewidth=1.6)
        panel.hlines(range(top, highest + 1, 8), 0, width, color="white", linewidth=1.6)
        rows, columns = height // 8, width // 8
        text = "{} × {} pixels".format(*picture.size)
        text += f"\n{rows} × {columns} = {rows * columns} patches"
        panel.text(width / 2, top - 2, text, ha="center", va="bottom", fontsize=8)
        panel.set(xlim=(-3, width + 3), ylim=(highest, -12))
        panel.axis("off")
    drawn.savefig(IMAGES / "patches.png", bbox_inches="tight")
    smaller(IMAGES / "patches.png")


# ------------------------------------------------------------------ charts, for both themes


def chart(name: str, draw: Callable[[], Figure]) -> None:
    """Write a drawing as SVG, for light and for dark pages."""
    for suffix in themes():
        options = {"format": "svg", "metadata": {"Date": None}, "transparent": True}
        draw().savefig(IMAGES / f"{name}{suffix}.svg", **options)


def curves() -> None:
    """Training and evaluation of the digits: how-to/train.md."""
    run("clip-jax train digits", "runs/digits/result.json")
    lines = Path("runs/digits/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]

    def line(panel: Axes, metric: str, label: str, color: str, **options: Any) -> None:
        points = [(row["step"], row[metric]) for row in rows if metric in row]
        panel.plot(*np.transpose(points), color=color, label=label, **options)

    def draw() -> Figure:
        drawn, (left, right) = figure(7.4, 2.8, ncols=2)
        line(left, "loss", "loss", BLUE)
        left.set(title="loss of the batch", xlabel="step", ylim=(0, None))
        seen, unseen = "zero_shot/seen/top1", "zero_shot/unseen/top1"
        batch = "image_to_text_accuracy"
        line(right, batch, "in-batch accuracy", PURPLE)
        line(right, seen, "zero-shot, numbers seen in training", GREEN, marker="o", markersize=4)
        line(right, unseen, "zero-shot, unseen numbers", ORANGE, marker="o", markersize=4)
        right.set(title="accuracy", xlabel="step", ylim=(0, 1.02))
        right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        right.legend(loc="lower right")
        return drawn

    chart("curves", draw)


def plan() -> None:
    """Memory and time of a planned step: how-to/pods.md."""
    command = "clip-jax plan vit_b32 --topology v5e:16x16 --chip-hour-price 1.2 --json"
    run(f"{command} > plan.json", "plan.json")
    result = json.loads(Path("plan.json").read_text())
    memory = {name: x / 1e9 for name, x in result["bytes_per_device"].items() if name != "total"}
    parts = {
        name: x["schedule"] * 1e3
        for name, x in result["seconds_by_part"].items()
        if x.get("schedule", 0) > 1e-4
    }

    def draw() -> Figure:
        drawn, (left, right) = figure(7.4, 2.9, ncols=2)
        ink = matplotlib.rcParams["text.color"]
        for row, size in enumerate(memory.values()):
            left.barh(row, size, color=BLUE)
            left.text(size + 0.1, row, f"{size:.2f}", va="center", fontsize=8, color=ink)
        left.set_yticks(range(len(memory)), list(memory))
        limit = result["hbm_bytes"] / 1e9
        left.axvline(limit, color=ORANGE, linestyle="--")
        left.text(limit - 0.3, 0, f"limit {limit:.1f}", color=ORANGE, ha="right", fontsize=8)
        left.set(title="memory per device, GB", xlim=(0, limit * 1.02))
        for row, milliseconds in enumerate(parts.values()):
            right.barh(row, milliseconds, color=GREEN)
            text = f"{milliseconds:.1f}"
            right.text(milliseconds + 0.2, row, text, va="center", fontsize=8, color=ink)
        right.set_yticks(range(len(parts)), list(parts))
        right.set(title="schedule estimate of a step, ms", xlim=(0, max(parts.values()) * 1.15))
        for panel in (left, right):
            panel.invert_yaxis()
            panel.tick_params(axis="y", length=0)
        return drawn

    chart("plan", draw)


def law() -> None:
    """A law through published results: how-to/scale.md."""
    laion_table()
    run(block("scale", "bash", "--plot law"))
    for name in ("law.png", "law_validation.png"):
        shutil.copy(name, IMAGES)
        smaller(IMAGES / name)


def laion_table() -> None:
    if not Path("laion.csv").exists():
        exec(block("scale", "python", "laion.csv"), {})


# ------------------------------------------------------------------ pages in a browser


@contextmanager
def browser(width: int, height: int) -> Iterator[Any]:
    """Yield a page of a headless Chromium."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu"]
        chromium = driver.chromium.launch(executable_path=program, args=flags)
        yield chromium.new_page(viewport={"width": width, "height": height})
        chromium.close()


def report() -> None:
    """The page of `scale report`: how-to/scale.md."""
    laion_table()
    run("clip-jax scale report laion.csv --output laion.html")
    with browser(1200, 775) as page:
        page.goto(f"file://{Path('laion.html').absolute()}", wait_until="networkidle")
        page.screenshot(path=IMAGES / "report.png")


def demo() -> None:
    """The web demo with an image and labels: how-to/command-line.md."""
    embedded()
    command = ["demo", "runs/class_folders", "--embeddings", "embeddings", "--port", str(PORT)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    server = subprocess.Popen([sys.executable, "-m", "clip_jax", *command], env=environment)
    try:
        wait_for(f"http://127.0.0.1:{PORT}")
        with browser(1100, 800) as page:
            page.goto(f"http://127.0.0.1:{PORT}", wait_until="networkidle")
            page.locator("input[type=file]").first.set_input_files(f"{TEST}/red_star/000.png")
            labels = page.get_by_label("Labels, one per line")
            labels.fill("red star\nred circle\nblue star\nyellow star")
            page.get_by_role("button", name="Label").first.click()
            page.get_by_text("100%").first.wait_for(timeout=120_000)
            page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=IMAGES / "demo.png")
    finally:
        server.terminate()
        server.wait()
    smaller(IMAGES / "demo.png")


def wait_for(url: str) -> None:
    for _ in range(120):
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise TimeoutError(url)


PICTURES = (
    *(nearest, attention, demo, samples, duplicates, similarity, errors),
    *(patches, naflex_attention, curves, plan, law, report),
)


def main() -> None:
    names = {picture.__name__: picture for picture in PICTURES}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="Folder for models and results.")
    parser.add_argument("names", nargs="*", help=f"Pictures to draw, by default all: {[*names]}")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    os.chdir(options.work)
    for name in options.names or names:
        names[name]()
        print(*sorted(x.name for x in IMAGES.glob(f"{name}*")), flush=True)


if __name__ == "__main__":
    main()
