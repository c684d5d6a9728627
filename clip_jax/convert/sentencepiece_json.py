"""A sentencepiece unigram model as a `tokenizer.json`, for readers that have no sentencepiece."""

import base64
from typing import Any

from clip_jax.errors import InputError

_UNIGRAM = 1  # of TrainerSpec.ModelType
_UNKNOWN, _CONTROL = 2, 3  # of SentencePiece.Type
_SPACE = "▁"


def to_json(data: bytes, file: str) -> dict[str, Any]:
    """Return the content of the `tokenizer.json` that splits texts in the same way.

    Raises InputError for a model of another kind than unigram, and without the package `protobuf`.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise InputError(
            f"{file} becomes a tokenizer.json with the package protobuf alone: "
            "pip install 'clip-jax-pods[onnx]'."
        ) from error
    made_at_run_time: Any = sentencepiece_model_pb2
    model = made_at_run_time.ModelProto.FromString(data)
    if model.trainer_spec.model_type != _UNIGRAM:
        raise InputError(
            f"{file} is a sentencepiece model of another kind than unigram; give the "
            "tokenizer.json that was published beside it, by --tokenizer."
        )
    rules = model.normalizer_spec
    steps: list[dict[str, Any]] = []
    if rules.precompiled_charsmap:
        table = base64.b64encode(rules.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if rules.remove_extra_whitespaces:
        steps += [
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    scheme = "always" if rules.add_dummy_prefix else "never"
    spaces = {
        "type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False,
    }  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i, "content": piece.piece, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True,
            }
            for i, piece in enumerate(model.pieces)
            if piece.type in (_UNKNOWN, _CONTROL)
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": spaces,
        "post_processor": None,
        "decoder": spaces,
        "model": {
            "type": "Unigram",
            "unk_id": next(i for i, x in enumerate(model.pieces) if x.type == _UNKNOWN),
            "vocab": [[piece.piece, piece.score] for piece in model.pieces],
            "byte_fallback": model.trainer_spec.byte_fallback,
        },
    }  # fmt: skip
