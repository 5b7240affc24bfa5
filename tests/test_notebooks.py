"""The notebooks in examples/ run as they are, and are committed without what they put out."""

import base64
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import tifffile
import torch
from nbclient import NotebookClient
from PIL import Image

from inkdask.demo import synthetic
from inkdask.models.networks import BUILDERS
from tests.upstream import hecate_file, hybrid_file, of_hecate, state_of, volume

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


def of_own_segment(place):
    """The notebook explore as a reader changes it: a larger segment of more layers, off-centre."""
    synthetic.write_segment(place, text=("ΑΦΟΒΟΝ",), layers=30, height=200, width=400)
    for file in (place / "layers").iterdir():
        tifffile.imwrite(file, np.pad(tifffile.imread(file), ((800, 300), (900, 100))))
    notebook = read("explore.ipynb")
    changed = [cell for cell in notebook.cells if 'path = ""' in cell.source]
    assert len(changed) == 1
    changed[0].source = changed[0].source.replace('path = ""', f"path = {str(place)!r}")
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebooks after they ran, and the folder of each, by name: one kernel runs them all."""
    root = tmp_path_factory.mktemp("notebooks")
    notebooks = {name: read(name) for name in NOTEBOOKS}
    notebooks["own"] = of_own_segment(root / "segment")
    together, folders = nbformat.v4.new_notebook(), {name: root / name for name in notebooks}
    for name, notebook in notebooks.items():
        afresh = AFRESH.format(name=str(folders[name]))
        together.cells += [nbformat.v4.new_code_cell(afresh), *notebook.cells]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(EXAMPLES.parent))
        patch.setenv("COMPILE", "0")  # seconds of work do not repay it
        patch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other spin
        NotebookClient(together, timeout=120, kernel_name="python3").execute()
    return notebooks, folders


@pytest.fixture(scope="module")
def of_today(tmp_path_factory):
    """The end of the notebook compare, on a small segment with checkpoints of made-up weights."""
    folder = tmp_path_factory.mktemp("of_today")
    for number, layer in enumerate(volume("hecate_9.6um-map", (21, 80, 100), (0, 30, 0, 37))):
        place = folder / "9.6um" / "layers" / f"{number:02d}.tif"
        place.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(place, layer)
    files = {
        "hecate-9.6um": ("ink_hecate_9_6um", of_hecate, lambda state: hecate_file(state, False)),
        "ink-9um": ("ink_hybrid_3d2d", str, hybrid_file),
    }
    notebook = read("compare.ipynb")
    notebook.cells[1:-1] = [nbformat.v4.new_code_cell("import inkdask; from inkdask.view import *")]
    cell = notebook.cells[-1]
    changes = {'published = ""': f"published = {str(folder / '9.6um')!r}"}
    for key, (architecture, names, file) in files.items():
        with torch.device("meta"):
            module = BUILDERS[architecture]()
        torch.save(file(state_of(module, names)), folder / f"{key}.pth")
        changes[f'"{key}"'] = repr(str(folder / f"{key}.pth"))
    for words, others in changes.items():
        assert words in cell.source
        cell.source = cell.source.replace(words, others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(EXAMPLES.parent))
        patch.setenv("ZARR_OUTPUT_DIR", str(folder / "grids"))
        NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    return notebook


def said(notebook):
    """All text that the cells printed or showed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(
        output.get("text", "") + str(output.get("data", {}).get("text/html", ""))
        for output in outputs
    )


def test_examples_are_the_five_notebooks():
    names = ["cluster", "compare", "evidence", "explore", "gpu"]
    assert [f"{name}.ipynb" for name in names] == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_without_outputs(name):
    for cell in read(name).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def shown(notebook):
    """All that cells showed, by type of data."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data for output in outputs if "data" in output]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "part"),
    [("explore.ipynb", "1,024 x 384", "384 x 512"), ("own", "1,400 x 1,300", "512 x 512")],
)
def test_explore_shows_ink_after_it_ran(executed, name, size, part):
    notebook = executed[0][name]
    text, shows = said(notebook), shown(notebook)
    assert f"{size} pixels" in text
    assert f"{part} pixels, mean ink" in text
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shows)
    # Where no kernel lives, each viewer leaves a picture.
    stills = [data["text/html"] for data in shows if "inkdask-static" in str(data.get("text/html"))]
    assert len(stills) == 2
    (_, still) = stills
    data = re.search("data:image/jpeg;base64,([^']+)'", still)[1]
    red, _, blue = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").split()
    orange = np.asarray(red).astype(int) - np.asarray(blue) > 60
    assert orange.mean() > 0.002  # ink was there when the viewer was shown
    (picture,) = [data["image/png"] for data in shows if "image/png" in data]
    values = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
    assert (values > 127).mean() > 0.01
    assert len(nbformat.writes(notebook)) < 1_000_000


@pytest.mark.slow
def test_gpu_tells_the_pace_and_writes_the_picture(executed):
    notebooks, folders = executed
    assert "tiles/s here" in said(notebooks["gpu.ipynb"])
    predictions = folders["gpu.ipynb"] / "inkdask-demo/predictions"
    assert (predictions / "prediction_demo_00_26.png").exists()


@pytest.mark.slow
def test_cluster_writes_the_picture(executed):
    predictions = executed[1]["cluster.ipynb"] / "inkdask-demo/predictions"
    assert (predictions / "prediction_demo_00_26.png").exists()


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compare_shows_two_networks_of_today(of_today):
    (still,) = [data["text/html"] for data in shown(of_today) if "text/html" in data]
    assert "hecate" in still
    assert "hybrid" in still
    for data in re.findall("data:image/jpeg;base64,([^']+)'", still):
        values = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert values.std() > 1


@pytest.mark.slow
def test_evidence_finds_the_right_variant_of_ten_and_writes_the_page(executed):
    notebooks, folders = executed
    text = said(notebooks["evidence.ipynb"])
    rows = [line.split() for line in text.splitlines() if line.startswith("demo ")]
    assert len(rows) == 10
    (best,) = [row for row in rows if row[-1] == "<"]
    assert best[1:4] == ["forward", "+0", "26:52"]
    assert float(best[-2]) >= 0.98
    assert max(float(row[-1]) for row in rows if row is not best) < 0.70
    assert "Suggested, because its AUC" in text
    predictions = folders["evidence.ipynb"] / "inkdask-demo/predictions"
    assert (predictions / "prediction_demo_26_52_evidence.html").exists()
