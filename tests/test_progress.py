"""What a person sees of a job on a terminal: one bar, and messages that leave it alone."""

import io
import logging
import re

import pytest
from rich.console import Console

from inkdask import messages, progress
from inkdask.progress import Meter, say


@pytest.fixture
def terminal(monkeypatch):
    """Open terminals of a width, whose contents a list keeps."""
    opened = []

    def open_one(width):
        def console(**_):
            opened.append(io.StringIO())
            return Console(file=opened[-1], force_terminal=True, width=width, color_system=None)

        monkeypatch.setattr(progress, "Console", console)
        return opened

    return open_one


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(
    ("phase", "done", "total", "unit", "seconds"),
    [
        ("ink", 0, 3_737, "tiles", 0),
        ("ink", 528, 3_737, "tiles", 9),
        ("ink", 3_737, 3_737, "tiles", 60),
        ("ink", 1_234_567, 39_062_500, "tiles", 3_700),
        ("TIFF, smaller images", 512, 50_000, "rows", 70),
    ],
)
def test_bar_is_one_line_of_whole_words(terminal, width, phase, done, total, unit, seconds):
    terminal(width)
    meter = Meter(phase, total, unit)
    meter.add(done)
    meter.started -= seconds
    meter._show(meter._bar)
    with meter._bar.console.capture() as shown:
        meter._bar.console.print(meter._bar.get_renderable())
    (line,) = shown.get().rstrip("\n").split("\n")
    words = f"{done:,} of {total:,} {unit}, "
    if width >= 80:
        assert len(line) <= width
        assert "…" not in line
        assert words in line
    if width == 120:
        assert meter._shape in meter._bar.columns


def test_message_stands_above_the_bar(terminal):
    opened = terminal(80)
    handler = messages.Handler()
    with Meter("ink", 100, "tiles"):
        handler.emit(logging.LogRecord("inkdask", logging.INFO, "", 0, "demo: CPU", None, None))
    screen = opened[0].getvalue()  # of the bar, which knows where its line begins
    assert re.search(r"(\x1b\[2K|\r)demo: CPU\n", screen)
    say("afterwards")
    assert opened[-1].getvalue() == "afterwards\n"
    assert opened[-1] is not opened[0]


def test_message_is_wrapped_between_words_and_paths_stay_whole(terminal):
    opened = terminal(40)
    path = "/a-long/path/of/many-parts/that-is-longer/than-the/terminal.zarr"
    say(f"The first words fill the line before {path} [bold]comes[/bold] :smile:\n  at last")
    assert opened[-1].getvalue().split("\n") == [
        "The first words fill the line before", path, "[bold]comes[/bold] :smile:", "  at last", ""
    ]  # fmt: skip


def test_message_elsewhere_is_one_line(capsys):
    say("word " * 100)
    assert capsys.readouterr().err == "word " * 100 + "\n"
