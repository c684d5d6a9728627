"""predict, embed and search on a tiny model: answers, errors, and kills."""

import dataclasses
import io
import json
import os
import shutil
import tarfile

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clip_jax.cli import main
from clip_jax.loading import load
from tests.conftest import COCA, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a folder of 200 small images, two of them broken."""
    path = tmp_path_factory.mktemp("predict")
    write_tiny_model(path / "model")
    rng = np.random.default_rng(0)
    (path / "photos/inner").mkdir(parents=True)
    for i in range(200):
        image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
        image.save(path / "photos" / ("inner" if i % 2 else "") / f"{i:03d}.png")
    (path / "photos/017-broken.png").write_bytes(b"not an image")
    (path / "photos/inner/empty.jpg").write_bytes(b"")
    return path


def code(args):
    """The exit code; tyro, which checks flags, exits by itself."""
    try:
        return main(args)
    except SystemExit as stopped:
        return stopped.code


def rows(output):
    """All rows of all files, in order of their index."""
    return pa.concat_tables(map(pq.read_table, sorted(output.glob("rows-*.parquet"))))


def test_a_model_with_a_decoder_writes_captions(folder, tmp_path, capsys):
    """Also where it has fewer positions than captions are long by default; no others do."""
    text = dataclasses.replace(COCA.text, vocab_size=520)
    write_tiny_model(tmp_path / "coca", config=dataclasses.replace(COCA, text=text))
    images = ["--images", str(folder / "photos/000.png"), str(folder / "photos/002.png"), "--json"]
    assert main(["predict", str(tmp_path / "coca"), *images, "--caption"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result.keys() >= {"caption"} for result in results] == [True, True]
    model = load(tmp_path / "coca")
    pixels = model.preprocess([folder / "photos/000.png", folder / "photos/002.png"])
    assert [result["caption"] for result in results] == model.caption(pixels)
    too_long = ["--generation.max-length", "11"]
    assert main(["predict", str(tmp_path / "coca"), *images, "--caption", *too_long]) == 2
    assert "text.context_length=10" in capsys.readouterr().err
    assert main(["predict", str(folder / "model"), *images, "--caption"]) == 2
    assert "no decoder" in capsys.readouterr().err


def test_probabilities_are_the_softmax_of_scaled_cosines(folder, tmp_path, capsys):
    images = [folder / "photos" / name for name in ("000.png", "017-broken.png", "002.png")]
    sheet = tmp_path / "sheet.png"
    args = ["--images", *map(str, images), "--labels", "cat", "dog", "a", "--template", "see {}"]
    assert main(["predict", str(folder / "model"), *args, "--sheet", str(sheet), "--json"]) == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert "017-broken.png: not an image" in printed.err
    assert [result["image"] for result in results] == [str(images[0]), str(images[2])]
    model = load(folder / "model")
    image = np.asarray(model.encode_image(model.preprocess([images[0], images[2]])))
    text = np.asarray(model.encode_text(model.tokenize(["see cat", "see dog", "see a"])))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    expected = np.asarray(jax.nn.softmax(image @ text.T / 0.07))
    for result, row in zip(results, expected, strict=True):
        found = {x["label"]: x["probability"] for x in result["labels"]}
        np.testing.assert_allclose([found[x] for x in ("cat", "dog", "a")], row, rtol=1e-3)
        assert [*found.values()] == sorted(found.values(), reverse=True)
    with Image.open(sheet) as picture:
        assert picture.width > 200


def test_a_table_is_printed(folder, capsys):
    args = ["--images", str(folder / "photos/inner"), "--labels", "cat", "dog"]
    assert main(["predict", str(folder / "model"), *args]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 100
    assert "empty.jpg: not an image" in printed.err
    assert "cat" in printed.out
    assert "%" in printed.out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--labels", "cat"], "no images in nothing"),
        (["--images", "MODEL", "--labels", "cat"], "no images in"),
        (["--images", "nowhere.png", "--labels", "cat"], "none of the 1 images could be read"),
        (["--images", "x.png"], "give at least one label"),
        (["--images", "x.png", "--labels", "cat", " "], "none empty"),
        (["--images", "x.png", "--labels", "cat", "--template", "a"], "has no {}"),
    ],
)
def test_wrong_use_of_predict_exits_with_2(folder, args, says, capsys):
    args = [str(folder / "model") if arg == "MODEL" else arg for arg in args]
    assert code(["predict", str(folder / "model"), *args]) == 2
    error = capsys.readouterr().err
    assert says in " ".join(error.split())
    assert "Traceback" not in error


def test_embeddings_are_the_models_with_their_keys(folder, tmp_path, capsys):
    model, photos = str(folder / "model"), folder / "photos"
    for part in ("1/2", "2/2"):
        args = ["--part", part, "--rows-per-file", "30", "--json"]
        assert main(["embed", model, str(photos), str(tmp_path / "out"), *args]) == 0
    printed = capsys.readouterr()
    assert "017-broken.png: not an image" in printed.err
    assert sum(json.loads(line)["images"] for line in printed.out.splitlines()) == 200
    table = rows(tmp_path / "out")
    keys = table["key"].to_pylist()
    assert len(set(keys)) == len(keys) == 200
    assert keys == sorted(keys)
    found = np.stack(table["embedding"].to_numpy())
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    loaded = load(folder / "model")
    expected = np.asarray(loaded.encode_image(loaded.preprocess([photos / key for key in keys])))
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_table_of_pairs_is_embedded(folder, tmp_path):
    lines = [f"photos/{i:03d}.png,number {i}" for i in range(0, 10, 2)]
    (folder / "pairs.csv").write_text("\n".join(["image,caption", *lines]) + "\n")
    args = [str(folder / "model"), str(folder / "pairs.csv"), str(tmp_path / "out")]
    assert main(["embed", *args]) == 0
    assert rows(tmp_path / "out")["key"].to_pylist()[:2] == ["1:photos/000.png", "2:photos/002.png"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_table_needs_no_captions(folder, tmp_path, suffix):
    names = ["photos/000.png", "photos/017-broken.png", "photos/002.png"]
    lines = [json.dumps({"file": name}) for name in names]
    if suffix == "csv":
        lines = ["file,size", *(f"{name},9" for name in names)]
    (folder / f"files.{suffix}").write_text("\n".join(lines) + "\n")
    args = [str(folder / "model"), str(folder / f"files.{suffix}"), str(tmp_path / "out")]
    assert main(["embed", *args, "--image-column", "file"]) == 0
    assert rows(tmp_path / "out")["key"].to_pylist() == ["1:photos/000.png", "3:photos/002.png"]


def test_tars_give_the_folders_embeddings(folder, tmp_path, capsys):
    """With captions and without; what is broken is named by shard and member."""
    names = ["000", "002", "017-broken", "004"]
    for shard, members in enumerate((names[:2], names[2:])):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for name in members:
                tar.add(folder / "photos" / f"{name}.png", f"{name}.png")
                if name == "000":
                    caption = tarfile.TarInfo(f"{name}.txt")
                    caption.size = 5
                    tar.addfile(caption, io.BytesIO(b"seven"))
    pattern, model = str(tmp_path / "{00000..00001}.tar"), str(folder / "model")
    assert main(["embed", model, pattern, str(tmp_path / "out"), "--rows-per-file", "3"]) == 0
    printed = capsys.readouterr()
    assert "3 images" in printed.out
    assert f"skipped {tmp_path}/00001.tar:017-broken: not an image" in printed.err
    table = rows(tmp_path / "out")
    assert table["index"].to_pylist() == [0, 1, 3]
    assert table["key"].to_pylist() == [
        f"{tmp_path}/{name}" for name in ("00000.tar:000", "00000.tar:002", "00001.tar:004")
    ]
    assert main(["embed", model, str(folder / "photos"), str(tmp_path / "whole")]) == 0
    whole = rows(tmp_path / "whole")
    expected = dict(zip(whole["key"].to_pylist(), whole["embedding"].to_numpy(), strict=True))
    for name, found in zip(("000", "002", "004"), table["embedding"].to_numpy(), strict=True):
        np.testing.assert_allclose(found, expected[f"{name}.png"], atol=1e-6)
    sheet = tmp_path / "sheet.png"
    args = ["search", model, str(tmp_path / "out"), "--text", "x", "--sheet", str(sheet)]
    assert main(args) == 0
    assert sheet.exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nowhere", "OUT"], "no images at nowhere"),
        (["missing.csv", "OUT"], "no table at"),
        (["missing.tar", "OUT"], "path=missing.tar are missing"),
        (["missing-*.tar", "OUT"], "nothing matches"),
        (["EMPTY", "OUT"], "has no images"),
        (["PHOTOS", "OUT", "--part", "3/2"], "part='3/2' must be i/n"),
        (["PHOTOS", "OUT", "--rows-per-file", "0"], "rows_per_file=0"),
        (["PHOTOS", "DONE", "--batch-size", "7"], "batch_size=64, now 7"),
    ],
)
def test_wrong_use_of_embed_exits_with_2(folder, tmp_path, args, says, capsys):
    model, photos = str(folder / "model"), str(folder / "pairs")
    (folder / "pairs").mkdir(exist_ok=True)
    Image.new("RGB", (9, 9)).save(folder / "pairs/a.png")
    places = {"PHOTOS": photos, "OUT": str(tmp_path / "out"), "DONE": str(tmp_path / "done")}
    places["EMPTY"] = str(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    assert main(["embed", model, photos, places["DONE"]]) == 0
    assert code(["embed", model, *(places.get(arg, arg) for arg in args)]) == 2
    error = capsys.readouterr().err
    assert says in " ".join(error.split())
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def embedded(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("search") / "out"
    assert main(["embed", str(folder / "model"), str(folder / "photos"), str(output)]) == 0
    return output


def test_what_a_kill_has_left_is_finished(folder, tmp_path):
    killed = tmp_path / "killed"
    command = ["embed", str(folder / "model"), str(folder / "photos"), str(killed)]
    assert main([*command, "--rows-per-file", "2"]) == 0
    whole, names = rows(killed), sorted(path.name for path in killed.glob("rows-*.parquet"))
    for name in names[-20:]:
        content = (killed / name).read_bytes()
        (killed / name).unlink()
    (killed / f".0123abcd.partial.{names[-20]}").write_bytes(content[: len(content) // 2])
    assert main([*command, "--rows-per-file", "2"]) == 0
    assert sorted(path.name for path in killed.glob("rows-*.parquet")) == names
    assert rows(killed).equals(whole)


def test_leftovers_and_links_that_lead_back(folder, tmp_path, capsys):
    shutil.copytree(folder / "photos/inner", tmp_path / "photos")
    (tmp_path / "photos/back").symlink_to(tmp_path / "photos")
    os.mkfifo(tmp_path / "photos/pipe.png")
    count = sum(path.is_file() for path in (tmp_path / "photos").iterdir())
    out = tmp_path / "out"
    out.mkdir()
    (out / f".0123abcd.partial.rows-{0:010d}-{count + 1:010d}.parquet").write_bytes(b"half")
    assert main(["embed", str(folder / "model"), str(tmp_path / "photos"), str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] + len(result["skipped"]) == count + 1
    reasons = {line["key"]: line["reason"] for line in result["skipped"]}
    assert "a pipe or a device" in reasons["pipe.png"]
    assert not list(out.glob("*.partial.*"))


def test_an_image_finds_itself_and_a_text_what_numpy_finds(folder, embedded, tmp_path, capsys):
    model, sheet = str(folder / "model"), tmp_path / "sheet.png"
    args = ["search", model, str(embedded)]
    capsys.readouterr()
    assert main([*args, "--image", str(folder / "photos/000.png"), "--json"]) == 0
    best = json.loads(capsys.readouterr().out)[0]
    assert best["key"] == "000.png"
    assert best["similarity"] == pytest.approx(1, abs=1e-5)
    loaded = load(folder / "model")
    query = np.asarray(loaded.encode_text(loaded.tokenize(["a red bicycle"], truncate=True)))[0]
    table = rows(embedded)
    similarities = np.stack(table["embedding"].to_numpy()) @ (query / np.linalg.norm(query))
    expected = np.argsort(-similarities, kind="stable")[:5]
    text = ["--text", "a red bicycle", "--top", "5"]
    assert main([*args, *text, "--sheet", str(sheet), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [x["key"] for x in found] == [table["key"][int(i)].as_py() for i in expected]
    with Image.open(sheet) as picture:
        assert picture.width > 400
    assert main([*args, *text]) == 0
    assert capsys.readouterr().out.split()[1] == found[0]["key"]


def test_another_models_embeddings_are_refused(folder, embedded, tmp_path, capsys):
    write_tiny_model(tmp_path / "other", seed=1)
    assert main(["search", str(tmp_path / "other"), str(embedded), "--text", "x"]) == 2
    assert f"{folder / 'model'} made them" in capsys.readouterr().err
    args = ["embed", str(tmp_path / "other"), str(folder / "photos"), str(embedded)]
    assert main(args) == 2
    assert "holds embeddings with model=" in capsys.readouterr().err


def test_a_run_that_trained_on_does_not_resume_its_embeddings(folder, tmp_path, capsys):
    write_tiny_model(tmp_path / "model")
    args = ["embed", str(tmp_path / "model"), str(folder / "photos"), str(tmp_path / "out")]
    assert main(args) == 0
    shutil.rmtree(tmp_path / "model")
    write_tiny_model(tmp_path / "model", seed=1)
    assert main(args) == 2
    assert "another checkpoint" in capsys.readouterr().err


def test_the_same_weights_in_float16_may_search(folder, embedded, tmp_path, capsys):
    half = str(tmp_path / "half")
    args = ["convert", str(folder / "model"), half, "--to", "clip-jax", "--dtype", "float16"]
    assert main(args) == 0
    capsys.readouterr()
    image = str(folder / "photos/000.png")
    assert main(["search", half, str(embedded), "--image", image, "--json"]) == 0
    best = json.loads(capsys.readouterr().out)[0]
    assert best["key"] == "000.png"
    assert best["similarity"] > 0.999


def test_pictures_that_are_gone_are_said(folder, tmp_path, capsys):
    shutil.copytree(folder / "photos/inner", tmp_path / "photos")
    args = [str(folder / "model"), str(tmp_path / "photos"), str(tmp_path / "out")]
    assert main(["embed", *args]) == 0
    args = ["search", args[0], args[2], "--text", "x", "--sheet", str(tmp_path / "sheet.png")]
    (tmp_path / "photos/001.png").unlink()
    shutil.move(tmp_path / "photos", tmp_path / "moved")
    assert main(args) == 2
    assert "are not where they were" in capsys.readouterr().err


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One bit of an embedding, which no reader of Parquet misses without a checksum."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_named_and_made_anew_alone(damage, folder, embedded, tmp_path, capsys):
    output = shutil.copytree(embedded, tmp_path / "out", ignore=lambda *_: ["search"])
    expected = rows(output)
    (file,) = output.glob("rows-*")
    damage(file)
    assert main(["search", str(folder / "model"), str(output), "--text", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"clip-jax: {file} is damaged (")
    assert said.count("\n") == 1
    if damage is flip:
        file.unlink()  # as the message says
    assert main(["embed", str(folder / "model"), str(folder / "photos"), str(output)]) == 0
    assert rows(output).equals(expected)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}"])
def test_a_damaged_manifest_is_one_message(text, folder, embedded, tmp_path, capsys):
    output = shutil.copytree(embedded, tmp_path / "out")
    (output / "embed.json").write_text(text)
    for args in (
        ["search", str(folder / "model"), str(output), "--text", "x"],
        ["embed", str(folder / "model"), str(folder / "photos"), str(output)],
    ):
        assert main(args) == 2
        said = capsys.readouterr().err
        assert str(output) in said
        assert said.count("\n") == 1


def test_usearch_finds_the_same(folder, embedded, capsys):
    capsys.readouterr()
    args = ["search", str(folder / "model"), str(embedded), "--text", "a red bicycle", "--json"]
    assert main([*args, "--index", "usearch"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(args) == 0
    exact = json.loads(capsys.readouterr().out)
    assert len({x["key"] for x in found} & {x["key"] for x in exact}) >= 9
    assert found[0]["similarity"] == pytest.approx(exact[0]["similarity"], abs=1e-5)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["EMPTY", "--text", "x"], "no embeddings in"),
        (["OUT"], "needs one of --text and --image"),
        (["OUT", "--text", " "], "needs one of --text and --image"),
        (["OUT", "--text", "x", "--top", "0"], "top=0 must be at least 1"),
        (["OUT", "--image", "nowhere.png"], "unreadable: No such file or directory: nowhere.png"),
    ],
)
def test_wrong_use_of_search_exits_with_2(folder, embedded, tmp_path, args, says, capsys):
    places = {"EMPTY": str(tmp_path), "OUT": str(embedded)}
    args = [places.get(arg, arg) for arg in args]
    assert code(["search", str(folder / "model"), *args]) == 2
    error = capsys.readouterr().err
    assert says in " ".join(error.split())
    assert "Traceback" not in error
