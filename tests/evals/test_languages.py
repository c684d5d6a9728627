"""Layouts of data sets in many languages."""

import csv
import json

import pytest

from clip_jax.errors import InputError
from clip_jax.evals import catalog, languages
from clip_jax.evals.catalog import open_languages
from clip_jax.evals.datasets import Labelled, Missing
from clip_jax.evals.languages import average, open_babel, open_translated
from clip_jax.evals.reader import Outcome
from clip_jax.evals.results import to_csv, to_markdown


@pytest.fixture
def xtd10(tmp_path):
    """As its repository lies, the images beside."""
    folder = tmp_path / "xtd10"
    for name, text in (
        ("XTD10/test_image_names.txt", "a.jpg\nb.jpg\n"),
        ("XTD10/test_1kcaptions_es.txt", "un perro\n\n"),
        ("MIC/test_1kcaptions_de.txt", "ein Hund\nzwei\u2028Katzen\n"),
        ("XTD10/notes.txt", "nothing\n"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "images").mkdir()
    return folder


def test_xtd10_and_a_language_that_lacks_a_caption(xtd10):
    data = open_languages("xtd10", xtd10.parent)
    assert data.languages == ["de", "es"]
    (first, captions), (second, others) = data
    assert (first, second) == (xtd10 / "images/a.jpg", xtd10 / "images/b.jpg")
    assert captions == {"es": ["un perro"], "de": ["ein Hund"]}
    assert others == {"de": ["zwei\u2028Katzen"]}
    assert (data.answer_in("es", captions), data.answer_in("es", others)) == (["un perro"], None)
    assert open_translated(xtd10, ("es", "jp")).languages == ["es"]


def test_what_does_not_fit_is_refused(xtd10):
    with pytest.raises(InputError, match="captions in de, es; choose from these with --languages"):
        open_translated(xtd10, ("fr",))
    (xtd10 / "MIC/test_1kcaptions_de.txt").write_text("ein Hund\n")
    with pytest.raises(InputError, match=r"test_1kcaptions_de.txt has 1 lines, but .* 2 images"):
        open_translated(xtd10)
    (xtd10 / "XTD10/test_image_names.txt").unlink()
    with pytest.raises(InputError, match=r"needs captions\.jsonl or a list of images"):
        open_translated(xtd10)
    (xtd10 / "captions.jsonl").write_text('{"image/key": "a", "de": {"caption": []}}\n')
    with pytest.raises(InputError, match="not in Crossmodal-3600's format"):
        open_translated(xtd10)
    with pytest.raises(Missing, match=r"put .*flickr30k-200 in"):
        open_languages("flickr30k-200", xtd10.parent)


def test_of_crossmodal_the_first_caption_counts(tmp_path):
    row = {"image/key": "k", "image/locale": "mi", "de": {"caption": ["eins", "zwei"]}}
    (tmp_path / "captions.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8-sig")
    data = open_translated(tmp_path)
    assert data.languages == ["de"]
    assert data.load(0) == (tmp_path / "k.jpg", {"de": ["eins"]})


IMAGENET = Labelled(3, lambda i: ("", i), ["tench", "goldfish", "shark"], [])


def babel(folder, **names):
    (folder / "babel_imagenet.json").write_text(json.dumps(names))
    prompts = {code: ["ein {}"] for code in names}
    (folder / "nllb_dist13b_prompts.json").write_text(json.dumps(prompts | {"FR": ["un {}"]}))


def test_babel_imagenet_names_some_classes(tmp_path):
    babel(tmp_path, DE=[[0, 2], ["Schleie", "Hai"]], LA=[[1], ["carassius"]])
    data = open_babel(IMAGENET, tmp_path)
    assert data.languages == ["de", "la"]
    assert [data.answer_in("de", label) for _, label in data] == [0, None, 1]
    assert (data.names["de"], data.templates["de"]) == (["Schleie", "Hai"], ["ein {}"])


@pytest.mark.parametrize(
    "row", [[[0, 3], ["a", "b"]], [[-1], ["a"]], [[0], []], [[], []], [["x"], ["a"]], 5, [[0]]]
)
def test_a_lying_babel_imagenet_is_refused(row, tmp_path):
    babel(tmp_path, DE=row)
    with pytest.raises(InputError, match="not in Babel-ImageNet's format"):
        open_babel(IMAGENET, tmp_path)


def test_texts_that_are_not_there_are_asked_for_with_their_license(tmp_path, monkeypatch):
    monkeypatch.setattr(languages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(catalog, "open_data_set", lambda row, root: IMAGENET)
    with pytest.raises(Missing, match="excludes commercial use"):
        open_languages("babel_imagenet", tmp_path)
    (tmp_path / "babel_imagenet").mkdir()
    babel(tmp_path / "babel_imagenet", DE=[[0], ["Schleie"]])
    assert open_languages("babel_imagenet", tmp_path, ("de",)).languages == ["de"]


def test_the_table_has_a_row_a_language_and_the_report_the_mean():
    each = {"de": {"acc1": 0.5}, "la": {"acc1": 0.25}}
    values = average(each)
    assert values == {"mean/acc1": 0.375, "de/acc1": 0.5, "la/acc1": 0.25}
    outcomes = [("babel", Outcome("zeroshot_classification", values, by_language=each))]
    rows = csv.DictReader(to_csv(outcomes, "m").splitlines())
    assert [(row["language"], row["acc1"]) for row in rows] == [("de", "0.5"), ("la", "0.25")]
    assert "| babel | mean/acc1 | 37.5 |" in to_markdown(outcomes, "m")
