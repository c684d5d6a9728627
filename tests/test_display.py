"""One display for all long work."""

import sys

import pytest

from clip_jax.display import Display, duration, results


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
        display.report(20, {"loss": 1.25, "other": 3}, seconds_left=80)
        display.report(30, {"image_to_text_accuracy": 0.984, "images_per_second": 12345.6})
        display.report(30, {"a/image_to_text_accuracy": 0.5, "b/image_to_text_accuracy": 0.75})
    Display("train", 30, quiet=True).line("unheard")
    monkeypatch.setattr("builtins.get_ipython", type("ZMQInteractiveShell", (), {}), raising=False)
    fake = type(sys)("IPython.display")  # without `display`: nothing goes into the page
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    Display("train", 10).line("step 1")
    assert capsys.readouterr().err.splitlines() == [
        "step 20/30  loss 1.25  ETA 1 min 20 s",
        "step 30/30  in-batch accuracy 98.4%  12,346 images/s",
        "step 30/30  a in-batch accuracy 50.0%  b in-batch accuracy 75.0%",
        "step 1",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (79.8, "1 min 20 s"), (7_201, "2 h 1 s"), (187_200, "2 d 4 h")],
)
def test_a_time_has_at_most_two_units(seconds, text):
    assert duration(seconds) == text


def test_results_fit_on_a_terminal_and_stay_whole():
    values = {f"zero_shot/a-long-name/top{i}": 0.123456 for i in range(9)}
    lines = results(1_000_000, values).splitlines()
    assert max(map(len, lines)) <= 110
    pairs = "  ".join(line.removeprefix("step 1000000  ") for line in lines).split("  ")
    assert pairs == [f"{name} 0.1235" for name in values]
