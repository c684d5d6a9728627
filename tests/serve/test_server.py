"""`clip-jax serve`, refusing what cannot be."""

import sys

from clip_jax.cli.commands import main


def test_without_the_extra_one_message_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "nowhere"]) == 2
    assert "pip install 'clip-jax-pods[serve]'" in capsys.readouterr().err


def test_a_token_file_without_a_token_is_refused(tmp_path, capsys):
    (tmp_path / "token").write_text("\n")
    assert main(["serve", "nowhere", "--token-file", str(tmp_path / "token")]) == 2
    assert "has no token" in capsys.readouterr().err
    assert main(["serve", "nowhere", "--token-file", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err
