"""Compare input pipelines on the same JPEG files: clip_jax and open_clip's WebDataset loader.

    python benchmarks/input.py FOLDER

FOLDER receives 5,000 photographs of 640 x 480 pixels in 25 tars with captions: crops of those that
scikit-image and scikit-learn ship. open_clip reads them by its own `get_wds_dataset` with its
training transform, in an endless epoch, so that no refill of its shuffle buffers is measured. Both
take crops with the scale (0.9, 1) to 224 pixels, tokenise captions to 77 ids, and make batches of
256. open_clip returns normalised float32; clip_jax returns uint8, which the training step
normalises.

`clip_jax, turbo` is clip_jax with `--data.decoder turbo`, whose libraries are the extra `turbo`.
With `--stages`, only these two are compared: the CPU time of one image by its parts, as JPEG, WebP
and AVIF, in one thread.

Each is first run with several numbers of workers, of which the best is used. Then both alternate,
five times, each run in a process of its own that is warmed up before it is timed. CPU seconds
include worker processes. All of it takes less than ten minutes and needs the extra `peers`.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

SAMPLES, SHARDS, BATCH, SIZE = 5_000, 25, 256, 224
WARM_BATCHES, TIMED_BATCHES, TUNING_BATCHES = 6, 20, 8
ROUNDS = 5
SETTINGS = {
    "open_clip": ({"workers": 1}, {"workers": 2}, {"workers": 3}, {"workers": 4}),
    **dict.fromkeys(
        ("clip_jax", "clip_jax, turbo"),
        (
            {"workers": 0, "threads": 2},
            {"workers": 0, "threads": 3},
            {"workers": 1, "threads": 2},
            {"workers": 2, "threads": 1},
            {"workers": 2, "threads": 2},
        ),
    ),
}
DECODERS = {"clip_jax": "pillow", "clip_jax, turbo": "turbo"}
FORMATS = {"JPEG": {"quality": 90}, "WEBP": {"quality": 85}, "AVIF": {"quality": 75}}


def write_photographs(folder: Path) -> None:
    """Write the tars, unless they exist."""
    import numpy as np
    import skimage
    import sklearn.datasets
    from PIL import Image

    sys.path.insert(0, str(Path(__file__).parent))
    from tokenizer import captions

    if len(list(folder.glob("*.tar"))) == SHARDS:
        return
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg")
    names += ("motorcycle_left.png", "motorcycle_right.png")
    photographs = [Image.fromarray(image) for image in sklearn.datasets.load_sample_images().images]
    data = Path(skimage.__file__).parent / "data"
    photographs += [Image.open(data / name).convert("RGB") for name in names]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    texts = captions(SAMPLES)
    size = SAMPLES // SHARDS
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * size, (shard + 1) * size):
                image = photographs[number % len(photographs)]
                height = min(image.height, image.width * 3 // 4) * rng.uniform(0.6, 1)
                left, top = rng.uniform(0, (image.width - height * 4 / 3, image.height - height))
                box = (left, top, left + height * 4 / 3, top + height)
                cut = image.resize((640, 480), Image.Resampling.BICUBIC, box=box)
                file = io.BytesIO()
                cut.save(file, "JPEG", quality=90)
                for suffix, content in (("jpg", file.getvalue()), ("txt", texts[number].encode())):
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def open_clip_batches(tars: Path | str, workers: int):
    """Yield batches of open_clip's loader without end, from a folder or, through `curl`, a URL."""
    import open_clip
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.params import parse_args

    urls = f"{tars}/{{00000..{SHARDS - 1:05d}}}.tar"
    if urls.startswith("http"):
        urls = f"pipe:curl -s -f {urls}"
    args = parse_args(
        [
            *("--train-data", urls),
            *("--train-num-samples", "1000000", "--dataset-resampled"),
            *("--batch-size", str(BATCH), "--workers", str(workers)),
        ]
    )
    args.world_size = 1
    transform = open_clip.image_transform(
        SIZE,
        is_train=True,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        aug_cfg=open_clip.AugmentationCfg(scale=(0.9, 1.0)),
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer)
    for images, texts in data.dataloader:
        assert images.shape == (BATCH, 3, SIZE, SIZE)
        assert texts.shape == (BATCH, 77)
        yield


def clip_jax_batches(folder: Path, workers: int, threads: int, decoder: str):
    from clip_jax.data.batch_plan import constant
    from clip_jax.data.pipeline import DataConfig, build
    from clip_jax.data.sources.tar import TarConfig
    from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer
    from clip_jax.models.images import Square

    config = DataConfig(
        source=TarConfig(path=str(folder / "*.tar")),
        crop_scale=(0.9, 1.0),
        workers=workers,
        threads=threads,
        decoder=decoder,
    )
    plan = constant(BATCH, Square(SIZE))
    for batch in build(config, plan, tokenizer=ClipTokenizer(), context_length=77).batches():
        assert batch.image.shape == (BATCH, SIZE, SIZE, 3)
        assert batch.text.shape == (BATCH, 77)
        yield


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and all its living descendants."""
    parents, seconds = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
        seconds[int(path.parent.name)] = int(fields[11]) + int(fields[12])
    own = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in own} - own:
        own |= more
    return sum(seconds[child] for child in own) / os.sysconf("SC_CLK_TCK")


def measure(who: str, folder: Path, setting: dict[str, int], count: int) -> dict[str, float]:
    if who == "open_clip":
        batches = open_clip_batches(folder, **setting)
    else:
        batches = clip_jax_batches(folder, **setting, decoder=DECODERS[who])
    for _ in range(WARM_BATCHES):
        next(batches)
    start, start_cpu = time.perf_counter(), cpu_seconds()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - start
    return {
        "samples_per_second": count * BATCH / seconds,
        "cpu_milliseconds_per_sample": (cpu_seconds() - start_cpu) * 1000 / (count * BATCH),
    }


def photographs(folder: Path, format: str) -> list[bytes]:
    """Return the photographs of the first tar in a format."""
    from PIL import Image

    encoded = []
    with tarfile.open(folder / "00000.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                data = tar.extractfile(member).read()
                if format != "JPEG":
                    file = io.BytesIO()
                    Image.open(io.BytesIO(data)).save(file, format, **FORMATS[format])
                    data = file.getvalue()
                encoded.append(data)
    return encoded


def stages(folder: Path) -> None:
    """Print the CPU milliseconds of one image by decoder, format and stage, medians of `ROUNDS`."""
    from unittest import mock

    import numpy as np
    from PIL import Image

    from clip_jax.data.images import read_crops
    from clip_jax.data.turbo import TurboImage
    from clip_jax.models.images import Square

    resizing = []

    def timed(resize):
        def wrapped(*args, **kwargs):
            start = time.thread_time()
            result = resize(*args, **kwargs)
            resizing.append(time.thread_time() - start)
            return result

        return wrapped

    print("| format | decoder | decode | resize | both |\n|---|---|---|---|---|")
    for format in FORMATS:
        data = photographs(folder, format)
        found = {decoder: [] for decoder in DECODERS.values()}
        with (
            mock.patch.object(Image.Image, "resize", timed(Image.Image.resize)),
            mock.patch.object(TurboImage, "resize", timed(TurboImage.resize)),
        ):
            for _ in range(ROUNDS):
                for decoder, rounds in found.items():
                    rng = np.random.default_rng(0)
                    resizing.clear()
                    start = time.thread_time()
                    for one in data:
                        read_crops(one, [Square(SIZE)], rng, (0.9, 1.0), decoder=decoder)
                    both = time.thread_time() - start
                    rounds.append((both - sum(resizing), sum(resizing), both))
        for decoder, rounds in found.items():
            values = (statistics.median(x) * 1000 / len(data) for x in zip(*rounds, strict=True))
            cells = " | ".join(f"{value:.2f}" for value in values)
            print(f"| {format} | {decoder} | {cells} |", flush=True)


def run(who: str, folder: Path, setting: dict[str, int], count: int) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    command += ["--one", json.dumps([who, setting, count])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    values = json.loads(done.stdout.splitlines()[-1])
    words = ", ".join(f"{name} {value:,.2f}" for name, value in values.items())
    print(f"{who} {setting}: {words}", file=sys.stderr, flush=True)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder for the photographs")
    parser.add_argument("--stages", action="store_true", help="CPU time by format and stage")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if arguments.one:
        who, setting, count = json.loads(arguments.one)
        print(json.dumps(measure(who, folder, setting, count)), flush=True)
        os._exit(0)  # without waiting for what the workers prefetch
    write_photographs(folder)
    if arguments.stages:
        stages(folder)
        return
    best = {
        who: max(
            settings,
            key=lambda one: run(who, folder, one, TUNING_BATCHES)["samples_per_second"],
        )
        for who, settings in SETTINGS.items()
    }
    rounds = [
        {who: run(who, folder, best[who], TIMED_BATCHES) for who in best} for _ in range(ROUNDS)
    ]
    medians = {
        who: {name: statistics.median(one[who][name] for one in rounds) for name in rounds[0][who]}
        for who in best
    }
    print("| | images/s | CPU ms per image | setting |\n|---|---|---|---|")
    for who, values in medians.items():
        rate, cpu = values["samples_per_second"], values["cpu_milliseconds_per_sample"]
        print(f"| {who} | {rate:,.0f} | {cpu:.2f} | {best[who]} |")
    for who, other in (("clip_jax", "open_clip"), ("clip_jax, turbo", "clip_jax")):
        rate, cpu = (medians[who][name] / medians[other][name] for name in medians[who])
        print(f"| ratio of {who} to {other} | {rate:.2f} | {1 / cpu:.2f} | |")


if __name__ == "__main__":
    main()
