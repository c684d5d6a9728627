"""Adapters, their base and a classifier, all in a bucket."""

import numpy as np

from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.state_dict import flatten
from clip_jax.convert.weights import Head
from clip_jax.models.lora import LoRAConfig
from clip_jax.storage import files
from tests.convert.conftest import make_weights, write_lora_run


def test_adapters_in_a_bucket(s3, tmp_path):
    base, there, out = (files.as_path(f"{s3.url}/{name}") for name in ("base", "run", "out"))
    write_weights(make_weights("siglip"), base, "hugging-face")
    head = Head(("a", "b"), ("{}",), np.ones((2, 32), np.float32))
    run = write_lora_run(tmp_path / "run", base, LoRAConfig(rank=2), head)
    for file in run.rglob("*"):
        if file.is_file():
            (there / str(file.relative_to(run))).write_bytes(file.read_bytes())
    merged = read_weights(there)
    convert(ConvertConfig(source=there, destination=out, to="peft"))
    again = read_weights(out, base=str(base))
    assert again.head is not None
    np.testing.assert_array_equal(again.head.kernel, head.kernel)
    for path, x in flatten(merged.params).items():
        np.testing.assert_allclose(flatten(again.params)[path], x, atol=1e-6, err_msg=path)
