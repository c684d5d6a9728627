"""`prepare --index`: what it refuses; what it does is tested in tests/contract."""

from clip_jax.cli.commands import main


def test_what_has_no_index(capsys):
    assert main(["prepare", "pairs.csv", "--index"]) == 2
    assert "only tars" in capsys.readouterr().err
