"""Test the structure of the package: imports, and sizes of files and functions."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import inkdask

HOUSE = Path(inkdask.__file__).parent
LONG_FILES = {"settings.py", "viewer.js"}  # tables of parameters, and one script for the browser


def modules():
    """Yield each module's name and file."""
    for file in HOUSE.rglob("*.py"):
        parts = ["inkdask", *file.relative_to(HOUSE).with_suffix("").parts]
        yield ".".join(part for part in parts if part != "__init__"), file


def imported(file, names):
    """Yield the modules that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in names else node.module


@pytest.fixture(scope="module")
def graph():
    """Modules that each module imports, by name."""
    files = dict(modules())
    found = {name: {*imported(file, files)} - {name} for name, file in files.items()}
    assert len(found) > 50
    assert sum(map(len, found.values())) > 200
    return found


def reached(graph, start):
    """Modules that a module imports, directly or through others."""
    seen, ahead = set(), [start]
    while ahead:
        new = graph[ahead.pop()] - seen
        seen |= new
        ahead += new
    return seen


def test_imports_form_no_circle(graph):
    order = list(TopologicalSorter(graph).static_order())  # raises a CycleError that names it
    assert order.index("inkdask.specs") < order.index("inkdask.workflow")


def test_store_does_not_reach_networks(graph):
    """Pictures are made of a stored grid without torch and without a model."""
    networks = ("inkdask.inference", "inkdask.predictor", "inkdask.models")
    assert {name for name in reached(graph, "inkdask.workflow") if name.startswith(networks)}
    assert not {name for name in reached(graph, "inkdask.store") if name.startswith(networks)}


def test_files_have_at_most_400_lines():
    files = [file for ending in ("py", "js", "css") for file in HOUSE.rglob(f"*.{ending}")]
    lines = {file.name: len(file.read_text().splitlines()) for file in files}
    assert {name for name, count in lines.items() if count > 400} <= LONG_FILES


def test_functions_have_at_most_60_lines():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    sizes = {
        f"{name}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for name, file in modules()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, functions)
    }
    assert len(sizes) > 500
    assert {name: size for name, size in sizes.items() if size > 60} == {}
