"""What there is to prepare: the options, the tasks that they make, and the files of each."""

from dataclasses import dataclass
from typing import Literal

from clip_jax.data.sources.shards import BadShards
from clip_jax.engine import On
from clip_jax.errors import check_ranges, read_worker
from clip_jax.prepare import buckets
from clip_jax.prepare.filters import FilterConfig
from clip_jax.storage.files import AnyPath

_PAIR_BUCKETS = 16  # for each task's samples: what two neighbouring groups of shards both read
_MOST_BUCKETS = 1 << 16
_JOINED = 1 << 22  # rows compared at once, in memory: 16 bytes each, of perceptual hashes 40


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(FilterConfig):
    """What to write where."""

    source: str  # file, pattern or folder: tars, Parquet, ArrayRecord, table, TFDS, save_to_disk
    destination: AnyPath | None = None  # folder of the shards
    on: On = "here"  # ray: on the nodes of RAY_ADDRESS (ray://..., or `ray start`), or a local Ray
    inspect: bool = False  # only show the first samples and statistics
    index: bool = False  # only index the source's tars, so that no run begins with it; see --worker
    image_column: str = ""  # where the source has columns; empty: the format's default
    caption_column: str = ""  # column, feature, or key of the .json in tars; empty: the default
    bad_shards: BadShards = "error"  # of the source: missing, truncated or damaged ones
    worker: str = "1/1"  # which of how many workers this is, that share the work: 1/4 to 4/4
    shuffle: bool = False  # all pairs together, by a hash of key and seed; else the source's order
    seed: int = 0  # of the shuffle
    samples_per_shard: int = 10_000  # that are kept; where no pair depends on others, that are read
    samples_per_task: int = 0  # read and then written at a time, in memory; 0: as a shard
    threads: int = 0  # that read, check and write; 0: one a core
    batch_size: int = 64  # pairs at a time of the model that scores
    resize: int = 0  # pixels; larger images get a shorter side of so many; 0: sizes as they are
    encode: Literal["keep", "jpeg", "webp"] = "keep"  # keep: bytes as they are; resized ones: jpeg
    quality: int = 95  # of what is encoded anew

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self, samples_per_shard="[1, inf)", samples_per_task="[0, inf)", seed="[0, inf)",
            threads="[0, 1024]", batch_size="[1, inf)", resize="[0, inf)", quality="[1, 100]",
        )  # fmt: skip
        read_worker(self.worker)

    @property
    def joins(self) -> bool:
        """Whether what becomes of a pair depends on others: they are read first, then written."""
        return bool(
            self.drop_duplicates or self.drop_near_duplicates or self.score_with
            or self.top_share < 1 or self.shuffle
        )  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A source's samples in tasks. Everything in it follows from input and options."""

    folder: AnyPath
    samples: int
    per_task: int

    @property
    def work(self) -> AnyPath:
        """The folder of what is not the result; it goes when the result is whole."""
        return self.folder / "work"

    @property
    def reads(self) -> int:
        """How many tasks read."""
        return -(-self.samples // self.per_task)

    def indices(self, number: int) -> range:
        """Of the source, those that a task reads."""
        return range(number * self.per_task, min((number + 1) * self.per_task, self.samples))

    @property
    def pair_buckets(self) -> int:
        return min(buckets.power_of_two(_PAIR_BUCKETS * self.reads), _MOST_BUCKETS)

    @property
    def join_buckets(self) -> int:
        """In how many parts duplicates are looked for."""
        return buckets.power_of_two(self.samples / _JOINED)

    def file(self, number: int, kind: str) -> AnyPath:
        """What task `number` writes: pairs, rows, same, alike, then read, which says so; scores."""
        return self.work / f"{number:06d}.{kind}"

    def joined(self, kind: str, bucket: int) -> AnyPath:
        """Which of the images in a bucket are duplicates."""
        return self.work / f"{kind}-{bucket:05d}"

    @property
    def candidates(self) -> AnyPath:
        """A byte for each sample: what has become of it before scores are known."""
        return self.work / "candidates"

    @property
    def verdicts(self) -> AnyPath:
        """A byte for each sample: what has become of it."""
        return self.work / "verdicts"

    @property
    def evaluation(self) -> AnyPath:
        """The hashes of the evaluation sets' images."""
        return self.work / "evaluation.npz"

    def shard(self, number: int, count: int) -> AnyPath:
        """A shard of the result."""
        return self.folder / f"pairs-{number:05d}-of-{count:05d}.array_record"


def statistics_of(shard: AnyPath) -> AnyPath:
    """A shard's counts; written after the shard, so that their being there says it is whole."""
    return shard.with_suffix(".json")


@dataclass(frozen=True)
class Group:
    """Shards that one task writes: from `first` to before `last` of `count`."""

    first: int
    last: int
    count: int
    buckets: tuple[int, int]  # of pairs, in which theirs lie
    skip: int  # pairs at the front of the buckets that are an earlier shard's
    pairs: int
