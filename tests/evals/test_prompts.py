"""Published names and templates are whole; phrasing is measured as it is defined."""

import numpy as np
import pytest

from clip_jax.evals import prompts
from clip_jax.evals.prompts import _data, fill
from tests.evals.conftest import unit


def test_imagenet_is_openais():
    names, templates = prompts.class_names("imagenet1k"), prompts.templates("imagenet1k")
    assert len(names) == len(prompts.imagenet_wnids()) == 1_000
    assert len(set(names)) == 998  # OpenAI's has two missiles and two sunglasses
    assert len(templates) == 80
    assert (names[0], names[134], names[517], names[999]) == (
        "tench", "crane bird", "construction crane", "toilet paper"
    )  # fmt: skip


def test_every_template_has_a_place_for_the_class():
    for rows in _data("templates.json").values():
        for template in rows:
            assert "zebra" in fill(template, "zebra")
            assert "{" not in fill(template, "zebra")


@pytest.fixture(scope="module")
def task():
    """Three templates: one good, one poor, one noise that only harms."""
    rng = np.random.default_rng(0)
    classes = rng.standard_normal((7, 16))
    labels = rng.integers(0, 7, 400)
    images = unit(classes[labels] + 1.2 * rng.standard_normal((400, 16)))
    noise = np.array([0.4, 1.5, 9.0])[:, None, None]
    return images, labels, unit(classes + noise * rng.standard_normal((3, 7, 16)))


def test_sensitivity_is_each_template_and_the_ensemble(task):
    images, labels, features = task
    found = prompts.sensitivity(images, labels, features, ["a", "b", "c"])
    alone = [((images @ w.T).argmax(1) == labels).mean() for w in features]
    assert list(found.of_template.values()) == pytest.approx(alone)
    assert found.spread == pytest.approx(max(alone) - min(alone))
    together = (images @ features.mean(0).T / np.linalg.norm(features.mean(0), axis=1)).argmax(1)
    assert found.ensemble == pytest.approx((together == labels).mean())
    assert found.gain == pytest.approx(found.ensemble - np.mean(alone))


def test_greedy_selection_leaves_out_what_harms(task):
    images, labels, features = task
    chosen = prompts.greedy_selection(images, labels, features)
    assert chosen[0] == 0
    assert 2 not in chosen
    assert prompts.greedy_selection(images, labels, features[[0, 0]]) == [0]  # nor what is no help


def test_template_files(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a photo of a {c}.\n\nart of {}\n", encoding="utf-8-sig")
    assert prompts.read_templates(path) == ["a photo of a {c}.", "art of {}"]
    assert fill("art of {}", "zebra") == "art of zebra"
    path.write_text("a photo\n")
    with pytest.raises(ValueError, match="template 1, 'a photo', says nowhere"):
        prompts.read_templates(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        prompts.read_templates(path)
