"""The notebooks in examples/ run as they are, and are committed without what they put out."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Executes a notebook in an empty folder, with nothing set."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("COMPILE", "0")  # seconds of work do not repay it

    def execute(name):
        notebook = nbformat.read(EXAMPLES / name, as_version=4)
        client = NotebookClient(
            notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
        )
        return client.execute()

    return execute


def said(notebook):
    """All text that the cells printed or showed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(
        output.get("text", "") + str(output.get("data", {}).get("text/html", ""))
        for output in outputs
    )


def test_they_are_the_four():
    assert NOTEBOOKS == ["cluster.ipynb", "compare.ipynb", "explore.ipynb", "gpu.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_without_outputs(name):
    for cell in nbformat.read(EXAMPLES / name, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_explore(run):
    notebook = run("explore.ipynb")
    text = said(notebook)
    assert "384 x 1,024 pixels" in text
    assert "128 x 128 pixels, mean ink" in text
    shows = [
        output.data
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "data" in output
    ]
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shows)
    # Where no kernel lives, each viewer leaves a picture.
    stills = [data["text/html"] for data in shows if "inkdask-static" in str(data.get("text/html"))]
    assert len(stills) == 2
    assert all("data:image/jpeg;base64," in still for still in stills)
    assert len(nbformat.writes(notebook)) < 500_000


def test_gpu(run, tmp_path):
    assert "tiles/s here" in said(run("gpu.ipynb"))
    assert (tmp_path / "inkdask-demo/predictions/prediction_demo_00_26.png").exists()


def test_cluster(run, tmp_path):
    run("cluster.ipynb")
    assert (tmp_path / "inkdask-demo/predictions/prediction_demo_00_26.png").exists()


def test_compare(run):
    scores = {
        line.split("AUC")[0].strip(): float(line.split("AUC")[1])
        for line in said(run("compare.ipynb")).splitlines()
        if "AUC" in line
    }
    assert scores["demo network"] > 0.9
    assert scores["Gaussian window"] > 0.9
    assert scores["layers reversed"] < 0.5
    assert 0.4 < scores["brightness alone"] < 0.6
