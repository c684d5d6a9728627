"""One display for all long work."""

import sys

from clip_jax.display import Display


def test_on_a_terminal_a_bar_says_which_work_goes_on(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Display("embed", 30, 10) as display:
        display.add(5)
        display.advance(25)
        display.add()
    bar = capsys.readouterr().err
    assert "embed" in bar
    assert "26/30" in bar


def test_elsewhere_also_under_jupyter_it_writes_lines_and_no_bar(monkeypatch, capsys):
    with Display("train", 30) as display:
        display.advance(20)
        display.report(20, {"loss": 1.25, "other": 3})
    Display("train", 30, quiet=True).line("unheard")
    monkeypatch.setattr("builtins.get_ipython", type("ZMQInteractiveShell", (), {}), raising=False)
    fake = type(sys)("IPython.display")  # without `display`: nothing goes into the page
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    Display("train", 10).line("step 1")
    assert capsys.readouterr().err == "step 20/30  loss 1.25\nstep 1\n"
