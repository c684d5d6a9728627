"""`clip-jax export --verify` of a captioner, in every format."""

import json
from dataclasses import replace

import pytest

from clip_jax.cli.commands import main
from clip_jax.convert.formats import write_weights
from clip_jax.convert.weights import Weights, default_preprocess
from tests.conftest import CAPPA, COCA, parameters


@pytest.mark.parametrize("config", [COCA, CAPPA], ids=["CoCa", "CapPa"])
def test_a_model_that_writes_captions(tmp_path, capsys, config):
    config = replace(config, text=replace(config.text, context_length=40))  # room for padding
    weights = Weights(
        config=config, params=parameters(config), preprocess=default_preprocess(config)
    )
    write_weights(weights, tmp_path / "model", "clip-jax")

    def exported(folder, *flags):
        paths = str(tmp_path / "model"), str(tmp_path / folder)
        assert main(["export", *paths, *flags, "--verify", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert exported("out", "--format", "onnx")["caption_logits"] <= 1e-5
    assert "`docs/how-to/export.md`" in (tmp_path / "out/README.md").read_text()
    photos = exported("photos", "--format", "onnx", "--layout", "immich")
    assert photos["caption_logits"] is None
    assert not list((tmp_path / "photos").rglob("caption*"))
    # The text tower attends to padding, so users of the program must pad texts as the model does.
    values = exported("program", "--format", "stablehlo")
    assert values["caption_logits"] <= values["max_relative_difference"] <= values["bound"] == 1e-5
    begin_and_end = "begin with token id 518 and end with 519"
    assert begin_and_end in (tmp_path / "program/README.md").read_text()
