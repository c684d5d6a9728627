"""Prepare the study's data: icons with captions, and images and captions to evaluate on.

    pip install 'clip-jax-pods[prepare]' resvg-py
    python studies/icons/prepare.py icons

The command downloads npm's `@iconify/json` with `npm pack`; `--archive PATH` takes a file instead.
If it is interrupted, run it again: what is complete is not done a second time.
"""

import argparse
import hashlib
import io
import itertools
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import captions
import drawing
import icon_sets
import tables
from icon_sets import SPLITS, Icon

PACKAGE = "@iconify/json@2.2.535"
SHA256 = "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91"
PER_TAR = 5_000
# Differing bits of near-duplicates. At more than 12, icons with other meanings are among them.
NEAR = "8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="Folder for everything that is written.")
    parser.add_argument("--archive", type=Path, help=f"Archive of {PACKAGE}.")
    parser.add_argument("--sets", type=Path, default=icon_sets.HERE / "sets.csv", help="Splits.")
    parser.add_argument("--size", type=int, default=32, help="Side of the images, in pixels.")
    parser.add_argument("--processes", type=int, default=2, help="Processes that draw.")
    options = parser.parse_args()
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    icons, counts = icon_sets.read(options.archive or download(output), options.sets)
    print(f"{len(icons):,} icons to draw", flush=True)
    with ProcessPoolExecutor(options.processes) as pool:
        drawn = draw_all(icons, output / "drawn", options.size, pool)
        counts["nothing to see"] = len(icons) - len(drawn)
        table = [{"stage": stage, "split": "all", "icons": n} for stage, n in counts.items()]
        kept = {}
        for split in SPLITS:
            dropped, rows = prepare_split(output, split)
            table += rows
            left = drawn - dropped
            kept[split] = [icon for icon in icons if icon.split == split and icon.key in left]
            table.append({"stage": "kept", "split": split, "icons": len(kept[split])})
        draw_classes(kept, output / "classes", options.size, pool)
    for split in ("test", "validation"):
        write_retrieval(kept[split], output / "retrieval" / split, options.size)
    tables.write(output / "counts.csv", table)
    tables.write(output / "digests.csv", digests(output))


def download(folder: Path) -> Path:
    """Download the package's archive, and return its path."""
    archive = folder / "iconify-json-2.2.535.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
    with archive.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise SystemExit(f"{archive} is not {PACKAGE}; delete it, and run the command again")
    return archive


# ---------------------------------------------------------------------------------------- draw


def draw_all(icons: list[Icon], folder: Path, size: int, pool: ProcessPoolExecutor) -> set[str]:
    """Draw all icons into tars of their split; return the keys of those with something to see.

    Evaluation images are black on white. `inverted` has them white on black, for decontamination.
    """
    tasks = []
    for split, members in itertools.groupby(icons, lambda icon: icon.split):
        rest = list(members)
        for number in range(0, len(rest), PER_TAR):
            part = rest[number : number + PER_TAR]
            tasks.append((part, folder / split / f"{number // PER_TAR:05d}.tar", False))
            if split != "train":
                path = folder / "inverted" / f"{split}-{number // PER_TAR:05d}.tar"
                tasks.append((part, path, True))
    keys: set[str] = set()
    tars = pool.map(partial(draw_tar, size), *zip(*tasks, strict=True))
    for (part, path, inverted), drawn in zip(tasks, tars, strict=True):
        if not {icon.key for icon in part}.issuperset(drawn):
            raise SystemExit(f"{path} has other icons; delete {folder}, or choose another output")
        print(f"{path}: {len(drawn)} of {len(part)} icons", flush=True)
        keys.update(() if inverted else drawn)
    return keys


def draw_tar(size: int, icons: list[Icon], path: Path, inverted: bool) -> list[str]:
    """Write images and captions as a WebDataset tar, and return the keys of its icons."""
    if path.exists():
        with tarfile.open(path) as tar:
            names = tar.getnames()
        return [name.removesuffix(".png") for name in names if name.endswith(".png")]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    keys = []
    with tarfile.open(partial_path, "w") as tar:
        for icon in icons:
            colours = drawing.colours_of(icon) if icon.split == "train" else drawing.INK
            image = drawing.png(icon, size, colours[::-1] if inverted else colours)
            if image is not None:
                texts = captions.of_icon(icon.names, icon.style)
                add(tar, f"{icon.key}.png", image)
                add(tar, f"{icon.key}.json", json.dumps({"caption": texts}).encode())
                keys.append(icon.key)
    partial_path.rename(path)
    return keys


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to a tar, with nothing in its header that depends on time or user."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# -------------------------------------------------------------------------------------- prepare


def prepare_split(output: Path, split: str) -> tuple[set[str], list[dict[str, str | int]]]:
    """Run `clip-jax prepare`; return the keys of dropped icons, and the counts by reason.

    The order of a shuffle follows from keys, which contain the paths of tars. Paths below `output`
    give the same order wherever it is.
    """
    decontaminate = []
    for other in SPLITS[: SPLITS.index(split)]:
        decontaminate += [
            f"{other}=drawn/{other}/*.tar",
            f"{other} inverted=drawn/inverted/{other}-*.tar",
        ]
    command = [
        *("clip_jax", "prepare", f"drawn/{split}/*.tar", split, "--caption-column", "caption"),
        *("--drop-duplicates", "--near-distance", NEAR, "--shuffle", "--list-dropped"),
    ]
    if decontaminate:
        command += ["--decontaminate", *decontaminate]
    if split == "train":  # sets of validation and test stay as their designers drew them
        command.append("--drop-near-duplicates")
    subprocess.run([sys.executable, "-m", *command], cwd=output, check=True)
    rows = tables.read(output / split / "dropped.csv")
    dropped = [(row["key"], row["reason"]) for row in rows]
    reasons = Counter(reason.partition(":")[0].partition(" of ")[0] for _, reason in dropped)
    counts = [{"stage": reason, "split": split, "icons": n} for reason, n in reasons.items()]
    return {key.partition(".tar:")[2] for key, _ in dropped}, counts


# ------------------------------------------------------------------------------------- evaluate


def draw_classes(
    kept: dict[str, list[Icon]], folder: Path, size: int, pool: ProcessPoolExecutor
) -> None:
    """Draw the icons of each class, one of each set, into class folders, black on white."""
    label_of = icon_sets.classes()
    labels = {label_of[icon.names[0]] for icon in kept["train"] if icon.names[0] in label_of}
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        for label in labels:  # in all splits, also those without an icon of it
            class_folder(folder / name, label).mkdir(parents=True, exist_ok=True)
        first: dict[tuple[str, str], Icon] = {}
        for icon in sorted(kept[split], key=lambda icon: (len(icon.name), icon.name)):
            label = label_of.get(icon.names[0])
            if label in labels:
                first.setdefault((label, icon.set), icon)
        images = pool.map(partial(drawing.png, size=size), first.values(), chunksize=100)
        for (label, of_set), image in zip(first, images, strict=True):
            assert image is not None
            (class_folder(folder / name, label) / f"{of_set}.png").write_bytes(image)


def class_folder(folder: Path, label: str) -> Path:
    return folder / label.replace(" ", "_")


def write_retrieval(icons: Iterable[Icon], folder: Path, size: int) -> None:
    """Write one icon of each distinct name as CLIP_benchmark's tars, with its name as caption."""
    first: dict[str, Icon] = {}
    for icon in sorted(icons, key=lambda icon: hashlib.sha256(icon.key.encode()).digest()):
        first.setdefault(icon.names[0], icon)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, icon in first.items():
            image = drawing.png(icon, size)
            assert image is not None
            add(tar, f"{icon.key}.png", image)
            add(tar, f"{icon.key}.txt", f"{name} icon".encode())
    (folder.parent / "dataset_type.txt").write_text("retrieval\n")


# -------------------------------------------------------------------------------------- results


def digests(output: Path) -> list[dict[str, str]]:
    """Return a SHA-256 of the files of each folder that training and evaluation read."""
    table = []
    for name in (*SPLITS, "classes", "retrieval"):
        digest = hashlib.sha256()
        for path in sorted((output / name).rglob("*")):
            if path.suffix in (".array_record", ".png", ".tar"):
                digest.update(str(path.relative_to(output)).encode() + path.read_bytes())
        table.append({"folder": name, "sha256": digest.hexdigest()})
    return table


if __name__ == "__main__":
    main()
