"""The CLIP paper's data sets (tables 9 and 11): where each lies, its names, and its metric.

A data set is looked for under one root, by name: CLIP_benchmark's WebDataset layout
(`NAME/test/*.tar`, or `wds_NAME`), a folder of classes (`NAME/test/CLASS/` or `NAME/CLASS/`),
or a prepared TFDS builder (`TFDS_NAME/[config/]VERSION/dataset_info.json`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_jax.evals import prompts
from clip_jax.evals.datasets import (
    Captioned,
    Labelled,
    Missing,
    open_captions,
    open_folder,
    open_tfds,
    open_webdataset,
)  # fmt: skip


@dataclass(frozen=True)
class DataSet:
    """One row of the suite."""

    name: str  # CLIP_benchmark's
    classes: int  # 0: captions
    tfds: str = ""  # builder[/config]; empty: TFDS has none that works without TensorFlow
    split: str = "test"  # TFDS's
    label: str = "label"  # TFDS's feature
    metric: str = "acc1"  # the paper's choice
    published_names: bool = False  # TFDS's order of classes is that of the published names
    like: str = ""  # whose names and templates; empty: its own
    source: str = ""  # where a folder of it comes from

    @property
    def prompts(self) -> str:
        return self.like or self.name


_MEAN = "mean_per_class_recall"
SUITE = (
    DataSet("imagenet1k", 1_000, "imagenet2012", "validation", published_names=True),
    DataSet("imagenetv2", 1_000, "imagenet_v2", published_names=True, like="imagenet1k"),
    DataSet("imagenet-a", 200, like="imagenet1k", source="hendrycks/natural-adv-examples"),
    DataSet("imagenet-r", 200, like="imagenet1k", source="hendrycks/imagenet-r"),
    DataSet("imagenet_sketch", 1_000, "imagenet_sketch", published_names=True, like="imagenet1k"),
    DataSet("objectnet", 113, like="imagenet1k", source="objectnet.dev"),
    DataSet("cifar10", 10, "cifar10"),
    DataSet("cifar100", 100, "cifar100"),
    DataSet("food101", 101, "food101", "validation"),
    DataSet("sun397", 397, "sun397"),
    DataSet("cars", 196, "cars196"),
    DataSet("fgvc_aircraft", 100, metric=_MEAN, source="robots.ox.ac.uk/~vgg/data/fgvc-aircraft"),
    DataSet("voc2007", 20, source="CLIP_benchmark's export: objects cut out by their boxes"),
    DataSet("dtd", 47, "dtd"),
    DataSet("pets", 37, "oxford_iiit_pet", metric=_MEAN, published_names=True),
    DataSet("caltech101", 102, "caltech101", metric=_MEAN),
    DataSet("flowers", 102, "oxford_flowers102", metric=_MEAN, published_names=True),
    DataSet("mnist", 10, "mnist", published_names=True),
    DataSet("fer2013", 7, source="kaggle.com/datasets/msambare/fer2013"),
    DataSet("stl10", 10, "stl10"),
    DataSet("eurosat", 10, "eurosat/rgb", "train", published_names=True),
    DataSet("resisc45", 45, "resisc45", "train"),
    DataSet("gtsrb", 43, source="benchmark.ini.rub.de"),
    DataSet("kitti_closest_vehicle_distance", 4, source="CLIP_benchmark's export"),
    DataSet("country211", 211, source="github.com/openai/CLIP/blob/main/data/country211.md"),
    DataSet("pcam", 2, "patch_camelyon", published_names=True),
    DataSet("clevr_count_all", 8, source="CLIP_benchmark's export: counts of 3 to 10"),
    DataSet("svhn", 10, "svhn_cropped", published_names=True),
    DataSet("renderedsst2", 2, source="github.com/openai/CLIP/blob/main/data/rendered-sst2.md"),
    DataSet("mscoco_captions", 0, metric="image_retrieval_recall@5",
            source="cocodataset.org (val2014) and coco_test_karpathy.json"),
    DataSet("flickr30k", 0, metric="image_retrieval_recall@5",
            source="Flickr30k's images and flickr30k_test_karpathy.json"),
)  # fmt: skip

# Measured with OpenAI's weights by Cherti et al. (CVPR 2023), see NOTICE: B/32, B/16, L/14.
OPENAI = {
    "imagenet1k": (0.63334, 0.68352, 0.75490),
    "imagenetv2": (0.55960, 0.61880, 0.69680),
    "imagenet-a": (0.31373, 0.50067, 0.70680),
    "imagenet-r": (0.69320, 0.77667, 0.87870),
    "imagenet_sketch": (0.42304, 0.48144, 0.59624),
    "objectnet": (0.44175, 0.55443, 0.69080),
    "mscoco_captions": (0.55846, 0.58369, 0.61084),
    "flickr30k": (0.83380, 0.85540, 0.87160),
}


def open_data_set(row: DataSet, root: Path) -> Labelled | Captioned:
    """Find one data set under `root`. Missing says where it was looked for and how to get it.

    ValueError when what is there has another number of classes than the data set.
    """
    data = _find(row, root)
    if isinstance(data, Labelled) and len(data.names) != row.classes:
        raise ValueError(f"{row.name} has {row.classes} classes, the one in {root} "
                         f"{len(data.names)}.")  # fmt: skip
    return data


def _find(row: DataSet, root: Path) -> Labelled | Captioned:
    for folder in (root / row.name, root / f"wds_{row.name}", root / f"wds_vtab-{row.name}"):
        if any((folder / "test").glob("*.tar")):
            return open_webdataset(folder)
    if not row.classes:
        return _find_captions(row, root / row.name)
    if row.tfds and (versions := sorted((root / row.tfds).glob("*/dataset_info.json"))):
        names = prompts.class_names(row.prompts) if row.published_names else None
        return open_tfds(
            versions[-1].parent, split=row.split, label=row.label, names=names,
            templates=_templates(row),
        )  # fmt: skip
    for folder in (root / row.name / "test", root / row.name):
        if folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir()):
            return open_folder(folder, name=row.prompts)
    raise Missing(_advice(row, root))


def _find_captions(row: DataSet, folder: Path) -> Captioned:
    annotations = sorted(folder.glob("*test_karpathy.json"))
    images = [path for path in (folder / "val2014", folder / "images", folder) if path.is_dir()]
    if not annotations or not images:
        raise Missing(
            f"{row.name}: put {row.source} in {folder}, the images in val2014/ or images/ there."
        )
    return open_captions(annotations[0], images[0])


def _templates(row: DataSet) -> Sequence[str]:
    return prompts.templates(row.prompts) or (prompts.PLAIN_TEMPLATE,)


def _advice(row: DataSet, root: Path) -> str:
    ways = []
    if row.tfds:
        ways.append(
            f"python -m tensorflow_datasets build {row.tfds} --data_dir {root} "
            "--file_format array_record"
        )
    ways.append(
        f"a folder for each class in {root / row.name}/test"
        + (f" (from {row.source})" if row.source else "")
    )
    ways.append(f"CLIP_benchmark's tars in {root / row.name}/test")
    return f"{row.name} is not in {root}: " + "; or ".join(ways) + "."
