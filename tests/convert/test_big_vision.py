"""big_vision's files: there and back without PyTorch; and files that lie about their arrays."""

import math
import zipfile
from dataclasses import replace

import jax
import numpy as np
import pytest

from clip_jax.convert import big_vision
from clip_jax.convert.formats import read_weights, verify, write_weights
from clip_jax.convert.tensor_files import read_tensors
from clip_jax.convert.verify import Unverifiable
from clip_jax.convert.weights import with_input
from clip_jax.errors import InputError
from clip_jax.models.images import NaFlex
from tests.convert.conftest import assert_same, cast, refuse


@pytest.mark.parametrize(
    ("to", "dtype"),
    [("big-vision", "bfloat16"), ("hugging-face", "float32"), ("clip-jax", "bfloat16")],
)
def test_there_and_back(tmp_path, siglip, to, dtype):
    path = tmp_path / ("x.npz" if to == "big-vision" else "x")
    write_weights(siglip, path, to, dtype=dtype)
    again = read_weights(path)
    cleaning = {"big-vision": "canonicalize"}.get(to, "punctuation")  # each format's own
    tokenizer = replace(siglip.config.text.tokenizer, clean=cleaning)
    config = replace(siglip.config, text=replace(siglip.config.text, tokenizer=tokenizer))
    rules = "transformers" if to == "hugging-face" else "openai"
    pixels = replace(siglip.preprocess, rules=rules)
    assert_same(again, replace(cast(siglip, dtype), config=config, preprocess=pixels))


def test_blocks_one_by_one(tmp_path, siglip):
    """As older files have them, in Fortran's order; with a file of the optimizer's, left out."""
    arrays = {}
    for name, array in big_vision.to_tensors(siglip).items():
        if "/encoderblock/" in name:
            for i, block in enumerate(array):
                place = name.replace("/encoderblock/", f"/encoderblock_{i}/")
                arrays[place] = np.asfortranarray(block)
        else:
            arrays[name] = array
    np.savez(tmp_path / "x.npz", **arrays, **{"opt/0/count": np.int32(3)})
    again = read_weights(tmp_path).params
    jax.tree.map(np.testing.assert_array_equal, again, siglip.params)
    name = next(name for name in arrays if "_0/MlpBlock_0/Dense_0/kernel" in name)
    arrays[name] = arrays[name].astype(np.int8)  # the other block's float32 would hide it
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=r"encoderblock_0.* has the type int8"):
        read_weights(tmp_path)


# Names and shapes in google-research/big_vision: models/proj/image_text/naflex_vit.py with `scan`,
# text_transformer.py and two_towers.py: width 32, two layers, two heads, patches of 8 x 8 pixels,
# 4 x 4 positions, texts of 6 of 40 words.
_ENCODER = {
    "encoderblock/LayerNorm_0/scale": (2, 32),
    "encoderblock/LayerNorm_0/bias": (2, 32),
    "encoderblock/LayerNorm_1/scale": (2, 32),
    "encoderblock/LayerNorm_1/bias": (2, 32),
    **{
        f"encoderblock/MultiHeadDotProductAttention_0/{name}/{kind}": shape
        for name in ("query", "key", "value")
        for kind, shape in (("kernel", (2, 32, 2, 16)), ("bias", (2, 2, 16)))
    },
    "encoderblock/MultiHeadDotProductAttention_0/out/kernel": (2, 2, 16, 32),
    "encoderblock/MultiHeadDotProductAttention_0/out/bias": (2, 32),
    "encoderblock/MlpBlock_0/Dense_0/kernel": (2, 32, 128),
    "encoderblock/MlpBlock_0/Dense_0/bias": (2, 128),
    "encoderblock/MlpBlock_0/Dense_1/kernel": (2, 128, 32),
    "encoderblock/MlpBlock_0/Dense_1/bias": (2, 32),
    "encoder_norm/scale": (32,),
    "encoder_norm/bias": (32,),
}
NAFLEX = {
    "img/embedding/kernel": (192, 32),
    "img/embedding/bias": (32,),
    "img/pos_embedding": (4, 4, 32),
    **{f"img/Transformer/{name}": shape for name, shape in _ENCODER.items()},
    "img/MAPHead_0/probe": (1, 1, 32),
    **{
        f"img/MAPHead_0/MultiHeadDotProductAttention_0/{name}/{kind}": shape
        for name in ("query", "key", "value")
        for kind, shape in (("kernel", (32, 2, 16)), ("bias", (2, 16)))
    },
    "img/MAPHead_0/MultiHeadDotProductAttention_0/out/kernel": (2, 16, 32),
    "img/MAPHead_0/MultiHeadDotProductAttention_0/out/bias": (32,),
    "img/MAPHead_0/LayerNorm_0/scale": (32,),
    "img/MAPHead_0/LayerNorm_0/bias": (32,),
    "img/MAPHead_0/MlpBlock_0/Dense_0/kernel": (32, 128),
    "img/MAPHead_0/MlpBlock_0/Dense_0/bias": (128,),
    "img/MAPHead_0/MlpBlock_0/Dense_1/kernel": (128, 32),
    "img/MAPHead_0/MlpBlock_0/Dense_1/bias": (32,),
    "txt/Embed_0/embedding": (40, 32),
    "txt/pos_embedding": (1, 6, 32),
    **{f"txt/Encoder_0/{name}": shape for name, shape in _ENCODER.items()},
    "txt/head/kernel": (32, 32),
    "txt/head/bias": (32,),
    "t": (1,),
    "b": (1,),
}


def write_naflex(path, shapes=NAFLEX):
    """Write arrays of these shapes; each number of one occurs only once."""
    arrays = {
        f"params/{name}": np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        for name, shape in shapes.items()
    }
    np.savez(path, **arrays)
    return arrays


def test_naflex(tmp_path):
    """Names, shapes and the order of axes; back to the same bits."""
    arrays = write_naflex(tmp_path / "in.npz")
    weights = read_weights(tmp_path / "in.npz")
    assert weights.config.vision.image_spec == weights.preprocess.image_spec == NaFlex(16, 8)
    assert (weights.preprocess.rules, weights.preprocess.interpolation) == (
        "tensorflow",
        "bilinear",
    )
    visual = weights.params["visual"]
    kernel = arrays["params/img/embedding/kernel"]
    # A patch is flattened in the order row, column, channel, and its position is (row, column).
    np.testing.assert_array_equal(visual["conv1"]["kernel"][3, 5, 2], kernel[(3 * 8 + 5) * 3 + 2])
    table = arrays["params/img/pos_embedding"]
    np.testing.assert_array_equal(visual["positional_embedding"][4 * 2 + 1], table[2, 1])
    write_weights(with_input(weights, tokens=7), tmp_path / "out.npz", "big-vision")
    again = read_tensors(tmp_path / "out.npz")
    assert again.keys() == arrays.keys()
    for name, array in arrays.items():
        assert again[name].shape == array.shape, name
        assert again[name].tobytes() == array.tobytes(), name
    with pytest.raises(Unverifiable, match="no released library reads"):
        verify(weights, tmp_path / "out.npz", "big-vision")


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("img/pos_embedding", (4, 5, 32), r"img/pos_embedding of 4 x 5 are not supported"),
        ("img/embedding/kernel", (191, 32), r"img/embedding/kernel for 191 values"),
        ("img/pos_embedding", (1, 16, 32), r"img/pos_embedding of 1 x 16"),
        ("img/patchln_pre/scale", (192,), r"patchln_pre/scale: surplus"),
    ],
)
def test_other_variants_of_naflex_are_refused(tmp_path, name, shape, match):
    write_naflex(tmp_path / "x.npz", NAFLEX | {name: shape})
    with pytest.raises(InputError, match=match):
        read_weights(tmp_path / "x.npz")


def entry(descr: str, shape: str) -> bytes:
    """An array's 16 bytes in an archive, with a header of our own."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(16)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (entry("'<f4'", "(1099511627776,)"), r"claims float32\[1099511627776\] but has 16 bytes"),
        (entry("'|O'", "(2,)"), "holds values of type object"),
        (entry("'<f4'", "(-2, -2)"), "claims"),
        (entry("'<f4'", "(True, 4)"), "claims"),
        (entry("'<f4'", "(4," + "1," * 64 + ")"), "claims"),
        (entry("'<f4'", "(4"), "is not an array"),
        (entry("'<f4'", "(" + "+".join(["1"] * 4000) + ",)"), "is not an array"),
        (entry("__import__('os').getcwd()", "(4,)"), "is not an array"),
        (b"", "is not an array"),
        (b"0" * 40, "is not an array"),
    ],
)
def test_arrays_that_lie(tmp_path, data, match):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("params/img/a.npy", data)
    refuse(path, match)


def test_compressed_and_truncated_files(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.zeros(1 << 20, np.float32))
    refuse(path, "is compressed")
    np.savez(path, a=np.arange(100.0), b=np.arange(7))
    data = path.read_bytes()
    for size in range(40, len(data), 29):
        path.write_bytes(data[:size])
        refuse(path, r"truncated|damaged|claims")
