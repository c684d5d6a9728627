"""predict, embed and search on a tiny model: answers, errors, and kills."""

import dataclasses
import functools
import json
import os
import shutil
from unittest import mock

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clip_jax.cli.commands import main
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.weights import Head
from clip_jax.engine import Here
from clip_jax.errors import InputError
from clip_jax.inference import predict as predict_module
from clip_jax.inference.embed import EmbedConfig, embed
from clip_jax.inference.loading import Model, load
from tests.conftest import write_tiny_model
from tests.data.conftest import write_tar
from tests.evals.conftest import unit


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


@pytest.fixture(scope="module")
def embedded(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("search") / "out"
    assert main(["embed", str(folder / "model"), str(folder / "photos"), str(output)]) == 0
    return output


@pytest.fixture
def run(capsys):
    """What a command prints: its JSON and its standard error."""

    def run(command, *args):
        capsys.readouterr()
        assert main([command, *map(str, args), "--json"]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out), printed.err

    return run


@pytest.fixture
def refused(capsys):
    """The one message of a command that is used wrongly."""

    def refused(command, *args):
        capsys.readouterr()
        try:
            code = main([command, *map(str, args)])
        except SystemExit as stopped:  # tyro, which checks flags, exits by itself
            code = stopped.code
        error = capsys.readouterr().err
        assert (code, "Traceback" in error) == (2, False)
        return error

    return refused


def rows(output):
    """All rows of all files, in order of their index."""
    return pa.concat_tables(map(pq.read_table, sorted(output.glob("rows-*.parquet"))))


# ------------------------------------------------------------------ predict


def test_probabilities_are_the_softmax_of_scaled_cosines(folder, run, capsys):
    images = [folder / "photos" / name for name in ("000.png", "017-broken.png", "002.png")]
    model = folder / "model"
    args = ["--images", *images, "--labels", "cat", "dog", "a", "--template", "see {}"]
    results, said = run("predict", model, *args)
    assert "017-broken.png: not an image" in said
    assert [result["image"] for result in results] == [str(images[0]), str(images[2])]
    loaded = load(model)
    image = unit(loaded.encode_image(loaded.preprocess([images[0], images[2]])))
    text = unit(loaded.encode_text(loaded.tokenize(["see cat", "see dog", "see a"])))
    expected = np.asarray(jax.nn.softmax(10 * image @ text.T))
    for result, row in zip(results, expected, strict=True):
        found = {x["label"]: x["probability"] for x in result["labels"]}
        np.testing.assert_allclose([found[x] for x in ("cat", "dog", "a")], row, rtol=1e-3)
        assert [*found.values()] == sorted(found.values(), reverse=True)
    assert main(["predict", str(model), *map(str, args)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("cat" in line and "%" in line for line in lines)
    capsys.readouterr()
    labels = ["--images", images[0], "--labels", *"abcdefg"]
    assert main(["predict", str(model), *map(str, labels)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.count("%") == 5  # the best; JSON has all
    (result,), _ = run("predict", model, *labels)
    assert [line.index(f"  {x['label']} ") for x in result["labels"][:5]] == sorted(
        line.index(f"  {x['label']} ") for x in result["labels"][:5]
    )
    assert len(result["labels"]) == 7


def test_without_labels_the_classes_are_those_of_the_models_classifier(folder, tmp_path, run):
    """Labels that are given take its place."""
    weights = read_weights(folder / "model")
    kernel = np.random.default_rng(0).normal(size=(3, weights.config.embed_dim))
    head = Head(("cat", "dog", "owl"), ("a {}",), kernel.astype(np.float32))
    write_weights(dataclasses.replace(weights, head=head), tmp_path / "model", "clip-jax")
    image, model = folder / "photos/000.png", tmp_path / "model"
    (result,), _ = run("predict", model, "--images", image)
    loaded = load(model)
    embedded = unit(loaded.encode_image(loaded.preprocess(image)))
    expected = np.asarray(jax.nn.softmax(10 * embedded @ head.kernel.T))[0]
    found = {x["label"]: x["probability"] for x in result["labels"]}
    np.testing.assert_allclose([found[x] for x in head.classes], expected, rtol=1e-3)
    results = [
        run("predict", x, "--images", image, "--labels", "a", "b")
        for x in (model, folder / "model")
    ]
    assert results[0] == results[1]


def test_attention_maps_are_drawn_beside_the_images(folder, tmp_path, run, refused):
    """With labels and without."""
    images = [folder / "photos/000.png", folder / "photos/002.png"]
    command = ["predict", folder / "model", "--images", *images, "--attention"]
    with mock.patch.object(predict_module, "attention_sheet", autospec=True) as drawn:
        results, _ = run(*command, tmp_path / "maps.png", "--labels", "cat", "dog")
        best = [f"{x['labels'][0]['label']}  " for x in results]
        run(*command, tmp_path / "maps.png")
    (path, pixels, maps, lines), (*_, names) = (call.args for call in drawn.call_args_list)
    assert path == tmp_path / "maps.png"
    assert [line[: len(label)] for line, label in zip(lines, best, strict=True)] == best
    assert names == ["000.png", "002.png"]
    model = load(folder / "model")
    expected = [model.image_preprocess.batch(image)[0] for image in images]
    np.testing.assert_array_equal(pixels, expected)
    expected = model.attention_maps(model.preprocess(images))
    np.testing.assert_allclose(maps, expected, rtol=1e-5)
    assert expected[0].shape == (2, 2)
    assert "must end in one of" in refused(*command, tmp_path / "maps.txt")


def test_with_a_bias_every_label_has_a_probability_of_its_own():
    """As a SigLIP's sigmoid gives it, also where there is one label alone."""
    params = {"logit_scale": np.float32(1.0), "logit_bias": np.float32(-2.0)}
    similarity = functools.partial(Model.similarity, None)
    model = mock.Mock(spec=Model, params=params, similarity=similarity)
    images, classes = np.eye(2, dtype=np.float32), np.float32([[0.6, 0.8]])
    logits = np.e * np.array([[0.6], [0.8]]) - 2
    expected = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(Model.probabilities(model, images, classes), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["predict", "MODEL", "--labels", "cat"], "no images in nothing"),
        (["predict", "MODEL", "--images", "MODEL", "--labels", "cat"], "no images in"),
        (["predict", "MODEL", "--images", "x.png", "--labels", "cat"], "none of the 1 images"),
        (["predict", "MODEL", "--images", "x.png"], "give at least one label"),
        (["predict", "MODEL", "--images", "x.png", "--labels", "cat", " "], "no empty ones"),
        (["predict", "MODEL", "--labels", "cat", "--template", "a"], "has no {}"),
        (["predict", "MODEL", "--images", "x" * 300, "--labels", "a"], "name too long: xxx"),
        (["embed", "MODEL", "x" * 300, "OUT"], "name too long: xxx"),
        (["embed", "MODEL", "nowhere", "OUT"], "SOURCE: nowhere does not exist"),
        (["embed", "MODEL", "EMPTY", "OUT"], "has no images"),
        (["embed", "MODEL", "PHOTOS", "OUT", "--worker", "3/2"], "worker='3/2' must be i/n"),
        (["embed", "MODEL", "PHOTOS", "OUT", "--rows-per-file", "0"], "rows_per_file=0"),
        (["embed", "MODEL", "PHOTOS", "DONE", "--batch-size", "7"], "batch_size=64, now 7"),
        (["search", "MODEL", "EMPTY", "--text", "x"], "no embeddings in"),
        (["search", "MODEL", "DONE", "--text", " "], "needs a non-empty --text or --image"),
        (["search", "MODEL", "DONE", "--text", "x", "--top", "0"], "top=0 must be at least 1"),
        (["search", "MODEL", "DONE", "--image", "x.png"], "unreadable: No such file or directory"),
    ],
)
def test_wrong_use_is_one_message(args, says, folder, embedded, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    places = {"MODEL": folder / "model", "PHOTOS": folder / "photos", "DONE": embedded}
    places |= {"OUT": tmp_path / "out", "EMPTY": tmp_path / "empty"}
    assert says in " ".join(refused(*(places.get(arg, arg) for arg in args)).split())


# ------------------------------------------------------------------ embed


def test_embeddings_are_the_models_with_their_keys(folder, tmp_path, run):
    model, photos = folder / "model", folder / "photos"
    parts = [
        run("embed", model, photos, tmp_path / "out", "--worker", part, "--rows-per-file", "30")
        for part in ("1/2", "2/2")
    ]
    assert "017-broken.png: not an image" in parts[0][1]
    assert sum(result["images"] for result, _ in parts) == 200
    table = rows(tmp_path / "out")
    keys = table["key"].to_pylist()
    assert len(set(keys)) == len(keys) == 200
    assert keys == sorted(keys)
    found = np.stack(table["embedding"].to_numpy())
    loaded = load(model)
    expected = unit(loaded.encode_image(loaded.preprocess([photos / key for key in keys])))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_table_needs_no_captions(folder, tmp_path, run):
    table = folder / "files.csv"
    names = ("photos/000.png", "photos/017-broken.png", "photos/002.png")
    table.write_text("".join(f"{name},9\n" for name in ("file", *names)))
    run("embed", folder / "model", table, tmp_path / "out", "--image-column", "file")
    assert rows(tmp_path / "out")["key"].to_pylist() == ["1:photos/000.png", "3:photos/002.png"]


def test_tars_give_the_folders_embeddings(folder, embedded, tmp_path, run):
    """With captions and without; what is broken is named by shard and member."""
    names = ["000", "002", "017-broken", "004"]
    members = [(f"{x}.png", (folder / f"photos/{x}.png").read_bytes()) for x in names]
    write_tar(tmp_path / "00000.tar", [("000.txt", b"seven"), *members[:2]])
    write_tar(tmp_path / "00001.tar", members[2:])
    args = ["embed", folder / "model", tmp_path / "{00000..00001}.tar", tmp_path / "out"]
    result, said = run(*args, "--rows-per-file", "3")
    assert result["images"] == 3
    assert f"skipped {tmp_path}/00001.tar:017-broken: not an image" in said
    table, whole = rows(tmp_path / "out"), rows(embedded)
    assert table["index"].to_pylist() == [0, 1, 3]
    assert table["key"].to_pylist() == [
        f"{tmp_path}/{name}" for name in ("00000.tar:000", "00000.tar:002", "00001.tar:004")
    ]
    expected = dict(zip(whole["key"].to_pylist(), whole["embedding"].to_numpy(), strict=True))
    for name, found in zip(("000", "002", "004"), table["embedding"].to_numpy(), strict=True):
        np.testing.assert_allclose(found, expected[f"{name}.png"], atol=1e-6)
    sheet = tmp_path / "sheet.png"
    run("search", folder / "model", tmp_path / "out", "--text", "x", "--sheet", sheet)
    assert sheet.exists()


def test_what_a_kill_has_left_is_finished_and_not_searched_before(folder, tmp_path, run, refused):
    killed = tmp_path / "killed"
    command = ["embed", folder / "model", folder / "photos", killed, "--rows-per-file", "2"]
    run(*command)
    whole, names = rows(killed), sorted(path.name for path in killed.glob("rows-*.parquet"))
    for name in names[-20:]:
        content = (killed / name).read_bytes()
        (killed / name).unlink()
    (killed / f".0123abcd.partial.{names[-20]}").write_bytes(content[: len(content) // 2])
    said = refused("search", folder / "model", killed, "--text", "x")
    assert f"lacks 20 of 101 files of embeddings: {names[-20]}, " in said
    run(*command)
    assert sorted(path.name for path in killed.iterdir()) == ["embed.json", *names]
    assert rows(killed).equals(whole)


def test_paths_of_embeddings_do_not_depend_on_the_working_directory(
    folder, tmp_path, run, refused, monkeypatch
):
    photos, others = tmp_path / "a/photos", tmp_path / "b/photos"
    for images in (photos, others):
        images.mkdir(parents=True)
        shutil.copy(folder / "photos/000.png", images)
    monkeypatch.chdir(tmp_path / "a")
    model = os.path.relpath(folder / "model")
    run("embed", model, "photos", "out")
    monkeypatch.chdir(tmp_path / "b")
    manifest = json.loads((tmp_path / "a/out/embed.json").read_text())
    assert (manifest["model"], manifest["source"]) == (str(folder / "model"), str(photos))
    error = refused("embed", folder / "model", "photos", tmp_path / "a/out")
    assert f"with source='{photos}', now '{others}'" in " ".join(error.split())


def test_embedding_is_work_with_a_model(folder, tmp_path):
    """So that only one thread of a process uses it, and Ray gives it an accelerator."""
    config = EmbedConfig(model=folder / "model", source=str(folder / "photos"), output=tmp_path)
    with (
        mock.patch.object(Here, "run", autospec=True, side_effect=InputError("stop")) as run,
        pytest.raises(InputError, match="stop"),
    ):
        embed(config)
    assert run.call_args.kwargs == {"model": True}


@pytest.mark.parametrize("pattern", ["", "*.tar"])
def test_images_that_were_renamed_are_not_embedded_twice(pattern, folder, tmp_path, run, refused):
    """A resumed command compares more than their number; an older one learns what to compare."""
    manifest = tmp_path / "out/embed.json"
    for name in "abc":
        image = shutil.copy(folder / "photos/000.png", tmp_path / f"{name}.png")
        write_tar(tmp_path / f"{name}.tar", [("x.png", image.read_bytes())])
    command = ["embed", folder / "model", tmp_path / pattern, manifest.parent]
    run(*command)
    manifest.write_text(manifest.read_text().replace('"digest"', '"older"'))
    run(*command)
    for suffix in ("png", "tar"):
        (tmp_path / f"a.{suffix}").rename(tmp_path / f"z.{suffix}")
    assert "of other images than" in refused(*command)


def test_images_without_a_finite_embedding_are_skipped_unless_none_has_one(
    folder, tmp_path, run, refused
):
    """A search would compare with NaN, or find a vector of zeros."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for i in range(3):
        shutil.copy(folder / f"photos/{2 * i:03d}.png", photos / f"{i}.png")
    (photos / "3.png").write_bytes(b"not an image")
    command = ["embed", folder / "model", photos, out]
    values = np.array([[1.0], [np.nan], [0.0]], np.float32) * np.ones(16, np.float32)

    def encoding(values):
        def encode(_, images, batch_size):
            return values[: len(images)]

        return mock.patch.object(Model, "encode_image", autospec=True, side_effect=encode)

    with encoding(values * np.nan):
        error = refused(*command)
    assert "the embeddings of all 3 readable images of rows-0000000000-0000000004.parq" in error
    assert not list(out.glob("rows-*"))
    with encoding(values):
        result, lines = run(*command)
    assert rows(out)["key"].to_pylist() == ["0.png"]
    assert result["images"] == 1
    reasons = [line["reason"] for line in result["skipped"]]
    assert reasons[:2] == ["its embedding is not finite, or zero"] * 2
    assert [line["key"] for line in result["skipped"]] == ["1.png", "2.png", "3.png"]
    assert "skipped 1.png: its embedding is not finite" in lines


def test_a_file_with_fewer_rows_than_its_name_says_is_embedded_again(
    folder, embedded, tmp_path, run
):
    output = shutil.copytree(embedded, tmp_path / "out")
    expected = rows(output)
    (file,) = output.glob("rows-*")
    pq.write_table(pq.read_table(file).slice(1), file)
    _, error = run("embed", folder / "model", folder / "photos", output)
    assert f"{file} is damaged (199 embedded and 2 skipped images of 202); its rows are" in error
    assert rows(output).equals(expected)


# ------------------------------------------------------------------ search


def test_an_image_finds_itself_and_a_text_what_numpy_finds(folder, embedded, tmp_path, run, capsys):
    model, sheet = folder / "model", tmp_path / "sheet.png"
    best = run("search", model, embedded, "--image", folder / "photos/000.png")[0][0]
    assert best["key"] == "000.png"
    assert best["similarity"] == pytest.approx(1, abs=1e-5)
    loaded = load(model)
    query = unit(loaded.encode_text(loaded.tokenize(["a red bicycle"], truncate=True)))[0]
    table = rows(embedded)
    similarities = np.stack(table["embedding"].to_numpy()) @ query
    expected = np.argsort(-similarities, kind="stable")[:5]
    text = ["search", model, embedded, "--text", "a red bicycle", "--top", "5"]
    found, _ = run(*text, "--sheet", sheet)
    assert [x["key"] for x in found] == [table["key"][int(i)].as_py() for i in expected]
    with Image.open(sheet) as picture:
        assert picture.width > 400
    approximate, _ = run(*text, "--index", "usearch")
    assert len({x["key"] for x in approximate} & {x["key"] for x in found}) >= 4
    assert approximate[0]["similarity"] == pytest.approx(found[0]["similarity"], abs=1e-5)
    assert main([*map(str, text)]) == 0
    assert capsys.readouterr().out.split()[1] == found[0]["key"]


def test_another_models_embeddings_are_refused(folder, embedded, tmp_path, run, refused):
    """Also those of an earlier checkpoint of a run; the same weights in float16 may search."""
    other, photos, earlier = tmp_path / "other", folder / "photos", tmp_path / "earlier"
    write_tiny_model(other, seed=1)
    message = refused("search", other, embedded, "--text", "x")
    assert f"{folder / 'model'} made them" in message
    assert "holds embeddings with model=" in refused("embed", other, photos, embedded)
    run("embed", other, photos / "inner", earlier)
    shutil.rmtree(other)
    shutil.copytree(folder / "model", other)
    assert "another checkpoint" in refused("embed", other, photos / "inner", earlier)
    half = ["convert", folder / "model", tmp_path / "half", "--to", "clip-jax"]
    run(*half, "--dtype", "float16")
    best = run("search", tmp_path / "half", embedded, "--image", photos / "000.png")[0][0]
    assert best["key"] == "000.png"
    assert best["similarity"] > 0.999


def test_pictures_that_are_gone_are_said(folder, tmp_path, run, refused):
    photos, out = shutil.copytree(folder / "photos/inner", tmp_path / "photos"), tmp_path / "out"
    run("embed", folder / "model", photos, out)
    shutil.rmtree(photos)
    sheet = ["--text", "x", "--sheet", tmp_path / "sheet.png"]
    assert "have moved" in refused("search", folder / "model", out, *sheet)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One bit of an embedding, which no reader of Parquet misses without a checksum."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_named_and_made_anew_alone(
    damage, folder, embedded, tmp_path, run, refused
):
    output = shutil.copytree(embedded, tmp_path / "out", ignore=lambda *_: ["search"])
    expected = rows(output)
    (file,) = output.glob("rows-*")
    damage(file)
    said = refused("search", folder / "model", output, "--text", "x")
    assert said.startswith(f"clip-jax: {file} is damaged (")
    assert said.count("\n") == 1
    if damage is flip:
        file.unlink()  # as the message says
    run("embed", folder / "model", folder / "photos", output)
    assert rows(output).equals(expected)


_NUMBER = '{"model": "m", "source": "s", "image_column": "image", "weights": 5}'


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", _NUMBER])
def test_a_damaged_manifest_is_one_message(text, folder, embedded, tmp_path, refused):
    output = shutil.copytree(embedded, tmp_path / "out")
    (output / "embed.json").write_text(text)
    searching = refused("search", folder / "model", output, "--text", "x")
    for said in (searching, refused("embed", folder / "model", folder / "photos", output)):
        assert str(output) in said
        assert said.count("\n") == 1
