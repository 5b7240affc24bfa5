"""The notebooks in examples/ run as they are, and are committed without what they put out."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
# The folder and the names of a kernel that has just started. Plain %reset stops Dask's workers from
# starting, because it takes the attributes of `__main__` too.
AFRESH = """import os
os.makedirs({name!r})
os.chdir({name!r})
%reset_selective -f ^(?!get_ipython)[a-z]"""


def read(name):
    return nbformat.read(EXAMPLES / name, as_version=4)


pytestmark = pytest.mark.xdist_group("notebooks")  # whose fixture takes long


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebooks after they ran, and the folder of each, by name: one kernel runs them all."""
    root = tmp_path_factory.mktemp("notebooks")
    notebooks = {name: read(name) for name in NOTEBOOKS}
    together, folders = nbformat.v4.new_notebook(), {name: root / name for name in NOTEBOOKS}
    for name, notebook in notebooks.items():
        afresh = AFRESH.format(name=str(folders[name]))
        together.cells += [nbformat.v4.new_code_cell(afresh), *notebook.cells]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(EXAMPLES.parent))
        patch.setenv("COMPILE", "0")  # seconds of work do not repay it
        patch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other spin
        NotebookClient(together, timeout=120, kernel_name="python3").execute()
    return notebooks, folders


def said(notebook):
    """All text that the cells printed or showed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(
        output.get("text", "") + str(output.get("data", {}).get("text/html", ""))
        for output in outputs
    )


def test_examples_are_the_four_notebooks():
    assert NOTEBOOKS == ["cluster.ipynb", "compare.ipynb", "explore.ipynb", "gpu.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_without_outputs(name):
    for cell in read(name).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_explore_shows_segment_and_prediction(executed):
    notebook = executed[0]["explore.ipynb"]
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


def test_gpu_tells_the_pace_and_writes_the_picture(executed):
    notebooks, folders = executed
    assert "tiles/s here" in said(notebooks["gpu.ipynb"])
    predictions = folders["gpu.ipynb"] / "inkdask-demo/predictions"
    assert (predictions / "prediction_demo_00_26.png").exists()


def test_cluster_writes_the_picture(executed):
    predictions = executed[1]["cluster.ipynb"] / "inkdask-demo/predictions"
    assert (predictions / "prediction_demo_00_26.png").exists()


def test_compare_scores_the_predictions(executed):
    scores = {
        line.split("AUC")[0].strip(): float(line.split("AUC")[1])
        for line in said(executed[0]["compare.ipynb"]).splitlines()
        if "AUC" in line
    }
    assert scores["demo network"] > 0.9
    assert scores["Gaussian window"] > 0.9
    assert scores["layers reversed"] < 0.5
    assert 0.4 < scores["brightness alone"] < 0.6
