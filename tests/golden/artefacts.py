"""Write the stored artefacts of this version: `python -m tests.golden.artefacts [FOLDER]`.

FOLDER, by default this one, gets `VERSION.tar.xz`: what users of the version have on their disks,
written by its commands, and the numbers that these files gave. `tests/test_stored_artefacts.py` and
`tests/mesh/test_stored_artefacts.py` use the files of all versions. Run it once per minor version,
with the oldest jax that is supported, and leave the files of earlier versions as they are.

    pairs/, tars/  prepared pairs
    reinforced/    the same, with embeddings by model/
    run/           a run directory, without the last steps of the run
    model/         its model; hugging-face/, stablehlo/, onnx/: in other formats
    embeddings/    the images of tars/, embedded by model/
    expected.*     losses of the missing steps, results, and outputs
"""

import contextlib
import io
import json
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clip_jax import __version__
from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.cli.commands import main as clip_jax
from clip_jax.config import Config
from clip_jax.convert.verify import our_outputs, random_inputs
from clip_jax.data.images import decode
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources import StoredSource
from clip_jax.data.sources.any import PathConfig, open_single
from clip_jax.data.sources.array_record import ArrayRecordConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.evals.held_out_pairs import PairsEvalConfig
from clip_jax.inference.loading import load
from clip_jax.losses import SoftmaxConfig
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig

HERE = Path(__file__).parent
VERSIONS = sorted(path.name.removesuffix(".tar.xz") for path in HERE.glob("*.tar.xz"))
PREPARED = ("pairs", "reinforced", "tars")
STORES = ("float32", "int8", "binary")  # types of embeddings that a search compares
QUERY = "a large red circle in the middle"
STEPS = 103  # of the uninterrupted run
STORED = 100  # steps of the stored run
# Where the files were written. The commands store some absolute paths, which this one replaces.
_WRITTEN_IN = "/artefacts"
# Files that name the machine, and indexes, which hold for the files' times alone.
_LEFT_OUT = ("tensorboard", "lock", "search", "clip_jax_index_*")


def unpack(version: str, folder: Path) -> None:
    """Unpack the artefacts of a version into a folder."""
    with tarfile.open(HERE / f"{version}.tar.xz") as tar:
        tar.extractall(folder, filter="data")


def read_expected() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what `expected` returned for the artefacts in the current folder."""
    with np.load("expected.npz") as arrays:
        return json.loads(Path("expected.json").read_text()), dict(arrays)


def get_config() -> Config:
    """Return the config of the stored run. `clip-jax train` reads it from this file."""
    tower = {"width": 8, "depth": 1, "num_heads": 2}
    held_out = DataConfig(source=TarConfig(path="tars/*.tar"), crop="center")
    return Config(
        steps=120,
        batch_size=8,
        model=CLIPConfig(
            embed_dim=8,
            vision=ViTConfig(image_size=16, patch_size=8, **tower),
            text=TextConfig(vocab_size=520, context_length=40, **tower),
            dtype="float32",
        ),
        data=DataConfig(source=ArrayRecordConfig(path="pairs/*.array_record"), threads=1),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=10, ema_decay=0.9),
        checkpoint=CheckpointConfig(every_steps=1_000, keep=1),
        evals=(PairsEvalConfig(data=held_out, pairs=20, pool=20),),
        report_every=1,
    )


def command(*args: str) -> Any:
    """Run a command of `clip-jax`; return its JSON output, if it has any."""
    print("clip-jax", *args)
    has_json = args[0] != "train"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = clip_jax([*args, "--json"] if has_json else [*args])
    if code:
        raise RuntimeError(f"clip-jax {' '.join(args)} exits with {code}")
    return json.loads(output.getvalue()) if has_json else None


def write_artefacts() -> None:
    """Write all artefacts into the current folder."""
    command("sample-data", "shapes", "--train", "1", "--test", "1", "--size", "16")
    command("prepare", "shapes/pairs.csv", "pairs")
    command("prepare", "shapes/pairs.csv", "tars", "--shards", "tar")
    config = str(Path(__file__))
    command("train", config, "--workdir", "run", "--stop-after", str(STORED))
    command("train", config, "--workdir", "longer", "--stop-after", str(STEPS))
    command("convert", "run", "model", "--to", "clip-jax")
    command("convert", "run", "hugging-face", "--to", "hugging-face")
    for kind in ("stablehlo", "onnx"):
        command("export", "run", kind, "--format", kind, "--verify")
    command("embed", "model", "tars/*.tar", "embeddings")
    how = ("--embedding-type", "int8", "--augmentations-per-image", "1")
    command("prepare", "shapes/pairs.csv", "reinforced", "--reinforce", "model", *how)


def expected() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what the artefacts in the current folder give, as JSON values and as arrays."""
    rows = [json.loads(line) for line in Path("longer/metrics.jsonl").read_text().splitlines()]
    values: dict[str, Any] = {
        "losses": {x["step"]: x["loss"] for x in rows if "loss" in x and x["step"] > STORED},
        "results": command("evaluate", "run"),
        "search": {},
    }
    for store in STORES:
        query = ("--text", QUERY, "--top", "5", "--store", store)
        values["search"][store] = command("search", "model", "embeddings", *query)
    arrays = {}
    for name in PREPARED:
        values[name], arrays[name] = content_of(Path(name))
    model = load("model")
    images, tokens = random_inputs(model.config)
    arrays |= {"images": images, "tokens": tokens}
    arrays["query"] = model.encode_text(model.tokenize([QUERY]))
    return values, arrays | our_outputs(model.config, model.params, images, tokens)


def content_of(folder: Path) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return key and captions of all pairs of a prepared folder, and the arrays that are stored
    with them, one after the other: pixels, and embeddings of the image and of the captions."""
    source = open_single(PathConfig(path=str(folder)), image_size=1)
    assert isinstance(source, StoredSource)
    pairs, arrays = [], []
    for index in range(len(source)):
        record = source.record(index)
        pairs.append({"key": record.key, "captions": record.captions()})
        arrays.append(np.asarray(decode(record.image())))
        if more := record.more():
            arrays += [more.image, more.text]
    return pairs, np.concatenate([x.ravel() for x in arrays])


def write_archive(folder: Path, archive: Path) -> None:
    """Write a folder's files, without anything that names the machine or the user."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_dir():
                continue
            data = path.read_bytes().replace(os.fsencode(folder), _WRITTEN_IN.encode())
            member = tarfile.TarInfo(str(path.relative_to(folder)))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    archive.write_bytes(lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def main(output: Path) -> None:
    output = output.absolute()
    # Programs name the files of their code: without folders.
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        os.chdir(folder)
        write_artefacts()
        values, arrays = expected()
        Path("expected.json").write_text(json.dumps(values, indent=1) + "\n")
        np.savez("expected.npz", **arrays)
        shutil.rmtree("shapes")
        shutil.rmtree("longer")
        for name in _LEFT_OUT:
            for path in [*folder.rglob(name)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_archive(folder, output / f"{__version__}.tar.xz")
        os.chdir(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
