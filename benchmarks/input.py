"""Compare input pipelines on the same JPEG files: clip_jax and open_clip's WebDataset loader.

    python benchmarks/input.py FOLDER

FOLDER receives 5,000 photographs of 640 x 480 pixels in 25 tars with captions: crops of those that
scikit-image and scikit-learn ship. open_clip reads them by its own `get_wds_dataset` with its
training transform, in an endless epoch, so that no refill of its shuffle buffers is measured. Both
take crops with the scale (0.9, 1) to 224 pixels, tokenise captions to 77 ids, and make batches of
256. open_clip returns normalised float32; clip_jax returns uint8, which the training step
normalises.

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
    "clip_jax": (
        {"workers": 0, "threads": 2},
        {"workers": 0, "threads": 3},
        {"workers": 1, "threads": 2},
        {"workers": 2, "threads": 1},
        {"workers": 2, "threads": 2},
    ),
}


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


def clip_jax_batches(folder: Path, workers: int, threads: int):
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
    make = {"open_clip": open_clip_batches, "clip_jax": clip_jax_batches}[who]
    batches = make(folder, **setting)
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
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if arguments.one:
        who, setting, count = json.loads(arguments.one)
        print(json.dumps(measure(who, folder, setting, count)), flush=True)
        os._exit(0)  # without waiting for what the workers prefetch
    write_photographs(folder)
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
    first, second = medians["clip_jax"], medians["open_clip"]
    rate, cpu = (first[name] / second[name] for name in first)
    print(f"| ratio | {rate:.2f} | {1 / cpu:.2f} | |")


if __name__ == "__main__":
    main()
