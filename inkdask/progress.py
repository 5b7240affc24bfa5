"""Progress of a job: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
)

from inkdask.errors import without_password

WIDEST, NARROWEST = 20, 5  # signs of a bar
REFRESH = 0.5  # seconds between updates on a terminal
PLAIN_INTERVAL = 5.0  # seconds between lines elsewhere

_shown: list[Progress] = []  # bars on the terminal


def say(text: str) -> None:
    """Print a message on standard error: above a bar, and on a terminal wrapped between words."""
    console = _shown[-1].console if _shown else Console(stderr=True)
    if not console.is_terminal:
        write(text)
        return
    wrapper = textwrap.TextWrapper(console.width)
    wrapper.break_long_words = wrapper.break_on_hyphens = False  # so that paths stay whole
    lines = map(wrapper.fill, text.split("\n"))
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False, emoji=False)


def write(lines: str) -> None:
    """Print lines on standard error as they are; one that is closed or full stops no job."""
    if sys.stderr is not None:  # else print would take standard output
        with suppress(OSError, ValueError):
            print(lines, file=sys.stderr, flush=True)


class Meter:
    """Count units of work and show them on standard error.

    Use it as a context manager, once for each phase of a job. On a terminal the bar of a phase
    takes the place of the one before; elsewhere a phase of some seconds says nothing.

    Parameters
    ----------
    phase
        Name of the phase, such as ``"ink"``.
    total
        Number of units in all.
    unit
        Name of the units, in the plural.
    peek
        Return the units done so far, those included that are not added yet.
    """

    def __init__(
        self, phase: str, total: int, unit: str, peek: Callable[[], int] = lambda: 0
    ) -> None:
        self.phase, self.total, self.unit = phase, total, unit
        self._peek, self._finished = peek, 0
        self._stop = threading.Event()
        self.started = self._said = time.monotonic()
        self._has_said = False
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            self._shape = BarColumn()
            self._bar = Progress(console=console, transient=True)
            self._task = self._bar.add_task(phase, total=total, said="")
            self._show(self._bar)

    def __enter__(self) -> Meter:
        self.started = self._said = time.monotonic()
        if self._bar:
            self._bar.start()
            _shown.append(self._bar)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._watcher.join()
        if self._bar:
            self._show(self._bar)
            _shown.remove(self._bar)
            self._bar.stop()
        elif kind is None and self._has_said:
            self._say()

    def add(self, units: int) -> None:
        """Add units that are done."""
        self._finished += units

    @property
    def done(self) -> int:
        """Units done so far."""
        return min(max(self._finished, self._peek()), self.total)

    def _watch(self) -> None:
        while not self._stop.wait(REFRESH):
            if self._bar:
                self._show(self._bar)
            elif time.monotonic() - self._said >= PLAIN_INTERVAL and self.done < self.total:
                self._say()

    def _show(self, bar: Progress) -> None:
        """Show the counts; the bar itself has the room that they leave, if any."""
        said = f"{self.done:,} of {self.total:,} {self.unit}, {self.time}"
        room = bar.console.width - len(f"{self.phase} 100% {said} ")
        self._shape.bar_width = min(room, WIDEST)
        shape = [self._shape] * (room >= NARROWEST)
        words = TextColumn("{task.description}"), TextColumn("{task.fields[said]}")
        bar.columns = (words[0], *shape, TaskProgressColumn(), words[1])
        bar.update(self._task, completed=self.done, said=said)

    @property
    def time(self) -> str:
        """Time that has passed, and about how long is left: ``17 s, about 14 s left``."""
        passed = clock(self.seconds)
        if not 0 < self.done < self.total:
            return passed
        return f"{passed}, about {clock((self.total - self.done) / self.speed)} left"

    @property
    def seconds(self) -> float:
        """Time since the phase began, in seconds."""
        return time.monotonic() - self.started

    @property
    def speed(self) -> float:
        """Units per second, on average."""
        return self.done / max(self.seconds, 1e-9)

    def _say(self) -> None:
        self._said, self._has_said = time.monotonic(), True
        write(
            f"{self.phase}: {self.done:,} of {self.total:,} {self.unit} "
            f"({100 * self.done / max(self.total, 1):.0f} %), {self.time}"
        )


def clock(seconds: float) -> str:
    """Format a time in seconds: ``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def about(seconds: float) -> str:
    """Return a rough time in words."""
    if seconds < 10:
        return "a few seconds"
    if seconds < 90:
        return f"about {5 * round(seconds / 5)} s"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min"
    return f"about {round(seconds / 3600):,} h"


def amount(count: float) -> str:
    """Format a number of bytes: ``812 kB``, ``1.4 GB``."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(int(math.log10(max(count, 1)) // 3), len(units) - 1)
    scaled = count / 1000**power
    return (
        f"{scaled:.0f} {units[power]}"
        if scaled >= 100 or not power
        else f"{scaled:.1f} {units[power]}"
    )


def size(shape: Sequence[int]) -> str:
    """Format height and width, in pixels: ``1,664 x 640 pixels (x, y)``."""
    height, width = shape
    return f"{width:,} x {height:,} pixels (x, y)"


def columns(rows: Mapping[str, str | Sequence[str]]) -> str:
    """Format names and values, of one or more lines, in two columns.

    No line is wrapped, so that paths stay whole.
    """
    width = max(map(len, map(printable, rows)))
    lines = []
    for name, value in rows.items():
        values = [value] if isinstance(value, str) else value
        names = [printable(name)] + [""] * (len(values) - 1)
        lines += [f"{n:<{width}}  {printable(v)}" for n, v in zip(names, values, strict=True)]
    return "\n".join(lines)


def printable(line: str) -> str:
    """Hide passwords, and escape characters that a terminal would obey: names may hold them."""
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]",
        lambda found: found[0].encode("unicode_escape").decode(),
        without_password(line),
    )
