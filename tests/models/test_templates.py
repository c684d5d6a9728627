"""Both placeholders work wherever a person writes a template."""

import tracemalloc

import pytest

from clip_jax.data.sources.image_folder import FolderConfig
from clip_jax.errors import InputError
from clip_jax.evals.prompts import read_templates
from clip_jax.inference.predict import check_labels
from clip_jax.losses import ClassifierConfig
from clip_jax.models.templates import fill


def captions_of(template, folder):
    """The caption of an image of the class folder `{}`."""
    (folder / "{}").mkdir()
    (folder / "{}" / "0.png").write_bytes(b"x")
    return FolderConfig(path=str(folder), templates=(template,)).open().record(0).captions()


def labels_of(template, folder):
    """The text of a label for `predict`, `serve` and `demo`."""
    return [fill(template, label, 99) for label in check_labels(["{}"], template)]


def evaluated(template, folder):
    """The prompt of a class for `evaluate --templates`."""
    (folder / "templates.txt").write_text(template)
    return [fill(line, "{}") for line in read_templates(folder / "templates.txt")]


def head_of(template, folder):
    """The prompt by which a classifier begins."""
    return [fill(x, "{}") for x in ClassifierConfig(templates=(template,)).templates]


@pytest.mark.parametrize("use", [captions_of, labels_of, evaluated, head_of])
@pytest.mark.parametrize(
    ("template", "expected"),
    [("a {}", "a {}"), ("a {c}", "a {}"), ("{c} or {}", "{} or {}"), ("a {d}", None)],
)
def test_a_template_is_filled_and_checked_alike_everywhere(use, template, expected, tmp_path):
    """Training took {} alone, so that a file of templates for `evaluate` was refused there."""
    if expected is None:
        with pytest.raises(InputError, match=r"='a \{d\}' has no \{\} for the name of the class"):
            use(template, tmp_path)
    else:
        assert use(template, tmp_path) == [expected]


@pytest.mark.parametrize(
    ("label", "template"),
    [
        ("a cat", "a photo of a {}."),
        ("x" * 9, "{}"),
        ("x" * 50, "{} and {}"),
        ("x", "{}" * 30),
        ("x", "{c}" * 30),
        ("x", "-" * 9 + "{}" * 3),
        ("{}", "{}-" * 9),
        ("", "{}"),
    ],
)
def test_a_prompt_of_limited_length_is_the_beginning_of_the_whole(label, template):
    for most in range(1, 30):
        assert fill(template, label, most) == fill(template, label)[:most]


def test_a_prompt_is_cut_while_it_is_built():
    """A long template with many places for a long label would fill the memory."""
    tracemalloc.start()
    assert fill("{}" * 1_000, "x" * 100_000, 5_000) == "x" * 5_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
