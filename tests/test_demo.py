"""What `clip-jax demo` says before it serves; tests/programs/browser drives the page itself."""

import sys

import pytest

from clip_jax.cli import main


def test_without_gradio_one_message_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "nowhere"]) == 2
    printed = capsys.readouterr()
    assert "pip install 'clip-jax-pods[demo]'" in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_that_cannot_be_is_refused(port, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "nowhere", "--port", port])
    assert stopped.value.code == 2
    assert "must be from 1 to 65535" in capsys.readouterr().err
