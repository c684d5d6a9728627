"""`clip-jax export` as a person meets it: folders, proof, refusals."""

import json

import pytest

from clip_jax.cli import main
from clip_jax.loading import load
from tests.conftest import COCA, TINY, write_run, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    write_tiny_model(folder)
    return folder


def export(model, output, *flags):
    return main(["export", str(model), str(output), *flags])


@pytest.mark.parametrize("flags", [(), ("--normalize",), ("--layout", "immich")])
def test_onnx_with_proof(model, tmp_path, capsys, flags):
    assert export(model, tmp_path / "out", "--format", "onnx", "--verify", "--json", *flags) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["runtime"].startswith("onnxruntime ")
    assert values["max_relative_difference"] <= values["bound"] == 1e-5
    assert "trained" not in (tmp_path / "out/README.md").read_text()


@pytest.fixture(scope="module")
def coca(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "coca"
    write_tiny_model(folder, config=COCA)
    return folder


@pytest.mark.long
def test_onnx_of_a_model_that_writes_captions(coca, tmp_path, capsys):
    flags = ("--format", "onnx", "--verify", "--json")
    assert export(coca, tmp_path / "out", *flags) == 0
    assert json.loads(capsys.readouterr().out)["caption_logits"] <= 1e-5
    assert (
        'InferenceSession("out/onnx/caption_model.onnx")'
        in (tmp_path / "out/README.md").read_text()
    )
    assert export(coca, tmp_path / "photos", *flags, "--layout", "immich") == 0
    assert json.loads(capsys.readouterr().out)["caption_logits"] is None
    assert not list((tmp_path / "photos").rglob("caption*"))


@pytest.mark.long
def test_stablehlo_with_proof(coca, tmp_path, capsys):
    assert export(coca, tmp_path / "out", "--format", "stablehlo", "--verify", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["caption_logits"] <= values["max_relative_difference"] <= values["bound"] == 1e-5
    card = (tmp_path / "out/README.md").read_text()
    assert 'following = read("caption_next")' in card
    assert "ends with the id 519" in card
    assert load(tmp_path / "out").config.embed_dim == 32


def test_a_card_that_says_how_the_model_was_trained(tmp_path, capsys):
    workdir, *_ = write_run(TINY, tmp_path / "run")
    (workdir / "result.json").write_text(json.dumps({"zero_shot/seen/top1": 0.93, "step": 2}))
    output = tmp_path / "out"
    assert export(workdir, output, "--format", "stablehlo") == 0
    card = (output / "README.md").read_text()
    assert "| pairs seen | 2,048 (2 steps of 1,024) |" in card
    assert "| zero_shot/seen/top1 | 0.93 |" in card
    assert "license:  # fill in" in card
    assert load(output).config.embed_dim == 16
    # Damaged afterwards, it is told without being written again.
    (output / "text.stablehlo").write_bytes(b"")
    assert export(workdir, output, "--format", "stablehlo", "--existing") == 2
    assert "cut or of another model" in capsys.readouterr().err


def test_another_models_folder_is_told(model, tmp_path, capsys):
    write_tiny_model(tmp_path / "other", seed=1)
    assert export(model, tmp_path / "out", "--format", "onnx") == 0
    assert export(tmp_path / "other", tmp_path / "out", "--format", "onnx", "--existing") == 1
    assert "max_relative_difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--format", "onnx", "--dtype", "bfloat16"), "--dtype float16"),
        (("--format", "stablehlo", "--layout", "immich"), "choices of --format onnx"),
    ],
)
def test_what_does_not_go_together_is_refused(model, tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit) as stopped:
        export(model, tmp_path / "out", *flags)
    assert stopped.value.code == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_what_is_there_is_kept(model, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert export(model, tmp_path / "out", "--format", "onnx") == 2
    assert "something is at" in capsys.readouterr().err
    assert export(model, tmp_path / "out", "--format", "onnx", "--overwrite") == 0
    assert (tmp_path / "out/mine").exists()
