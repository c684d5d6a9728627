"""Flags that a person types wrongly."""

import pytest

from clip_jax.cli import main
from tests.conftest import DIGITS


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        (["--optim.learning-rat", "1"], "--optim.learning-rate"),
        (["--batch-size", "0"], "batch_size=0 must be at least 2"),
        (["--batch-size", "many"], "many"),
        (["--model.vision.num-heads", "7"], "vision.num_heads=7"),
    ],
)
def test_a_wrong_flag_is_explained_and_exits_with_2(flag, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(DIGITS), *flag])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
