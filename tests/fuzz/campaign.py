"""Run inputs of targets in a child process that hangs, crashes and full memory may end."""

import argparse
import collections
import contextlib
import faulthandler
import importlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from inkdask.errors import InkdaskError
from tests.fuzz import spoil

# Targets, and their share of all inputs.
TARGETS = {
    "checkpoint": 25, "tiff": 34, "words": 11, "provenance": 9, "zarr": 13, "hub": 2, "s3": 3,
    "http": 2, "pictures": 3,
}  # fmt: skip
SECONDS = 10  # for one input
MEMORY = 2 << 30  # bytes for the whole process
OUTCOMES = ("read", "unjudged", "refused", "failed")


def main(arguments=None):
    """Run all targets or one; print the tally, and end with status 1 after a failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", choices=TARGETS, help="one target")
    parser.add_argument("--save", type=Path, default=Path("fuzz-failures"), help="for failures")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        for line in sys.stdin:
            name, first, last = json.loads(line)
            work(name, first, last, given.seed, given.save)
        return
    shares = {given.only: 1} if given.only else TARGETS
    inputs = {name: -(-given.inputs * n // sum(shares.values())) for name, n in shares.items()}
    print("| target | inputs | " + " | ".join(OUTCOMES) + " |\n|---|---|---|---|---|---|")
    tally = run(inputs, given.first, given.seed, given.save)
    whole = sum(tally.values(), collections.Counter())
    show("all", whole)
    if whole["failed"]:
        sys.exit(f"failures are in {given.save}; --only NAME --first NUMBER --inputs 1 repeats one")


def show(name, outcomes):
    """Print a row of the tally."""
    counts = [sum(outcomes.values()), *(outcomes[it] for it in OUTCOMES)]
    print("| " + " | ".join([name, *(f"{count:,}" for count in counts)]) + " |", flush=True)


def run(inputs, first, seed, save):
    """Return the counts of outcomes by target; a child that ends early is started anew."""
    tally = {name: collections.Counter() for name in inputs}
    ahead = [(name, first, first + count) for name, count in inputs.items()]
    while ahead:
        command = [sys.executable, "-m", "tests.fuzz", "--child"]
        command += ["--seed", str(seed), "--save", str(save)]
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
            ) as child,
        ):
            child.stdin.write("".join(f"{json.dumps(work)}\n" for work in ahead))
            child.stdin.close()
            name, _, last = ahead[0]
            at = None
            for line in child.stdout:
                name, at, outcome = json.loads(line)
                while ahead[0][0] != name:
                    ahead.pop(0)
                last = ahead[0][2]
                if outcome:
                    tally[name][outcome] += 1
                    ahead[0] = name, at + 1, last
                    if at + 1 == last:
                        show(name, tally[name])
            if child.wait() == 0:
                break
            said.seek(0)
            trace = said.read().decode(errors="replace")[-20_000:]
            if at is None:
                raise RuntimeError(f"no child starts: {trace}")
            tell(save, name, at, f"ended with status {child.returncode}\n{trace}")
            tally[name]["failed"] += 1
            ahead[0] = name, at + 1, last
            if at + 1 == last:
                show(name, tally[name])
    return tally


def work(name, first, last, seed, save):
    """Try inputs of a target; tell the parent of each before and after."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    logging.disable()
    target = importlib.import_module(f"tests.fuzz.{name}")
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the program prints
    with tempfile.TemporaryDirectory(dir=memory_disk()) as home, target.opened(Path(home)) as read:
        tempfile.tempdir = home
        for at in range(first, last):
            folder = Path(home, "input")
            folder.mkdir()
            print(json.dumps([name, at, ""]), file=out, flush=True)
            seconds = SECONDS * max(1, os.getloadavg()[0])  # where others compute, too
            faulthandler.dump_traceback_later(seconds, exit=True)
            outcome, fault = attempt(read, spoil.random(seed, at), folder)
            faulthandler.cancel_dump_traceback_later()
            if fault:
                tell(save, name, at, fault, folder)
            print(json.dumps([name, at, outcome]), file=out, flush=True)
            shutil.rmtree(folder)
    tempfile.tempdir = None  # the next target of this process has a folder of its own
    os.dup2(out.fileno(), 1)


def attempt(read, rng, folder):
    """Return the outcome of one input, and what is wrong with it."""
    try:
        return read(rng, folder), ""
    except InkdaskError as error:
        fault = faults(error)
        return ("failed", f"{fault}: {error!s}\n{_trace(error)}") if fault else ("refused", "")
    except Exception as error:
        return "failed", _trace(error)


def faults(error):
    """Say what is wrong with a refusal; empty for one plain sentence."""
    text, link = str(error), error
    if not text.endswith(".") or len(text) > 2000:
        return "no short sentence"
    while link is not None:
        if isinstance(link, MemoryError) or "allocate" in str(link):
            return "too much memory"
        link = link.__cause__ or link.__context__
    return ""


def tell(save, name, at, fault, folder=None):
    """Keep what is known of a failure, and its input."""
    place = Path(save, f"{name}-{at}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "fault.txt").write_text(fault, errors="backslashreplace")
    if folder:
        shutil.copytree(folder, place / "input", symlinks=True)
    print(f"{name} {at}: {fault.strip().splitlines()[-1][:300]}", file=sys.stderr)


def memory_disk():
    """Return a folder in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextlib.contextmanager
def environment(**values):
    """Set variables of the environment in a block; None removes one."""
    before = dict(os.environ)
    try:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _trace(error):
    return "".join(traceback.format_exception(error))
