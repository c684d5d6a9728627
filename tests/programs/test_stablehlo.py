"""`export --format stablehlo --verify` runs the folder in a fresh process, of JAX alone."""

import json

import pytest

from clip_jax.cli.commands import main
from clip_jax.convert.formats import write_weights
from clip_jax.inference.loading import load
from tests.export.conftest import families  # noqa: F401 (a fixture)


@pytest.mark.parametrize("name", ["coca", "mammut", "resnet", "siglip"])
def test_stablehlo_is_verified(tmp_path, capsys, families, name):  # noqa: F811
    weights, output = families(name).weights, tmp_path / "out"
    write_weights(weights, tmp_path / "model", "clip-jax")
    args = ["export", str(tmp_path / "model"), str(output), "--format", "stablehlo"]
    assert main([*args, "--verify", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["max_relative_difference"] <= values["bound"] == 1e-5
    assert load(output).config.embed_dim == weights.config.embed_dim
    if weights.config.decoder is not None:
        assert values["caption_logits"] <= values["max_relative_difference"]
        card = (output / "README.md").read_text()
        assert 'following = read("caption_next")' in card
        assert "ends with the id 519" in card
    if name == "resnet":  # damaged afterwards, it is told without being written again
        (output / "text.stablehlo").write_bytes(b"")
        assert main([*args, "--existing"]) == 2
        assert "cut or of another model" in capsys.readouterr().err
