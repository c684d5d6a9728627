"""Published names and templates are whole; phrasing is measured as it is defined."""

import numpy as np
import pytest

from clip_jax.evals import prompts
from clip_jax.evals.prompts import _published, fill
from tests.evals.conftest import unit


def test_imagenet_is_openais():
    names, templates = prompts.class_names("imagenet1k"), prompts.templates("imagenet1k")
    assert len(names) == len(prompts.imagenet_wnids()) == 1_000
    assert len(set(names)) == 998  # OpenAI's has two missiles and two sunglasses
    assert len(templates) == 80
    assert (names[0], names[134], names[517], names[999]) == (
        "tench",
        "crane bird",
        "construction crane",
        "toilet paper",
    )


def test_every_template_has_a_place_for_the_class():
    for rows in _published().values():
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
    values, of_template = prompts.sensitivity(images, labels, features)
    alone = [((images @ w.T).argmax(1) == labels).mean() for w in features]
    assert of_template == pytest.approx(alone)
    mean = features.mean(0)
    together = ((images @ mean.T / np.linalg.norm(mean, axis=1)).argmax(1) == labels).mean()
    assert values == pytest.approx(
        {
            "templates/mean": np.mean(alone),
            "templates/spread": max(alone) - min(alone),
            "templates/ensemble": together,
            "templates/gain": together - np.mean(alone),
        }
    )


def test_equal_classes_share_their_images(task):
    """As in `acc1`, whose ensemble these are: the first of equal classes has no advantage."""
    images, labels, features = task
    features = features.copy()
    features[:, 6] = features[:, 2]
    values, of_template = prompts.sensitivity(images, labels, features)
    turned, of_turned = prompts.sensitivity(images, 6 - labels, features[:, ::-1])
    assert values == pytest.approx(turned)
    assert of_template == pytest.approx(of_turned)


def test_template_files(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a photo of a {c}.\n\nart of {}\n", encoding="utf-8-sig")
    assert prompts.read_templates(path) == ["a photo of a {c}.", "art of {}"]
    assert fill("art of {}", "zebra") == "art of zebra"
    path.write_text("a photo\n")
    with pytest.raises(ValueError, match=r"mine\.txt: template 1='a photo' has no \{\} for"):
        prompts.read_templates(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        prompts.read_templates(path)
