"""ONNX files of every family give the outputs of the model in onnxruntime."""

import pytest

from tests.export.conftest import (
    IN_UNIT_TESTS,
    NAFLEX,
    SQUARE,
    check_captions,
    check_float16,
    check_immich,
    check_naflex,
    check_square,
)


@pytest.mark.parametrize("name", [name for name in SQUARE if name not in IN_UNIT_TESTS])
def test_one_file_at_two_batch_sizes(tmp_path, families, name):
    check_square(tmp_path, families(name))


@pytest.mark.parametrize("name", [name for name in NAFLEX if name not in IN_UNIT_TESTS])
def test_one_file_of_naflex_at_two_lengths_and_batch_sizes(tmp_path, families, name):
    check_naflex(tmp_path, families(name))


def test_captions_are_the_models_greedy_ones(tmp_path, families, monkeypatch):
    check_captions(tmp_path, families("mammut"), monkeypatch)


@pytest.mark.parametrize("name", ["naflex", "naflex_mean"])
def test_float16_files_have_their_own_names_and_half_the_size(tmp_path, families, name):
    check_float16(tmp_path, families(name))


@pytest.mark.parametrize("name", ["mean", "mammut", "pe_core", "xlm_roberta"])
def test_the_layout_of_immich(tmp_path, families, name):
    check_immich(tmp_path, families(name))
