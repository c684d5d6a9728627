"""Any one source: the configs there are, and what opens each."""

from clip_jax.data.digits import DigitsConfig, DigitsSource
from clip_jax.data.sources import Source
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource
from clip_jax.data.sources.folder import FolderConfig, FolderSource
from clip_jax.data.sources.parquet import ParquetConfig, ParquetSource
from clip_jax.data.sources.saved_dataset import SavedDatasetConfig, SavedDatasetSource
from clip_jax.data.sources.table import TableConfig, TableSource
from clip_jax.data.sources.tar import TarConfig, TarSource
from clip_jax.data.sources.tfds import TfdsConfig, TfdsSource

SingleConfig = (
    DigitsConfig
    | TableConfig
    | TarConfig
    | FolderConfig
    | ParquetConfig
    | ArrayRecordConfig
    | TfdsConfig
    | SavedDatasetConfig
)


def open_single(config: SingleConfig, image_size: int) -> Source:
    """Open what a source's config describes; sources that draw do so in `image_size` pixels."""
    match config:
        case DigitsConfig():
            return DigitsSource(config, image_size)
        case TableConfig():
            return TableSource(config)
        case TarConfig():
            return TarSource(config)
        case FolderConfig():
            return FolderSource(config)
        case ParquetConfig():
            return ParquetSource(config)
        case ArrayRecordConfig():
            return ArrayRecordSource(config)
        case TfdsConfig():
            return TfdsSource(config)
        case SavedDatasetConfig():
            return SavedDatasetSource(config)
