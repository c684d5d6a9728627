"""The loop of the page about training from Python, on eight devices."""

import dataclasses
import re
import shutil

import jax
import numpy as np

import clip_jax
from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.train import train
from tests.conftest import losses, tiny_digits
from tests.pages import ROOT

PAGE = ROOT / "docs/how-to/train-from-python.md"


def test_the_loop_of_the_page_trains_and_resumes_as_the_command_does(tmp_path, monkeypatch, capsys):
    """It prints the losses of `train`, bit for bit, and leaves the same weights."""
    config = tiny_digits(steps=60, report_every=20, checkpoint=CheckpointConfig(every_steps=20))
    train(dataclasses.replace(config, evals=()), tmp_path / "command")
    (source,) = re.findall(r"<<'END'\n(.*?)^END$", PAGE.read_text(), re.M | re.S)
    loop = compile(source, "loop.py", "exec")
    monkeypatch.setattr(clip_jax, "load_config", lambda name: config)
    monkeypatch.chdir(tmp_path)
    printed = []
    for later in (40, 60), ():  # the checkpoints that are then lost
        capsys.readouterr()
        exec(loop, {})
        pairs = [line.split() for line in capsys.readouterr().out.splitlines()]
        printed.append({int(step): float(loss) for step, loss in pairs})
        ours, theirs = clip_jax.load("models/loop"), clip_jax.load("command")
        jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
        assert ours.config == theirs.config
        shutil.rmtree("models")
        for step in later:
            shutil.rmtree(f"runs/loop/checkpoints/{step}")
    expected = losses(tmp_path / "command")
    assert printed == [expected, {step: expected[step] for step in (40, 60)}]
