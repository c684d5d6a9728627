"""ARO's and SugarCrepe's files, and what counts in their numbers."""

import json
import math

import numpy as np
import pytest

from clip_jax.data.sources import SampleError
from clip_jax.errors import InputError
from clip_jax.evals.compositions import composition, open_aro, open_sugar_crepe
from tests.evals.conftest import png


@pytest.fixture
def images(tmp_path):
    """Left half red, right half blue."""
    (tmp_path / "images").mkdir()
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10, 0], pixels[:, 10:, 2] = 255, 255
    (tmp_path / "images/a.png").write_bytes(png(pixels))
    return tmp_path / "images"


def case(**changes):
    return {
        "image_path": "a.png",
        "bbox_x": 10,
        "bbox_y": 2,
        "bbox_w": 6,
        "bbox_h": 5,
        "true_caption": "the cat is on the mat",
        "false_caption": "the mat is on the cat",
    } | changes


def test_aro_shows_only_what_its_box_holds_and_averages_without_symmetric_relations(images):
    path = images.parent / "visual_genome_relation.json"
    relations = ["on", "on", "on", "behind", "near", "near"]
    cases = [case(relation_name=name, bbox_x=2 * i) for i, name in enumerate(relations)]
    path.write_text(json.dumps(cases))
    data = open_aro(path, images)
    (red, captions), *_, (blue, _) = data
    assert blue.size == red.size == (6, 5)
    assert np.asarray(red).mean((0, 1)).tolist() == [255, 0, 0]
    assert np.asarray(blue).mean((0, 1)).tolist() == [0, 0, 255]
    assert captions == ("the cat is on the mat", "the mat is on the cat")
    won = np.array([True, True, False, True, False, False])
    values = composition(won, data.groups, data)
    assert values == {"acc": pytest.approx(3 / 6), "acc_macro": pytest.approx((2 / 3 + 1) / 2)}


@pytest.mark.parametrize("width", ["left", math.nan, math.inf, -5, 10**9, 10**12])
def test_aros_boxes_that_make_no_sense(width, images):
    """A file whose boxes are no numbers is refused; one that cannot be cut out is a bad sample."""
    path = images.parent / "x.json"
    path.write_text(json.dumps([case(relation_name="on", bbox_w=width)]))
    error = SampleError if isinstance(width, int) else InputError
    with pytest.raises(error, match=r"not in ARO's format|box of -?\d+ x 5 pixels at 10, 2: "):
        open_aro(path, images).load(0)


def test_aros_attributes_count_from_25_cases_on(images):
    path = images.parent / "visual_genome_attribution.json"
    many, few = case(attributes=["red", "round"]), case(attributes=["old", "blue"])
    path.write_text(json.dumps([many] * 25 + [few] * 24))
    data = open_aro(path, images)
    assert (data.groups[0], data.groups[-1]) == ("red_round", "old_blue")
    won = np.arange(49) >= 20
    assert composition(won, data.groups, data)["acc_macro"] == pytest.approx(5 / 25)
    path.write_text(json.dumps([few]))
    assert "acc_macro" not in composition(won[:1], ["old_blue"], open_aro(path, images))


def test_sugar_crepe_is_reported_by_kind(images):
    for kind, number in (("swap_obj", 3), ("add_att", 2)):
        rows = {
            str(7 * i): {"filename": "a.png", "caption": f"{kind} {i}", "negative_caption": "no"}
            for i in range(number)
        }
        (images.parent / f"{kind}.json").write_text(json.dumps(rows))
    (images.parent / "._swap_obj.json").write_bytes(b"\0macOS's")
    data = open_sugar_crepe(images.parent)
    assert list(data.groups) == ["add_att"] * 2 + ["swap_obj"] * 3
    assert data.load(0) == (images / "a.png", ("add_att 0", "no"))
    values = composition(np.array([True, False, True, True, False]), data.groups, data)
    of_kind = {"acc/add_att": 1 / 2, "acc/swap_obj": 2 / 3}
    assert values == pytest.approx({"acc": 3 / 5, "acc_macro": (1 / 2 + 2 / 3) / 2} | of_kind)


def test_other_files_are_named(images):
    path = images.parent / "x.json"
    path.write_text(json.dumps([{"image_path": "a.png"}]))
    with pytest.raises(ValueError, match="not in ARO's format"):
        open_aro(path, images)
    with pytest.raises(ValueError, match="not in SugarCrepe's format"):
        open_sugar_crepe(images.parent)
    path.unlink()
    with pytest.raises(InputError, match=r"x\.json cannot be read as text"):
        open_aro(path, images)
    with pytest.raises(ValueError, match=r"no \.json of SugarCrepe's"):
        open_sugar_crepe(images.parent)
