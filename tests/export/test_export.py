"""`clip-jax export` as a person meets it: folders, verification, invalid input."""

import json
import re

import pytest

from clip_jax.cli.commands import main
from clip_jax.convert.verify import Verification
from tests.conftest import TINY, write_run, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    workdir, *_ = write_run(TINY, tmp_path_factory.mktemp("export") / "run")
    (workdir / "result.json").write_text(json.dumps({"zero_shot/seen/top1": 0.93, "step": 2}))
    return workdir


def export(model, output, *flags, format="onnx"):
    return main(["export", str(model), str(output), "--format", format, *flags])


@pytest.mark.parametrize("flags", [("--normalize",), ("--layout", "immich")])
def test_onnx_is_verified_and_says_how_it_was_trained(model, tmp_path, capsys, flags):
    assert export(model, tmp_path / "out", "--verify", "--json", *flags) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["runtime"].startswith("onnxruntime ")
    assert values["max_relative_difference"] <= values["bound"] == 1e-5
    assert values["texts_with_other_ids"] == 0
    (path,) = (tmp_path / "out").rglob("tokenizer.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": None}))
    assert export(model, tmp_path / "out", "--existing", *flags) == 1
    assert re.search(r"texts_with_other_ids +2\n", capsys.readouterr().out)
    assert "| zero_shot/seen/top1 | 0.93 |" in (tmp_path / "out/README.md").read_text()


def test_what_is_at_the_output_is_kept_and_verified(model, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").touch()
    assert export(model, output) == 2
    assert "exists; use --overwrite" in capsys.readouterr().err
    assert export(model, output, "--overwrite") == 0
    assert (output / "mine").exists()
    write_tiny_model(tmp_path / "other", seed=1)
    assert export(tmp_path / "other", output, "--existing") == 1
    assert "max_relative_difference" in capsys.readouterr().out
    assert not Verification(bound=1e-5, image_features=float("nan"), logits=0.0).passed


@pytest.mark.parametrize(
    ("format", "flags", "message"),
    [
        ("onnx", ("--dtype", "bfloat16"), "--dtype float16"),
        ("stablehlo", ("--layout", "immich"), "need --format onnx"),
    ],
)
def test_what_does_not_go_together_is_refused(model, tmp_path, capsys, format, flags, message):
    with pytest.raises(SystemExit) as stopped:
        export(model, tmp_path / "out", *flags, format=format)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
