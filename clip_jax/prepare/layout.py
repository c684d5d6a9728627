"""Options of `clip-jax prepare`, the tasks that follow from them, and the files of each."""

from dataclasses import dataclass
from typing import Literal

from clip_jax.data.augment import AugmentationsConfig
from clip_jax.data.reinforced import EmbeddingType
from clip_jax.data.sources.shards import BadShards
from clip_jax.engine import On
from clip_jax.errors import InputError, check_ranges, read_worker, renamed_fields
from clip_jax.models.generation import GenerationConfig
from clip_jax.models.layers import DType
from clip_jax.optim import Tower
from clip_jax.prepare import buckets
from clip_jax.prepare.filters import FilterConfig
from clip_jax.storage.files import AnyPath

_PAIR_BUCKETS = 16  # for each task's samples; neighbouring groups of shards share one
_MOST_BUCKETS = 1 << 16
_NEEDS = {  # options that only have a meaning with another one
    "captions": ("captions_per_image", "generation"),
    "reinforce": (
        "reinforce_towers",
        "augmentations_per_image",
        "augmentations",
        "embedding_type",
        "teacher_dtype",
    ),
}
_JOINED = 1 << 22  # rows compared at once, in memory: 16 bytes each, or 40 for perceptual hashes


@renamed_fields("0.3.0", part="worker")
@dataclass(frozen=True, kw_only=True)
class PrepareConfig(FilterConfig):
    """Settings of `clip-jax prepare`: source, destination, filters and shards."""

    source: str  # File, pattern or folder: tars, Parquet, ArrayRecord, table, TFDS, save_to_disk.
    destination: AnyPath | None = None  # Folder for the shards; not used by --inspect and --index.
    # "here": threads of this process. "ray": the cluster at RAY_ADDRESS (host:6379, ray://...) or
    # of `ray start`, else a local one.
    on: On = "here"
    inspect: bool = False  # Only show the first samples and statistics.
    index: bool = False  # Only index the source's tars, so that no run has to; see --worker.
    image_column: str = ""  # Column (or feature) of the images; empty: the format's default.
    caption_column: str = ""  # Column, feature or key in a tar's .json; empty: the default.
    bad_shards: BadShards = "error"  # Missing or damaged shards: stop with an error, or skip them.
    worker: str = "1/1"  # This worker's number and the number of all workers: 1/4 to 4/4.
    shuffle: bool = False  # Shuffle all pairs, by a hash of key and seed; else keep their order.
    seed: int = 0  # Random seed of the shuffle, of synthetic captions and of augmentations.
    list_dropped: bool = False  # Also write dropped.csv: the key and the reason of dropped pairs.
    # Format of the shards. "tar": WebDataset in the layout of Apple's reinforced data sets, with
    # float16 embeddings; of several captions, only the first is written.
    shards: Literal["array_record", "tar"] = "array_record"
    # Number of pairs in a shard. If no option compares pairs (duplicates, score_with, top_share,
    # shuffle): number of samples that are read for a shard, before filters.
    samples_per_shard: int = 10_000
    samples_per_task: int = 0  # Samples that a task holds in memory; 0: samples_per_shard.
    threads: int = 0  # Threads that read, filter and write; 0: one for each CPU core.
    batch_size: int = 64  # Pairs scored at once; else images or captions at once on each device.
    resize: int = 0  # Shorter side to which larger images are resized, in pixels; 0: no resizing.
    # Format of stored images. "keep": the original bytes, or JPEG for resized images. "none": no
    # images, for runs that read stored embeddings of images alone (--stored image).
    encode: Literal["keep", "jpeg", "webp", "none"] = "keep"
    quality: int = 95  # JPEG or WebP quality of re-encoded images, from 1 to 100.
    # Captioner (CoCa or MaMMUT) that writes synthetic captions, instead of the source's.
    captions: AnyPath | None = None
    captions_per_image: int = 1  # Number of synthetic captions of each image.
    generation: GenerationConfig = GenerationConfig(method="sample")
    # Teachers, whose embeddings of augmented images and of captions are stored for distillation;
    # or one frozen tower, whose embeddings replace it in training (--stored).
    reinforce: tuple[AnyPath, ...] = ()
    reinforce_towers: tuple[Tower, ...] = ("image", "text")  # Towers whose embeddings are stored.
    # Number of augmentations of each image. 0: none, only its central square, or all of it for
    # models that squash images.
    augmentations_per_image: int = 2
    augmentations: AugmentationsConfig = AugmentationsConfig()
    # Data type of stored embeddings. int8: with one scale per row and teacher.
    embedding_type: EmbeddingType = "float16"
    teacher_dtype: DType = "float32"  # Data type of the teachers' computation.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self,
            samples_per_shard="[1, inf)",
            samples_per_task="[0, inf)",
            seed="[0, inf)",
            threads="[0, 1024]",
            batch_size="[1, inf)",
            resize="[0, inf)",
            quality="[1, 100]",
            captions_per_image="[1, 1000]",
            augmentations_per_image="[0, 1000]",
        )
        read_worker(self.worker)
        for option, names in _NEEDS.items():
            changed = [x for x in names if getattr(self, x) != getattr(PrepareConfig, x)]
            if changed and not getattr(self, option):
                raise InputError(f"{changed[0]} has no meaning without {option}; set both")
        if self.generation.seed:
            raise InputError("generation.seed has no effect; set seed, from which all seeds follow")
        if self.captions_per_image > 1 and self.generation.method != "sample":
            raise InputError("captions_per_image > 1 needs generation.method=sample; set it")
        if self.shards == "tar" and self.embedding_type != "float16":
            kind = self.embedding_type
            raise InputError(f"shards=tar has no embedding_type={kind}; change one of them")
        if self.shards == "tar" and self.encode == "none":
            raise InputError("shards=tar needs images; change it, or encode=none")
        if not self.reinforce_towers:
            raise InputError("reinforce_towers is empty; name image, text or both")

    @property
    def has_models(self) -> bool:
        """Whether writing a shard takes a captioner or teachers."""
        return bool(self.captions or self.reinforce)

    @property
    def views_per_image(self) -> int:
        """Number of embeddings of each image for each teacher."""
        return max(1, self.augmentations_per_image) if "image" in self.reinforce_towers else 0

    @property
    def joins(self) -> bool:
        """Whether the fate of a pair depends on others: then all are read before any is written."""
        return bool(
            self.drop_duplicates
            or self.drop_near_duplicates
            or self.score_with
            or self.top_share < 1
            or self.shuffle
        )


@dataclass(frozen=True)
class Layout:
    """How a source's samples are divided into tasks, which follows from source and options."""

    folder: AnyPath
    samples: int
    per_task: int
    suffix: str = "array_record"  # of the shards

    @property
    def work(self) -> AnyPath:
        """The folder of intermediate files; it is deleted when the result is complete."""
        return self.folder / "work"

    @property
    def reads(self) -> int:
        """Number of reading tasks."""
        return -(-self.samples // self.per_task)

    def indices(self, number: int) -> range:
        """Return the indices of the samples that a task reads."""
        return range(number * self.per_task, min((number + 1) * self.per_task, self.samples))

    @property
    def pair_buckets(self) -> int:
        return min(buckets.power_of_two(_PAIR_BUCKETS * self.reads), _MOST_BUCKETS)

    @property
    def join_buckets(self) -> int:
        """Number of parts in which duplicates are searched."""
        return buckets.power_of_two(self.samples / _JOINED)

    def file(self, number: int, kind: str) -> AnyPath:
        """Return a task's file: pairs, rows, same, alike; read (marks the end of these); scores."""
        return self.work / f"{number:06d}.{kind}"

    def joined(self, kind: str, bucket: int) -> AnyPath:
        """Return the file that lists the duplicates in a bucket."""
        return self.work / f"{kind}-{bucket:05d}"

    @property
    def candidates(self) -> AnyPath:
        """File with a byte for each sample: its verdict before scores are known."""
        return self.work / "candidates"

    @property
    def verdicts(self) -> AnyPath:
        """File with a byte for each sample: its final verdict."""
        return self.work / "verdicts"

    @property
    def evaluation(self) -> AnyPath:
        """File of the evaluation images' hashes."""
        return self.work / "evaluation.npz"

    def shard(self, number: int, count: int) -> AnyPath:
        """Return the path of a shard of the result."""
        return self.folder / f"pairs-{number:05d}-of-{count:05d}.{self.suffix}"


def statistics_of(shard: AnyPath) -> AnyPath:
    """Return the path of a shard's counts, written last: their file marks a complete shard."""
    return shard.with_suffix(".json")


@dataclass(frozen=True)
class Group:
    """Shards from `first` to before `last` of `count`, which one task writes."""

    first: int
    last: int
    count: int
    buckets: tuple[int, int]  # first one that contains their pairs, and the one after the last
    skip: int  # pairs at the start of the buckets that belong to an earlier shard
    pairs: int
