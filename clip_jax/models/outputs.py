"""Names of what the towers compute for the terms of an objective; `losses.Term` lists them."""

from typing import NamedTuple


class Output(NamedTuple):
    """An output of the towers: embeddings of an input, token states of a layer, or others."""

    tower: str
    part: str  # "embedding", "tokens", or what a decoder returns: "states"
    input: str = ""  # name of the images or texts in the batch
    layer: int = 0

    @property
    def is_embedding(self) -> bool:
        """Whether it is an embedding, which a step keeps for the global batch."""
        return self.part == "embedding"


def output(name: str) -> Output:
    """Read a name, such as `text`, `text:synthetic`, `image_tokens:-1` or `caption_states`."""
    kind, _, detail = name.partition(":")
    tower, _, part = kind.partition("_")
    if part == "tokens":
        return Output(tower, part, layer=int(detail))
    return Output(tower, part or "embedding", input=detail or tower)
