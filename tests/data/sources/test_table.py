import json
import os

import numpy as np
import pytest

from clip_jax.data.sources import SampleError
from clip_jax.data.sources.table import TableConfig, TableSource
from clip_jax.refused import Refused
from tests.data.conftest import write_pairs

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_rows_in_order_with_quotes_and_newlines(suffix, tmp_path):
    source = TableSource(TableConfig(path=str(write_pairs(tmp_path, 7, suffix))))
    images = sorted((tmp_path / "images").iterdir())
    assert len(source) == len(images) == 7
    for i, file in enumerate(images):
        image, caption = source.load(i, RNG)
        assert image == file.read_bytes()
        assert caption.endswith(f', "{i}"\nzwölf')
        assert source.key(i) == f"{i + 1}:images/{file.name}"


def test_paths_are_relative_to_the_table(tmp_path, monkeypatch):
    table = write_pairs(tmp_path / "set", 1)
    monkeypatch.chdir(tmp_path / "set" / "images")
    assert TableSource(TableConfig(path=f"../{table.name}")).load(0, RNG)[0]


def test_absolute_paths_and_other_columns(tmp_path):
    write_pairs(tmp_path / "set", 1)
    (image,) = (tmp_path / "set" / "images").iterdir()
    table = tmp_path / "t.tsv"
    table.write_text(f"filepath\tid\ttitle\n{image}\t9\tein Bild — ä\n", encoding="utf-8-sig")
    config = TableConfig(path=str(table), image_column="filepath", caption_column="title")
    source = TableSource(config)
    assert source.load(0, RNG) == (image.read_bytes(), "ein Bild — ä")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, r"no table at .*none\.csv; set data\.source\.path"),
        ("pairs.xlsx", "x", r"ends in '\.xlsx'; data\.source\.path takes \.csv, \.tsv"),
        ("empty.csv", "", r"no column 'image', only none"),
        ("header.csv", "image,caption\n", r"has no rows"),
        ("empty.jsonl", "", r"is empty"),
        ("blank.jsonl", "\n\n", r"no column 'image', only none"),
        ("lines.jsonl", "nothing\n[1]\n", r"no column 'image', only none"),
        ("a.csv", "image,text\na,b\n", r"'caption', only 'image', 'text'.*source\.caption_column"),
        ("a.jsonl", '{"file": "a", "caption": "b"}', r"'image', only 'file', 'caption'.*image_col"),
        ("twice.csv", "image,caption,caption\na,b,c\n", r"2 columns 'caption' among 'image', 'c"),
        ("quote.csv", 'image,caption\na.png,"open\nb.png,x\n', "ends within quotes"),
        # One block of Arrow's, and part of the next: the rest is taken for one long cell.
        ("next.csv", 'image,caption\na,"open\n' + "b,x\n" * 400_000, "ends within quotes"),
        ("end.csv", "image,caption\n" + "b,x\n" * 600_000 + 'a,"open\nb,x\n', "within quotes"),
    ],
)
def test_unusable_tables(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(Refused, match=message):
        TableSource(TableConfig(path=str(tmp_path / name)))


def assert_captions_or_reasons(table, starts):
    """Each row's caption, or why it cannot be used, begins as given; keys are rows' numbers."""
    source = TableSource(TableConfig(path=str(table)))
    assert len(source) == len(starts)
    for i, start in enumerate(starts):
        try:
            text = source.load(i, RNG)[1]
        except SampleError as error:
            text = str(error)
        assert text.startswith(start), (i, text)
        assert source.key(i).startswith(f"{i + 1}:")


def test_bad_csv_rows_are_samples_with_a_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "t.csv").write_bytes(
        b"image,caption\na.png,good\na.png\na.png,bad \xff\xfe\n\xff.png,name\n,no image\n"
        b"gone.png,lost\na.png,one,two\na\x00.png,nul\n.,folder\n"
    )
    starts = [
        "good",
        "caption is not UTF-8",
        "image path is not UTF-8",
        "image path is empty",
        "image file: No such file",
        "image file: ",
        "image file: Is a directory",
        "row has 1 cells, the header 2: 'a.png'",
        "row has 3 cells, the header 2: 'a.png,one,two'",
    ]
    assert_captions_or_reasons(tmp_path / "t.csv", starts)


def test_bad_json_lines_are_samples_with_a_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    good = json.dumps({"image": "a.png", "caption": "gut"}).encode()
    lines = {
        b"\xef\xbb\xbf" + good: "gut",
        b"{broken": "line is not JSON",
        b'{"image": "a.png", "caption": "\xff"}': "line is not JSON in UTF-8",
        b'{"image": "a.png", "caption": 7}': "caption is int",
        b'{"image": "a.png", "caption": null}': "caption is missing",
        b'{"caption": "x"}': "image path is missing",
        b"[1, 2]": "line is a JSON list",
        b"[" * 100_000: "line is not JSON",
        good: "gut",
    }
    (tmp_path / "t.jsonl").write_bytes(b"\n\n".join(lines))
    assert_captions_or_reasons(tmp_path / "t.jsonl", list(lines.values()))


def test_quotes_within_cells(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text('image,caption\na.png,5" wide\nb.png,"6"" wide"\nc.png,"7" wide\n')
    source = TableSource(TableConfig(path=str(table)))
    assert [source.captions(i)[0][0] for i in range(3)] == ["5", "6", "7"]


@pytest.mark.parametrize("sign", [",", "\t"])
def test_captions_across_blocks(sign, tmp_path):
    """Arrow reads in blocks of a megabyte; a caption may end in another one, or be longer."""
    (tmp_path / "a.png").write_bytes(b"x")
    lines = "\n".join(map(str, range(1000)))
    table = tmp_path / ("t.csv" if sign == "," else "t.tsv")
    rows = f'a.png{sign}"{lines}"\n' * 600 + f'a.png{sign}"{"word " * 300_000}"\n'
    table.write_text(f"image{sign}caption\n{rows}")
    source = TableSource(TableConfig(path=str(table)))
    assert len(source) == 601
    for i in (0, 300, 599):
        assert source.load(i, RNG) == (b"x", lines)
    assert len(source.captions(600)[0]) == 1_500_000


def test_a_list_of_captions_draws_one_and_gives_all(tmp_path):
    table = write_pairs(tmp_path, 1, ".jsonl")
    row = json.loads(table.read_text())
    table.write_text(json.dumps(row | {"caption": ["one", "two", "three"]}))
    source = TableSource(TableConfig(path=str(table)))
    drawn = {source.load(0, np.random.default_rng(i))[1] for i in range(20)}
    assert drawn == {"one", "two", "three"}
    assert source.captions(0) == ["one", "two", "three"]


def test_half_a_letter_is_named_and_does_not_leave_the_source(tmp_path):
    table = write_pairs(tmp_path, 1, ".jsonl")
    row = json.loads(table.read_text())
    table.write_text(json.dumps(row | {"caption": "a \ud800"}) + "\n" + '{"image": "\\ud800.png"}')
    source = TableSource(TableConfig(path=str(table)))
    with pytest.raises(SampleError, match="caption is not UTF-8: surrogates not allowed at 2"):
        source.captions(0)
    with pytest.raises(SampleError, match="image path is not UTF-8"):
        source.image(1)
    assert source.key(1) == "2:?.png"


def test_a_pipe_in_the_place_of_an_image_is_named(tmp_path):
    table = write_pairs(tmp_path, 1)
    (image,) = (tmp_path / "images").iterdir()
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(SampleError, match=rf"image file: a pipe or a device.*{image.name}"):
        TableSource(TableConfig(path=str(table))).image(0)
