"""How the modules stand on each other: no circles, not even of types or inside functions."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import inkdask

HOUSE = Path(inkdask.__file__).parent


def modules():
    """Each module's name and file."""
    for file in HOUSE.rglob("*.py"):
        parts = ["inkdask", *file.relative_to(HOUSE).with_suffix("").parts]
        yield ".".join(part for part in parts if part != "__init__"), file


def imported(file, names):
    """The modules that a file names in its imports, wherever they are."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in names else node.module


def test_no_import_goes_in_a_circle():
    files = dict(modules())
    graph = {name: {*imported(file, files)} - {name} for name, file in files.items()}
    assert len(graph) > 50
    assert sum(map(len, graph.values())) > 200
    order = list(TopologicalSorter(graph).static_order())  # raises a CycleError that names it
    assert order.index("inkdask.specs") < order.index("inkdask.workflow")
