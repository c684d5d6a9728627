"""Run directories of earlier versions resume, and are evaluated, as by these versions.

`tests/golden/artefacts.py` wrote them. A check fails if a weight, an id or a field has changed.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from clip_jax.checkpoints.manager import Checkpoints, restore_step
from clip_jax.config_files import load_config
from clip_jax.errors import InputError
from clip_jax.inference.evaluate import EvaluateConfig, evaluate
from clip_jax.models.clip import path_name
from clip_jax.sharding import make_mesh
from tests.conftest import losses, shared_program, train_shared
from tests.golden.artefacts import STEPS, STORED, read_expected

RUN = Path("run")


def check_resumed() -> None:
    """Check the losses of the steps that the stored run lacks."""
    config = load_config(RUN / "config.json")
    train_shared(replace(config, stop_after=STEPS), RUN)
    resumed = {step: loss for step, loss in losses(RUN).items() if step > STORED}
    values, _ = read_expected()
    # XLA's programs of other versions, and for other numbers of devices, sum in another order.
    expected = {int(step): loss for step, loss in values["losses"].items()}
    assert resumed == pytest.approx(expected, rel=1e-5)


def check_results() -> None:
    """Check the results of the run's own evaluators."""
    values, _ = read_expected()
    assert evaluate(EvaluateConfig(model=RUN)) == pytest.approx(values["results"], rel=1e-5)


CHECKS = {"resumed": check_resumed, "results": check_results}


@pytest.mark.parametrize("name", CHECKS)
def test_runs_of_earlier_versions_give_what_they_gave(artefacts, name):
    CHECKS[name]()


# ------------------------------------------------------------------ altered copies


def change_weight(tree: str) -> None:
    """Save the run's checkpoint again, with one weight changed by a hundredth."""
    config = load_config(RUN / "config.json")
    program = shared_program(config.recipe, make_mesh(config.mesh))
    saved = restore_step(RUN, STORED, program.state.saved())

    def change(path, x):
        name = path_name(path)
        return x.at[0, 0].add(0.01) if name == f"{tree}/visual/proj" else x

    state = jax.tree_util.tree_map_with_path(change, saved.state)
    shutil.rmtree(RUN / "checkpoints")
    checkpoints = Checkpoints(RUN / "checkpoints", config.checkpoint)
    checkpoints.save(STORED, state, saved.position)
    checkpoints.close()


def damage_weight() -> None:
    """Change one bit of the file that has the small arrays."""
    (path,) = RUN.glob("checkpoints/*/state/d/*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_file(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


# The check that fails, its message, and what is altered.
ALTERED = {
    "weight": ("resumed", "approx", lambda: change_weight("params")),
    "averaged weight": ("results", "approx", lambda: change_weight("opt_state/ema")),
    "bit of the weights": ("resumed", "no checkpoint in .* is intact", damage_weight),
    "bit for the evaluation": ("results", "is damaged", damage_weight),
    "id of the data": (
        *("resumed", "was trained on other data"),
        lambda: change_file(RUN / "data.json", '["', '["0'),
    ),
    "field of the config": (
        *("resumed", "approx"),
        lambda: change_file(RUN / "config.json", '"flip": 0.0', '"flip": 1.0'),
    ),
    "field of the checkpoint": (
        *("resumed", "metadata does not match its checksum"),
        lambda: change_file(
            RUN / f"checkpoints/{STORED}/position/metadata", '"samples": 800', '"samples": 808'
        ),
    ),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_copy_fails_the_check(artefacts, name):
    check, message, alter = ALTERED[name]
    alter()
    with pytest.raises((AssertionError, InputError), match=message):
        CHECKS[check]()
