"""Parts of a user, which no file of clip_jax names: `clip-jax --import my_parts COMMAND ...`.

A loss, an image tower, an evaluator and a data source, and a config that uses all of them. The page
docs/how-to/parts.md explains them.
"""

from tests.workflow.my_parts import hard_negatives, image_retrieval, json_images, mixer

__all__ = ["hard_negatives", "image_retrieval", "json_images", "mixer"]
