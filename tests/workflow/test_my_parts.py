"""A user's parts, in a package that no file of clip_jax names: from training to export."""

import base64
import json
import os
import signal
from pathlib import Path

import pytest

from clip_jax.cli.commands import main
from tests.conftest import losses
from tests.data.conftest import make_pairs
from tests.workflow.conftest import training

MINE = "tests.workflow.my_parts"
CONFIG = Path(__file__).with_name("my_parts") / "run.py"
STEPS = 12


def write_data(folder: Path) -> None:
    """Write JSON lines with images in base64, and the same images in a folder for each class."""
    lines = []
    for number, (name, image, caption) in enumerate(make_pairs(48)):
        encoded = base64.b64encode(image).decode()
        lines.append(json.dumps({"image": encoded, "caption": caption}))
        path = folder / f"classes/{number % 4}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    (folder / "pairs.b64").write_text("\n".join(lines))


def test_parts_of_a_user_train_resume_evaluate_and_export_by_import_alone(tmp_path, start, capsys):
    write_data(tmp_path)
    killed, through = tmp_path / "killed", tmp_path / "through"
    killed.mkdir()
    through.mkdir()
    named, data = ("--import", MINE), str(tmp_path)
    command = ("-m", "clip_jax")

    two = start(
        *training(killed, *named, config=CONFIG, small=()), TROUBLE="1:8:kill", MY_DATA=data
    )
    two.until("trouble: kill")
    os.kill(two.pid(0), signal.SIGKILL)
    two.end(code=137)
    own_config = killed / "config.json"  # which imports nothing
    for refused in (["train", str(own_config)], ["evaluate", str(killed)]):
        assert main(refused) == 2
        (line,) = capsys.readouterr().err.splitlines()
        for part in ("MlpMixerConfig", "JsonImagesConfig", "HardNegativeConfig"):
            assert part in line.partition(" needs ")[2]
        assert f"Pass --import {MINE}" in line
    one_process = {"processes": 1, "devices": 8, "small": ()}
    again = training(killed, *named, config=own_config, **one_process)
    assert "resuming from step 6" in "\n".join(start(*again).end())
    alone = training(through, *named, config=CONFIG, **one_process)
    start(*alone, MY_DATA=data).end()
    assert list(losses(killed)) == list(range(1, STEPS + 1))
    assert losses(killed) == pytest.approx(losses(through), rel=1e-4)

    evaluated = start(*command, *named, "evaluate", killed, "--json").end()
    values = json.loads(next(line for line in evaluated if line.startswith("{")))
    assert values.keys() >= {"images/image_recall@1", "images/image_recall@5", "images/mAP"}
    result = json.loads((killed / "result.json").read_text())
    assert values == pytest.approx({name: result[name] for name in values}, abs=1e-5)
    for target in ("stablehlo", "onnx"):
        output = tmp_path / target
        args = ("export", killed, output, "--format", target, "--verify")
        start(*command, *args, *named).end()
        assert output.is_dir()
