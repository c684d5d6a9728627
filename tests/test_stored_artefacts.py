"""Data, models, embeddings and exports of earlier versions are read as these versions read them.

`tests/golden/artefacts.py` wrote them. A check fails if a weight, an id or a field has changed.
"""

import functools
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_files
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from safetensors.numpy import load_file, save_file

from clip_jax import __version__
from clip_jax.config_files import load_config
from clip_jax.convert.verify import relative_difference
from clip_jax.data.sources import SampleError
from clip_jax.data.sources.any import open_images
from clip_jax.data.sources.array_record import decode_example, encode_example
from clip_jax.errors import InputError
from clip_jax.export import onnx, stablehlo
from clip_jax.inference.evaluate import config_of_run
from clip_jax.inference.loading import load, unit
from clip_jax.inference.search import SearchConfig, search
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.prepare.writer import prepare
from tests.golden.artefacts import PREPARED, QUERY, STORES, VERSIONS, content_of, read_expected

# Programs of other versions of JAX and onnxruntime sum float32 in another order.
ROUNDING = 1e-5
FORMATS = ("model", "hugging-face")


def check_data(name: str) -> None:
    """Check keys, captions, pixels and stored embeddings of prepared data."""
    values, arrays = read_expected()
    pairs, stored = content_of(Path(name))
    assert pairs == values[name]
    np.testing.assert_array_equal(stored, arrays[name])


def check_model(name: str) -> None:
    """Check that a model tokenizes and embeds as the version that wrote it."""
    _, arrays = read_expected()
    model, images = load(name), open_images("tars/*.tar")
    pixels = model.preprocess([images.image(i) for i in range(len(images))])
    (path,) = Path("embeddings").glob("*.parquet")
    embeddings = np.stack(pq.read_table(path)["embedding"].to_numpy())
    np.testing.assert_allclose(unit(model.encode_image(pixels)), embeddings, rtol=0, atol=ROUNDING)
    text = model.encode_text(model.tokenize([QUERY]))
    np.testing.assert_allclose(text, arrays["query"], rtol=0, atol=ROUNDING)


def check_search(store: str) -> None:
    """Check keys and similarities of the images that a text finds."""
    values, _ = read_expected()
    folders = {"model": Path("model"), "embeddings": Path("embeddings")}
    results = search(SearchConfig(**folders, text=QUERY, top=5, store=store))
    expected = values["search"][store]
    assert [(x["key"], x["index"]) for x in results] == [(x["key"], x["index"]) for x in expected]
    similarities = [x["similarity"] for x in results]
    assert similarities == pytest.approx([x["similarity"] for x in expected], abs=ROUNDING)


def check_export(name: str) -> None:
    """Check the outputs of an export's programs, and the ids of its tokenizer."""
    _, arrays = read_expected()
    config, inputs = load("model").config, (arrays["images"], arrays["tokens"])
    if name == "stablehlo":
        layout, outputs = None, stablehlo.outputs(Path(name), config, *inputs)
    else:
        layout = "transformers-js"
        outputs = onnx.outputs(Path(name), layout, config, "float32", *inputs)
    for key, x in outputs.items():
        assert relative_difference(x, arrays[key]) <= ROUNDING, key
    assert onnx.other_ids(Path(name), layout, config.text) == 0


CHECKS = {
    **{name: functools.partial(check_data, name) for name in PREPARED},
    **{name: functools.partial(check_model, name) for name in FORMATS},
    **{f"search {store}": functools.partial(check_search, store) for store in STORES},
    **{name: functools.partial(check_export, name) for name in ("stablehlo", "onnx")},
}


@pytest.mark.parametrize("name", CHECKS)
def test_artefacts_of_earlier_versions_give_what_they_gave(artefacts, name):
    CHECKS[name]()


def test_no_version_is_missing():
    minor, _, _ = __version__.rpartition(".")
    assert {"0.2.0", f"{minor}.0"} <= {*VERSIONS}, "run `python -m tests.golden.artefacts`"


# ------------------------------------------------------------------ altered copies


def change_records(folder: str, feature: str, change: Callable[[bytes], bytes]) -> None:
    """Change a feature of a prepared folder's first record."""
    (path,) = Path(folder).glob("*.array_record")
    source = ArrayRecordDataSource(str(path))
    records = [decode_example(source[i]) for i in range(len(source))]
    records[0][feature] = [change(x) for x in records[0][feature]]
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(encode_example(record))
    writer.close()


def change_pixel(image: bytes) -> bytes:
    """Change one pixel of a picture by the least amount."""
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).copy()
    pixels[3, 5, 0] ^= 1
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def change_step(embedding: bytes) -> bytes:
    """Change the last value of an int8 embedding by one step."""
    return embedding[:-1] + bytes([embedding[-1] ^ 1])


def change_file(path: str, old: str, new: str) -> None:
    """Replace the first occurrence of a text in a file."""
    content = Path(path).read_bytes()
    assert old.encode() in content
    Path(path).write_bytes(content.replace(old.encode(), new.encode(), 1))


def change_ids(path: str) -> None:
    """Change the key of a tar's fourth sample, also in the members' checksums."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            member.name = member.name.replace("000000000003", "000000000993")
            tar.addfile(member, io.BytesIO(data))


def change_weight(folder: str, name: str) -> None:
    """Change one element of a tensor by a thousandth."""
    path = f"{folder}/model.safetensors"
    tensors = load_file(path)
    tensors[name].flat[0] += 1e-3
    save_file(tensors, path, {"format": "pt"})


def change_onnx(path: str) -> None:
    """Change one element of the first float tensor by a thousandth."""
    model = onnx_files.load(path)
    tensor = next(x for x in model.graph.initializer if x.data_type == onnx_files.TensorProto.FLOAT)
    values = onnx_files.numpy_helper.to_array(tensor).copy()
    values.flat[0] += 1e-3
    tensor.CopyFrom(onnx_files.numpy_helper.from_array(values, tensor.name))
    onnx_files.save(model, path)


def change_embeddings(column: str, change: Callable[[Any], Any]) -> None:
    """Change a column of the first embedding."""
    (path,) = Path("embeddings").glob("*.parquet")
    table = pq.read_table(path)
    first, *others = table[column].to_pylist()
    number, field = table.schema.get_field_index(column), table.schema.field(column)
    values = pa.array([change(first), *others], field.type)
    pq.write_table(table.set_column(number, field, values), path)


TAR = "tars/pairs-00000-of-00001.tar"
# The check that fails, its message, and what is altered.
ALTERED = {
    "caption of pairs": (
        *("pairs", "tiny red circle"),
        lambda: change_records("pairs", "caption", lambda x: x.replace(b"large", b"tiny")),
    ),
    "pixel of pairs": (
        *("pairs", "Arrays are not equal"),
        lambda: change_records("pairs", "image", change_pixel),
    ),
    "embedding of reinforced": (
        *("reinforced", "Arrays are not equal"),
        lambda: change_records("reinforced", "text_emb", change_step),
    ),
    "field of reinforced": (
        *("reinforced", "image_emb has shape"),
        lambda: change_records("reinforced", "emb", lambda x: x.replace(b"int8", b"float16")),
    ),
    "caption of tars": (
        *("tars", "small red circle"),
        lambda: change_file(TAR, "large red circle", "small red circle"),
    ),
    "id of tars": ("tars", "000000000993", lambda: change_ids(TAR)),
    "weight of model": (
        *("model", "Not equal to tolerance"),
        lambda: change_weight("model", "visual/proj"),
    ),
    "field of model": (
        *("model", "Not equal to tolerance"),
        lambda: change_file("model/manifest.json", "0.48145466", "0.48245466"),
    ),
    "weight of hugging-face": (
        *("hugging-face", "Not equal to tolerance"),
        lambda: change_weight("hugging-face", "visual_projection.weight"),
    ),
    "id of hugging-face": (
        *("hugging-face", "Not equal to tolerance"),
        lambda: change_file(
            "hugging-face/tokenizer.json", '"in":512,"th":513', '"in":513,"th":512'
        ),
    ),
    "field of hugging-face": (
        *("hugging-face", "Not equal to tolerance"),
        lambda: change_file("hugging-face/config.json", "quick_gelu", "gelu"),
    ),
    "value of embeddings": (
        *("search float32", "approx"),
        lambda: change_embeddings("embedding", lambda x: [x[0] + 1e-3, *x[1:]]),
    ),
    "id of embeddings": (
        *("search int8", "00000 of another tar"),
        lambda: change_embeddings("key", lambda x: x + " of another tar"),
    ),
    "field of embeddings": (
        *("search binary", "are another model's"),
        lambda: change_file("embeddings/embed.json", "-0.79598", "-0.69598"),
    ),
    "weight of stablehlo": (
        *("stablehlo", "image_features"),
        lambda: change_weight("stablehlo", "visual/proj"),
    ),
    "id of stablehlo": (
        *("stablehlo", "assert . == 0"),
        lambda: change_file(
            "stablehlo/tokenizer.json", '"a</w>":320,"b</w>":321', '"a</w>":321,"b</w>":320'
        ),
    ),
    "weight of onnx": (
        *("onnx", "image_features"),
        lambda: change_onnx("onnx/onnx/vision_model.onnx"),
    ),
    "field of onnx": (
        *("onnx", "assert . == 0"),
        lambda: change_file("onnx/tokenizer.json", '"Lowercase"', '"NFC"'),
    ),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_copy_fails_the_check(artefacts, name):
    check, message, alter = ALTERED[name]
    alter()
    with pytest.raises((AssertionError, InputError, SampleError), match=message):
        CHECKS[check]()


def test_each_check_has_an_altered_copy_that_fails_it():
    assert {check for check, _, _ in ALTERED.values()} == CHECKS.keys()


# ------------------------------------------------------------------ newer formats


NEWER = {
    "model/manifest.json": lambda: load("model"),
    "stablehlo/manifest.json": lambda: load("stablehlo"),
    "run/config.json": lambda: load("run"),
    "embeddings/embed.json": lambda: check_search("float32"),
    "pairs/prepare.json": lambda: prepare(
        PrepareConfig(source="tars/*.tar", destination=Path("pairs"))
    ),
}
MESSAGE = r"written by a newer clip_jax \(format 99; this one reads up to \d\): update clip_jax"


@pytest.mark.parametrize("path", NEWER)
def test_a_newer_format_is_named(artefacts, path):
    content = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(InputError, match=f"^{path} was {MESSAGE}"):
        NEWER[path]()
    Path(path).write_text(json.dumps(content | {"version": "2"}))
    with pytest.raises(InputError, match=f"^{path} has version='2'; it must be a positive integer"):
        NEWER[path]()


@pytest.mark.parametrize("read", [load_config, lambda path: config_of_run(path.parent)])
def test_the_config_of_a_newer_run_is_named(artefacts, read):
    path = Path("run/config.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(InputError, match=f"{path}.* was {MESSAGE}"):
        read(path)
    path.write_text(json.dumps(content | {"version": 1}))
    assert read(path) == load_config(path)


def test_a_pair_of_a_newer_format_is_a_sample_with_that_reason(artefacts):
    change_records("reinforced", "emb", lambda x: x.replace(b"{", b'{"version": 1, ', 1))
    check_data("reinforced")
    change_records("reinforced", "emb", lambda x: x.replace(b": 1", b": 99", 1))
    with pytest.raises(SampleError, match=f"the pair was {MESSAGE}"):
        check_data("reinforced")
