"""big_vision's files: there and back without PyTorch; and files that lie about their arrays."""

import io
import zipfile
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from clip_jax.convert import big_vision
from clip_jax.convert.files import read_tensors
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.state_dict import flatten
from clip_jax.loading import starting_params
from tests.convert.conftest import make_weights, refuse


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
    assert (again.config, again.preprocess) == (config, siglip.preprocess)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    arrays = flatten(again.params)
    for name, array in flatten(siglip.params).items():
        np.testing.assert_array_equal(arrays[name], array.astype(kind), strict=True)


@pytest.mark.parametrize("to", ["big-vision", "hugging-face"])
def test_a_fine_tuning_begins_from_it(tmp_path, siglip, to):
    """At another resolution; and with another text tower, for which the image tower is taken."""
    path = tmp_path / ("x.npz" if to == "big-vision" else "x")
    write_weights(siglip, path, to)
    larger = replace(siglip.config.vision, image_size=48)
    params = starting_params(path, replace(siglip.config, vision=larger))
    assert params["visual"]["positional_embedding"].shape == (36, 32)
    np.testing.assert_array_equal(params["logit_bias"], siglip.params["logit_bias"])
    other = replace(siglip.config, text=replace(siglip.config.text, width=64))
    with pytest.raises(ValueError, match="take one tower with --init-towers"):
        starting_params(path, other)
    assert set(starting_params(path, other, ["image"])) == {"visual"}


def test_what_big_vision_has_no_words_for(tmp_path, siglip):
    text = replace(siglip.config.text, activation="gelu")
    for weights, match in [
        (make_weights("vit"), "big_vision's SigLIP cannot express this model's init_logit_bias"),
        (make_weights("resnet"), "big_vision's SigLIP has no ResNet"),
        (replace(siglip, config=replace(siglip.config, text=text)), "gelu_tanh and gelu"),
    ]:
        with pytest.raises(ValueError, match=match):
            write_weights(weights, tmp_path / "x.npz", "big-vision")
    assert not list(tmp_path.iterdir())


def test_blocks_one_by_one(tmp_path, siglip):
    """As older files have them; with a file of the optimizer's, which is left."""
    arrays = {}
    for name, array in big_vision.to_tensors(siglip).items():
        if "/encoderblock/" in name:
            for i, block in enumerate(array):
                arrays[name.replace("/encoderblock/", f"/encoderblock_{i}/")] = block
        else:
            arrays[name] = array
    np.savez(tmp_path / "x.npz", **arrays, **{"opt/0/count": np.int32(3)})
    again = flatten(read_weights(tmp_path / "x.npz").params)
    for name, array in flatten(siglip.params).items():
        np.testing.assert_array_equal(again[name], array)


def test_native_aspect_ratios_are_refused_by_name(tmp_path, siglip):
    arrays = big_vision.to_tensors(siglip)
    kernel = arrays["params/img/embedding/kernel"]
    arrays["params/img/embedding/kernel"] = kernel.reshape(-1, kernel.shape[-1])
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match="NaFlex"):
        read_weights(tmp_path / "x.npz")


def entry(header: str, data: bytes = bytes(16)) -> bytes:
    """An array's bytes in an archive, with a header of our own."""
    raw = header.encode()
    return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + data


LIES = {
    "more than is there": (
        entry("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}"),
        r"claims float32\[1099511627776\] and has 16 bytes",
    ),
    "objects": (
        entry("{'descr': '|O', 'fortran_order': False, 'shape': (2,)}"),
        "holds values of type object",
    ),
    "a negative side": (
        entry("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2)}"),
        "claims",
    ),
    "a program": (
        entry("{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (4,)}"),
        "is no array",
    ),
    "nothing": (b"", "is no array"),
    "text": (b"0" * 40, "is no array"),
}


@pytest.mark.parametrize("name", LIES)
def test_arrays_that_lie(tmp_path, name):
    data, match = LIES[name]
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("params/img/a.npy", data)
    refuse(path, match)


def test_compressed_and_truncated_files(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(1 << 20, np.float32))
    with pytest.raises(ValueError, match="is compressed"):
        read_tensors(tmp_path / "x.npz")
    whole = io.BytesIO()
    np.savez(whole, a=np.arange(100.0), b=np.arange(7))
    path = tmp_path / "y.npz"
    for size in range(40, len(whole.getvalue()), 29):
        path.write_bytes(whole.getvalue()[:size])
        with pytest.raises(ValueError, match=r"truncated|damaged|claims"):
            read_tensors(path)
