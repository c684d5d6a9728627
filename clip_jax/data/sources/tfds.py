"""TensorFlow Datasets without TensorFlow: sets prepared as array_record or Parquet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.data.sources import SampleError, caption_of, captions_of


@dataclass(frozen=True, kw_only=True)
class TfdsConfig:
    """A prepared TFDS builder (`file_format="array_record"`)."""

    path: str  # of the folder with dataset_info.json: .../name/1.0.0
    split: str = "train"
    image_column: str = "image"  # feature with the image
    caption_column: str = "caption"  # Text feature, or a sequence of texts


class TfdsSource:
    """One pair an example, images as they were stored. ValueError for folders not usable."""

    def __init__(self, config: TfdsConfig) -> None:
        import tensorflow_datasets as tfds

        folder = Path(config.path).expanduser()
        if not (folder / "dataset_info.json").is_file():
            raise ValueError(
                f"no dataset_info.json in {folder}; set data.source.path to the version's folder "
                "of a prepared TFDS builder, such as .../coco_captions/1.1.0"
            )
        builder: Any = tfds.builder_from_directory(str(folder))
        features = list(builder.info.features)
        for option in ("image_column", "caption_column"):
            if getattr(config, option) not in features:
                raise ValueError(
                    f"{folder} has no feature {getattr(config, option)!r}, only "
                    f"{', '.join(map(repr, features))}; set data.source.{option}"
                )
        if config.split not in builder.info.splits:
            raise ValueError(
                f"{folder} has no split {config.split!r}, only "
                f"{', '.join(map(repr, builder.info.splits))}; set data.source.split"
            )
        self._examples = builder.as_data_source(
            split=config.split, decoders={config.image_column: tfds.decode.SkipDecoding()}
        )
        self._config = config

    def __len__(self) -> int:
        return len(self._examples)

    def key(self, index: int) -> str:
        """Split and number of the example."""
        return f"{self._config.split}:{index}"

    def load(self, index: int, rng: np.random.Generator) -> tuple[bytes, str]:
        """Get the encoded image and the caption."""
        example = self._example(index)
        return self._image(example), caption_of(self._caption(example), rng)

    def image(self, index: int) -> bytes:
        """Get the encoded image."""
        return self._image(self._example(index))

    def captions(self, index: int) -> list[str]:
        """Get all texts of the caption's feature."""
        return captions_of(self._caption(self._example(index)))

    def _example(self, index: int) -> dict[str, Any]:
        try:
            return self._examples[index]
        except (OSError, ValueError, RuntimeError) as error:
            raise SampleError(f"example cannot be read: {error}") from error

    def _image(self, example: dict[str, Any]) -> bytes:
        image = example[self._config.image_column]
        if isinstance(image, np.ndarray) and image.ndim == 0:
            image = image.item()
        if not isinstance(image, bytes):
            raise SampleError(f"image is {type(image).__name__}, not encoded bytes")
        return image

    def _caption(self, example: dict[str, Any]) -> Any:
        caption = example[self._config.caption_column]
        if isinstance(caption, dict):  # a sequence of {"text": ...}, as in coco_captions
            caption = next(iter(caption.values()), [])
        return caption.tolist() if isinstance(caption, np.ndarray) else caption
