"""Tables of image paths and captions: rows, and what cannot be used."""

import itertools

import numpy as np
import pytest

from clip_jax.data.sources.text_table import TableConfig, TableSource
from clip_jax.errors import InputError
from tests.data.conftest import make_pairs, outcome, table

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_rows_in_order_with_quotes_and_newlines(suffix, tmp_path):
    pairs = make_pairs(7)
    source = TableSource(table(tmp_path, pairs, suffix))
    assert len(source) == 7
    for i, (name, image, caption) in enumerate(pairs):
        assert source.load(i, RNG) == (image, caption)
        assert source.key(i) == f"{i + 1}:{name}"


def test_absolute_paths_and_other_columns(tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(b"image")
    path = tmp_path / "set" / "t.tsv"
    path.parent.mkdir()
    path.write_text(f"filepath\tid\ttitle\n{image}\t9\tein Bild — ä\n", encoding="utf-8-sig")
    config = TableConfig(path=str(path), image_column="filepath", caption_column="title")
    assert TableSource(config).load(0, RNG) == (b"image", "ein Bild — ä")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, r"no table at .*none\.csv; give a \.csv"),
        ("pairs.xlsx", "x", r"ends in '\.xlsx', not \.csv, \.tsv"),
        ("empty.csv", "", r"no column 'image', only none"),
        ("header.csv", "image,caption\n", r"has no rows"),
        ("empty.jsonl", "", r"is empty"),
        ("lines.jsonl", "\nnothing\n[1]\n", r"no column 'image', only none"),
        ("a.csv", "image,text\na,b\n", r"'caption', only 'image', 'text'; set caption_column"),
        (
            "a.jsonl",
            '{"file": "a", "caption": "b"}',
            r"'image', only 'file', .*; set image_c",
        ),
        ("twice.csv", "image,caption,caption\na,b,c\n", r"2 columns 'caption' among 'image', 'c"),
        ("quote.csv", 'image,caption\na.png,"open\nb.png,x\n', "ends within quotes"),
        ("next.csv", 'image,caption\na,"open\n' + "b,x\n" * 400_000, "ends within quotes"),
        ("end.csv", "image,caption\n" + "b,x\n" * 600_000 + 'a,"open\nb,x\n', "within quotes"),
    ],
)
def test_unusable_tables(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        TableSource(TableConfig(path=str(tmp_path / name)))


ROWS = {
    "t.csv": {
        b"a.png,good": "good",
        b'a.png,5" wide': "5",
        b'a.png,"6"" wide"': '6" wide',
        b'a.png,"7" wide': "7",
        b"a.png,\xef\xbb\xbfmarked": "marked",
        b"a.png": "row has 1 cells, the header 2: 'a.png'",
        b"a.png,bad \xff\xfe": "caption is not UTF-8",
        b"\xff.png,name": "image path is not UTF-8",
        b",no image": "image path is empty",
        b"http://here/a.png,on the web": "http://here/a.png: ",
        b"gone.png,lost": "image file: No such file",
        b"a.png,one,two": "row has 3 cells, the header 2: 'a.png,one,two'",
        b"a\x00.png,nul": "image file: ",
        b".,folder": "image file: Is a directory",
    },
    "t.jsonl": {
        b'\xef\xbb\xbf{"image": "a.png", "caption": "good"}': "good",
        b'{"image": "a.png", "caption": ["in a list"]}': "in a list",
        b"{broken": "line is not JSON",
        b'{"image": "a.png", "caption": "\xff"}': "line is not JSON in UTF-8",
        b'{"image": "a.png", "caption": "\\ufeffmarked"}': "marked",
        b'{"image": "a.png", "caption": 7}': "caption is int",
        b'{"image": "a.png", "caption": null}': "caption is missing",
        b'{"image": "a.png", "caption": "a \\ud800"}': "caption is not UTF-8: surrogates not",
        b'{"image": "\\ud800.png"}\n': "image path is not UTF-8",
        b'{"caption": "x"}': "image path is missing",
        b'{"image": "file:///a.png"}': "file:///a.png: ",
        b"[1, 2]": "line is a JSON list",
        b"[" * 100_000: "line is not JSON",
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_captions_or_samples_with_a_reason(name, tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    header = b"image,caption\n" if name == "t.csv" else b""
    (tmp_path / name).write_bytes(header + b"\n".join(ROWS[name]))
    source = TableSource(TableConfig(path=str(tmp_path / name)))
    lines = itertools.accumulate((row.count(b"\n") + 1 for row in ROWS[name]), initial=1)
    assert len(source) == len(ROWS[name])
    for i, (number, start) in enumerate(zip(lines, ROWS[name].values(), strict=False)):
        text = outcome(lambda: source.load(i, RNG)[1])  # noqa: B023
        assert text.startswith(start), (i, text)
        assert source.key(i).encode().startswith(b"%d:" % number)


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_long_captions(sign, tmp_path):
    """A caption may be of many lines, and longer than Python's csv takes by default."""
    (tmp_path / "a.png").write_bytes(b"x")
    lines = "\n".join(map(str, range(1000)))
    path = tmp_path / ("t.tsv" if sign == "\t" else "t.csv")
    rows = f'a.png{sign}"{lines}"\n' * 600 + f'a.png{sign}"{"word " * 300_000}"\n'
    path.write_text(f"image{sign}caption\n{rows}")
    source = TableSource(TableConfig(path=str(path)))
    assert len(source) == 601
    for i in (0, 300, 599):
        assert source.load(i, RNG) == (b"x", lines)
    assert len(source.record(600).captions()[0]) == 1_500_000
