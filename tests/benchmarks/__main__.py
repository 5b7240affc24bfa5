"""All benchmarks, one after the other, each in a process of its own.

    python -m tests.benchmarks                      # all of them
    python -m tests.benchmarks blend comparison     # some
    python -m tests.benchmarks --list
    python -m tests.benchmarks --save               # and put them into tests/benchmarks/RESULTS.md
    python -m tests.benchmarks gpu --seconds 540    # one, with options of its own

A benchmark is a module beside this one that prints Markdown; its first sentence says what it
measures, and its own options (``python -m tests.benchmarks.NAME --help``) choose other sizes.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.benchmarks._common import ROOT, machine, side_for_device

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"

# What the suite gives to some: less where the default takes long, more where it starts too small.
ARGUMENTS = {
    "export": ["8000"],
    "faults": ["--faults", "50"],
    "profile_job": ["--side", "640"],
}


def benchmarks() -> dict[str, str]:
    """Names of all benchmarks, and what each measures."""
    return {
        path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        for path in sorted(HERE.glob("[a-z]*.py"))
    }


def command_of(name: str, options: Sequence[str] = ()) -> list[str]:
    """What a person types to run one; without options, those of `ARGUMENTS`."""
    arguments = options or ARGUMENTS.get(name, [])
    if name == "profile_job" and not options and side_for_device(0, 1):
        arguments = []  # on a GPU its default is large enough
    return ["python", "-m", f"tests.benchmarks.{name}", *arguments]


def run(command: list[str]) -> tuple[str, float, int]:
    """Run one, and show what it prints as it comes: that, its seconds, and its exit status."""
    start = time.perf_counter()
    command = [sys.executable, *command[1:]]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return "".join(lines).strip(), time.perf_counter() - start, process.returncode


def read_results() -> dict[str, str]:
    """What was saved before, by the names of the benchmarks."""
    text = RESULTS.read_text() if RESULTS.exists() else ""
    found = re.finditer(r"^## (\w+)\n.*?(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    kept = {*benchmarks(), "fuzz"}  # whose tallies are added by hand
    return {part[1]: part[0].rstrip() + "\n" for part in found if part[1] in kept}


def commit() -> str:
    """The commit that is measured, where git and its folder are there."""
    with suppress(OSError):
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT
        )
        return done.stdout.strip() or "unknown"
    return "unknown"


def main() -> None:
    """Run those that are named, or all that this machine can."""
    known = benchmarks()
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        usage="%(prog)s [--list] [--save] [NAME ...]\n       %(prog)s [--save] NAME OPTION ...",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run; all of them")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    given, options = parser.parse_known_args()
    if options and len(given.names) != 1:
        parser.error(f"{' '.join(options)} can be for one benchmark only, named before")
    if unknown := sorted(set(given.names) - set(known)):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    if given.list:
        width = max(map(len, known))
        print("\n".join(f"{name:{width}}  {what}" for name, what in known.items()))
        return

    head = f"{machine()}; commit {commit()}."
    print(head, flush=True)
    failed = []
    pages = read_results() if given.save else {}
    # The one of a GPU would put its figures out of the results on a machine without.
    for name in given.names or [name for name in known if name != "gpu" or side_for_device(0, 1)]:
        when = datetime.datetime.now(datetime.UTC)
        command = command_of(name, options)
        title = f"## {name}\n\n{known[name]}\n\n`{' '.join(command)}`, {when:%Y-%m-%d}"
        print(f"\n{title}\n", flush=True)
        printed, seconds, status = run(command)
        if status:
            failed.append(name)
            printed += f"\n\nEnded with exit status {status}."
        print(f"\n{seconds:.0f} s", flush=True)
        pages[name] = f"{title}, {seconds:.0f} s. {head}\n\n{printed}\n"
    if given.save:
        text = [pages[name] for name in sorted(pages)]
        RESULTS.write_text("\n".join([f"# Measured\n\n{_PREFACE}\n", *text]))
        print(f"\nwritten: {RESULTS.relative_to(ROOT)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


_PREFACE = """\
Written by `python -m tests.benchmarks --save`, as printed; each section names the command that
makes it again. Ratios inside a section were measured in one run, and travel better from machine to
machine than seconds do."""


if __name__ == "__main__":
    main()
