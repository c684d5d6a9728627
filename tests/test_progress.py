"""One display for all long work."""

import io
import sys

from clip_jax.progress import Display


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_bar_says_which_work_goes_on(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Display("embed", 30, 10) as display:
        display.add(5)
        display.advance(25)
        display.add()
    assert "embed" in sys.stderr.getvalue()
    assert "26/30" in sys.stderr.getvalue()


def test_elsewhere_also_under_jupyter_it_writes_lines_and_no_bar(monkeypatch, capsys):
    with Display("train", 30) as display:
        display.advance(20)
        display.report(20, {"loss": 1.25, "other": 3})
    with Display("train", 30, quiet=True) as display:
        display.line("unheard")
    monkeypatch.setattr("builtins.get_ipython", type("ZMQInteractiveShell", (), {}), raising=False)
    fake = type(sys)("IPython.display")  # without `display`: nothing goes into the page
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    Display("train", 10).line("step 1")
    assert capsys.readouterr().err == "step 20/30  loss 1.25\nstep 1\n"
