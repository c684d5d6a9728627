"""big_vision's files: there and back without PyTorch; and files that lie about their arrays."""

import zipfile
from dataclasses import replace

import jax
import numpy as np
import pytest

from clip_jax.convert import big_vision
from clip_jax.convert.formats import read_weights, write_weights
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


def test_native_aspect_ratios_are_refused_by_name(tmp_path, siglip):
    arrays = big_vision.to_tensors(siglip)
    kernel = arrays["params/img/embedding/kernel"]
    arrays["params/img/embedding/kernel"] = kernel.reshape(-1, kernel.shape[-1])
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match="NaFlex"):
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
