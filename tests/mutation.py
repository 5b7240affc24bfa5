"""Mutants of modules, each with one operator, number or comparison changed, and who notices.

    pip install cosmic-ray
    python -m tests.mutation [--count COUNT] [--minutes MINUTES] [--seed SEED] [MODULE ...]

Cosmic Ray makes the mutants. It would start Python for each of them, which imports torch for
seconds; here each is a fork of a process that has imported all other packages. A place of the code
gets one mutant of each kind of operator, chosen by the seed. The tests of the module alone must
notice it. Those that nobody notices are printed; `tests/MUTATION.md` says why the known ones are
right.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LONGEST = 20  # times the tests of the module itself, before a mutant counts as one that hangs

TESTS = {
    "inkdask.tiling": ["test_tiling.py"],
    "inkdask.blending": ["test_blending.py"],
    "inkdask.identity": ["test_identity.py"],
    "inkdask.plan": ["test_plan.py"],
    "inkdask.reading.tiff": ["test_tiff.py"],
    "inkdask.reading.tiff_header": ["test_tiff.py"],
}


@dataclass(frozen=True)
class Mutant:
    """A module with one change."""

    module: str
    source: str
    change: str


def mutants(module: str, seed: int) -> Iterator[Mutant]:
    """Make the mutants of a module, without those that change annotations alone."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    path = ROOT / f"{module.replace('.', '/')}.py"
    source, provider = path.read_text(), OperatorProvider()
    places: dict[tuple[str, Any], list[tuple[Any, int]]] = {}
    for name in provider:
        if provider[name].arguments() or name == "RemoveDecorator":
            continue
        operator = provider[name]()
        found = [
            at for node in ast_nodes(get_ast(source)) for at in operator.mutation_positions(node)
        ]
        family = name.partition("_")[0]
        for occurrence, at in enumerate(found):
            places.setdefault((family, at), []).append((operator, occurrence))
    rng, behaviour = random.Random(f"{seed} {module}"), without_annotations(source)
    for (_, ((line, _), _)), choices in sorted(places.items(), key=lambda it: it[0][1]):
        mutated = mutate_code(source, *rng.choice(choices))
        with suppress(SyntaxError):
            if mutated and without_annotations(mutated) != behaviour:
                yield Mutant(
                    module,
                    mutated,
                    f"{path.relative_to(ROOT)}:{line} {difference(source, mutated)}",
                )


def without_annotations(source: str) -> str:
    """Return what a module does, in the words of its syntax tree."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if hasattr(node, name):
                setattr(node, name, None)
    return ast.dump(tree)


def difference(source: str, mutated: str) -> str:
    """Return the changed line, before and after."""
    lines = difflib.ndiff(source.splitlines(), mutated.splitlines())
    changed = [line[2:].strip() for line in lines if line[:2] in ("- ", "+ ")]
    return " -> ".join(f"`{line}`" for line in changed)


def preload(tests: list[str]) -> None:
    """Import all that the tests import, but neither inkdask nor the tests themselves."""
    names = [f"tests.{name.removesuffix('.py')}" for name in tests]
    code = f"import sys, pytest, {', '.join(names)}; print(*sys.modules)"
    said = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    for name in said.split():
        if not re.match(r"(inkdask|tests|_?pytest|_hypothesis|__)\b", name):
            with suppress(Exception):
                import_module(name)


class Finder:
    """Import one module from another source."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source

    def find_spec(self, name: str, *_: Any) -> Any:
        if name != self.name:
            return None
        path = str(ROOT / f"{name.replace('.', '/')}.py")
        loader = SourceFileLoader(name, path)
        loader.get_code = lambda _: compile(self.source, path, "exec", dont_inherit=True)  # type: ignore[method-assign]
        return spec_from_file_location(name, path, loader=loader)


def is_noticed(mutant: Mutant, tests: list[str], seconds: float) -> bool:
    """Run the tests on a mutant in a fork; one that hangs is noticed, too."""
    child = os.fork()
    if not child:
        code = 9
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.meta_path.insert(0, Finder(mutant.module, mutant.source))
            code = run_tests(tests)
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status != 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return True


def run_tests(tests: list[str]) -> int:
    """Return the exit status of pytest, which stops at the first failure."""
    import pytest
    from hypothesis import Phase, settings

    phases = [Phase.explicit, Phase.generate]  # no time for a smaller example
    settings.register_profile(
        "mutation", derandomize=True, database=None, deadline=None, phases=phases
    )
    settings.load_profile("mutation")
    files = [str(ROOT / "tests" / name) for name in tests]
    # In this process, because others do not have the mutant.
    return int(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *files]))


def main() -> None:
    """Print how many mutants each module has, and those that survive."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="such as inkdask.tiling")
    parser.add_argument("--count", type=int, default=1_000_000, help="most of a module, by chance")
    parser.add_argument("--minutes", type=float, default=1e6, help="most for a module")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows, survivors = [], []
    for module in given.modules or TESTS:
        preload(TESTS[module])
        every = list(mutants(module, given.seed))
        some = random.Random(given.seed).sample(every, min(given.count, len(every)))
        original = Mutant(module, (ROOT / f"{module.replace('.', '/')}.py").read_text(), "")
        if not is_noticed(replace(original, source="raise ImportError"), TESTS[module], 3600):
            sys.exit(f"the tests of {module} do not notice that it is gone")
        start = time.monotonic()
        if is_noticed(original, TESTS[module], 3600):
            sys.exit(f"the tests of {module} fail without a mutation")
        seconds, left, tried = LONGEST * (time.monotonic() - start) + 60, 0, 0
        for mutant in some:
            if time.monotonic() > start + 60 * given.minutes:
                break
            tried += 1
            if not is_noticed(mutant, TESTS[module], seconds):
                left += 1
                survivors.append(mutant.change)
                print(f"{tried}/{len(some)} {mutant.change}", file=sys.stderr, flush=True)
        rows.append(f"| {module} | {len(every)} | {tried} | {left} |")
        print(rows[-1], file=sys.stderr, flush=True)
    print("| module | mutants | tried | not noticed |\n|---|---|---|---|", *rows, "", sep="\n")
    print(*(f"- {change}" for change in survivors), sep="\n")


if __name__ == "__main__":
    main()
