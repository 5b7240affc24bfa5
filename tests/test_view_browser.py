"""The notebooks in a real browser, driven as a person would; screenshots go to build/browser/.

Needs the ``browser`` extra and Chromium (``CHROMIUM``, or one on the path); skipped without.
"""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

import inkdask
from tests.conftest import free_port, start_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("browser")]

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "build" / "browser"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
TOKEN = "a-token-for-this-test"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """URL of a JupyterLab, and the folder it serves."""
    pytest.importorskip("jupyterlab")
    folder, port = tmp_path_factory.mktemp("lab"), free_port()
    for notebook in (ROOT / "examples").glob("*.ipynb"):
        shutil.copy(notebook, folder)
    settings = {  # cells out of sight are drawn too, so that a test finds them; and nothing asks
        "notebook-extension/tracker": '{"windowingMode": "none"}',
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    }
    for name, text in settings.items():
        place = folder / f".settings/@jupyterlab/{name}.jupyterlab-settings"
        place.parent.mkdir(parents=True)
        place.write_text(text)
    own = {
        "PYTHONPATH": str(ROOT),
        "COMPILE": "0",
        "JUPYTER_CONFIG_DIR": str(folder / ".config"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".workspaces"),
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        process = start_server(
            "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
            f"--port={port}", f"--ServerApp.token={TOKEN}", f"--ServerApp.root_dir={folder}",
            port=port,
        )  # fmt: skip
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    yield f"http://127.0.0.1:{port}", folder
    stop = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/shutdown?token={TOKEN}", method="POST"
    )
    urllib.request.urlopen(stop).close()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(45_000)
    page.outside, page.errors = [], []
    local = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")
    page.on("request", lambda r: r.url.startswith(local) or page.outside.append(r.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    screenshot(page, "last")
    page.close()


def open_notebook(page, url, name):
    page.goto(f"{url}/doc/tree/{name}?token={TOKEN}&reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell")

    def has_kernel():
        sessions = page.request.get(f"{url}/api/sessions?token={TOKEN}").json()
        states = [s["kernel"]["execution_state"] for s in sessions if s["path"].startswith(name)]
        return states == ["idle"]

    until(page, has_kernel, "the kernel starts")
    page.wait_for_timeout(2000)  # until the page knows


def run_all(page):
    page.get_by_role("menuitem", name="Run").click()
    page.locator(".lm-Menu-item", has_text="Run All Cells").first.click()


def output_of(page, cell):
    return page.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".jp-OutputArea").first


def picture(canvas):
    """What a canvas shows: uint8 (y, x, 4)."""
    data = canvas.evaluate("canvas => canvas.toDataURL()").split(",")[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


def inked(shown):
    """Share of pixels as orange as ink."""
    red, green, blue = np.moveaxis(shown[..., :3].astype(int), -1, 0)
    return float(((red - blue > 60) & (red > green)).mean())


def until(page, holds, what, seconds=60):
    for _ in range(seconds * 5):
        if holds():
            return
        page.wait_for_timeout(200)
    raise AssertionError(f"{what}: not within {seconds} s")


def handle(area, number):
    return area.locator(".noUi-handle").nth(number)


def press(page, slider, key, times=1):
    slider.focus()
    for _ in range(times):
        page.keyboard.press(key)
    page.wait_for_timeout(1200)


def screenshot(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def test_explore_notebook_shows_layers_ink_and_a_box(page, lab):
    url, folder = lab
    open_notebook(page, url, "explore.ipynb")
    run_all(page)
    page.wait_for_function(
        "document.querySelectorAll('.inkdask-viewer canvas').length == 2", timeout=180_000
    )

    # Layers: the slider, the contrast, and the value under the cursor.
    layers = output_of(page, 5)
    layers.scroll_into_view_if_needed()
    canvas = layers.locator("canvas")
    until(page, lambda: picture(canvas)[..., 0].std() > 20, "the layer is drawn", 180)
    assert not layers.locator(".inkdask-static").is_visible()
    first = picture(canvas)
    press(page, handle(layers, 0), "ArrowRight", 6)
    assert "19" in layers.locator(".widget-readout").first.inner_text()
    other = picture(canvas)
    assert np.abs(other.astype(int) - first).mean() > 3
    press(page, handle(layers, 1), "ArrowRight", 40)  # what is black: more
    assert picture(canvas)[..., :3].mean() < other[..., :3].mean() - 3
    screenshot(page, "layers")

    # The prediction: live, and what the opacity does.
    viewer = output_of(page, 9)
    viewer.scroll_into_view_if_needed()
    canvas = viewer.locator("canvas")
    status = viewer.locator(".inkdask-status")
    until(page, lambda: "All 8 chunks computed" in status.inner_text(), "the map is computed", 120)
    until(page, lambda: inked(picture(canvas)) > 0.02, "ink is drawn")
    screenshot(page, "ink")
    press(page, handle(viewer, 3), "Home")  # opacity 0
    assert inked(picture(canvas)) < 0.001
    press(page, handle(viewer, 3), "End")

    # Values: zoomed to full resolution, they are those of the files and of the map.
    frame = canvas.bounding_box()
    x, y = frame["x"] + 0.45 * frame["width"], frame["y"] + 0.5 * frame["height"]
    page.mouse.move(x, y)
    for _ in range(8):
        page.mouse.wheel(0, -300)
        page.wait_for_timeout(100)
    page.mouse.down()
    page.mouse.move(x + 60, y + 20, steps=4)
    page.mouse.up()
    cursor = viewer.locator(".inkdask-cursor")
    exact = re.compile(r"y (\d+)  x (\d+) +layer (\d+) (\d+) +ink (\d\.\d+)")
    until(page, lambda: exact.search(cursor.inner_text()), "exact values")
    row, column, number, grey, value = exact.search(cursor.inner_text()).groups()
    segment = inkdask.open_segment(str(folder / "inkdask-demo"))
    at = int(row), int(column)
    assert int(segment.volume[(int(number), *at)].compute()) == int(grey)
    ink = inkdask.predict(segment, model="demo", stride=32, chunk_size=256)
    assert float(ink.map[at].compute()) == pytest.approx(float(value), abs=0.02)
    screenshot(page, "zoomed")

    # A box: drawn, told to the kernel, and used by the next cell.
    page.mouse.dblclick(x, y)
    viewer.get_by_role("button", name="Draw a box").click()
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 150, y + 60, steps=5)
    page.mouse.up()
    page.wait_for_timeout(500)
    screenshot(page, "box")
    cell = page.locator(".jp-Notebook .jp-Cell").nth(11)
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    size = re.compile(r"(\d+) x (\d+) pixels, mean ink")
    until(
        page,
        lambda: (
            (m := size.search(output_of(page, 11).inner_text())) and m.groups() != ("384", "512")
        ),
        "the box reaches the kernel",
    )
    height, width = map(int, size.search(output_of(page, 11).inner_text()).groups())
    assert width / height == pytest.approx(150 / 60, rel=0.1)

    viewer.get_by_role("button", name="Beside").click()
    until(page, lambda: viewer.locator("canvas").count() == 2, "two panels")
    right = viewer.locator("canvas").nth(1)
    until(page, lambda: picture(right)[..., 0].std() > 20, "ink beside the papyrus")
    screenshot(page, "beside")
    assert page.outside == []
    assert page.errors == []

    # Saved, and opened where no kernel knows its widgets: the pictures are still there.
    page.keyboard.press("Escape")
    page.keyboard.press("Control+s")
    until(page, lambda: "inkdask-static" in (folder / "explore.ipynb").read_text(), "it is saved")
    saved = folder / "saved.ipynb"
    shutil.copy(folder / "explore.ipynb", saved)
    assert saved.stat().st_size < 1_000_000
    open_notebook(page, url, "saved.ipynb")
    still = page.locator(".inkdask-static img").first
    still.wait_for()
    assert still.is_visible()
    assert still.evaluate("image => image.naturalWidth") == 360
    screenshot(page, "without-kernel")


TOOLS = """import inkdask
from pathlib import Path
from inkdask.demo import synthetic
synthetic.write_segment(Path("tools"), text=("ΑΦΟΒΟΝ",), height=200, width=500)
part = inkdask.open_segment("tools").crop(slice(10, 190), slice(20, 480))
ink = inkdask.predict(part, model="demo", stride=32, chunk_size=256, pixel_resolution_um=7.91)
viewer = ink.show()
viewer"""


def shown_by(page, lab, name, code):
    """The viewer that the code of a new notebook shows, once all is computed."""
    url, folder = lab
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / f"{name}.ipynb")
    open_notebook(page, url, f"{name}.ipynb")
    run_all(page)
    viewer = output_of(page, 0)
    viewer.locator("canvas").first.wait_for(timeout=180_000)
    status = viewer.locator(".inkdask-status")
    until(page, lambda: re.search("All|The only", status.inner_text()), "the map is computed", 120)
    return viewer


def test_viewer_has_the_tools_of_map_viewers(page, lab):
    viewer = shown_by(page, lab, "tools", TOOLS)
    canvas = viewer.locator("canvas")
    until(page, lambda: inked(picture(canvas)) > 0.02, "ink is drawn")

    def tool(name):
        return viewer.get_by_role("button", name=name)

    # Tools in one row; two where the window is narrow, and the picture fits again.
    tools = viewer.locator(".inkdask-tools")
    for width, rows in ((1400, 1), (1000, 1), (700, 2)):
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(1000)
        groups = viewer.locator(".inkdask-group")
        tops = {round(groups.nth(i).bounding_box()["y"]) for i in range(groups.count())}
        assert len(tops) == rows
        for control in groups.locator("> *").all():  # nothing is cut off or overlaps
            box, around = control.bounding_box(), tools.bounding_box()
            assert box["x"] + box["width"] <= around["x"] + around["width"] + 1
            assert control.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
        shown = picture(canvas)[..., :3].max(axis=2) > 60
        assert shown[:, : shown.shape[1] // 10].any()  # all of it: its left end
        assert shown[:, -shown.shape[1] // 5 :].any()  # and its right end
        screenshot(page, f"tools-{width}")
    page.set_viewport_size({"width": 1400, "height": 1000})
    page.wait_for_timeout(1000)

    # A hint until the first gesture; zoom and home.
    assert viewer.locator(".inkdask-hint").is_visible()
    whole = picture(canvas)
    tool("Zoom in").click()
    page.wait_for_timeout(1000)
    assert viewer.locator(".inkdask-hint").count() == 0
    assert np.abs(picture(canvas).astype(int) - whole).mean() > 5
    tool("Show all").click()
    page.wait_for_timeout(1000)
    assert np.abs(picture(canvas).astype(int) - whole).mean() < 1

    # Threshold and colour.
    threshold = handle(viewer, 4)
    press(page, threshold, "End")
    assert inked(picture(canvas)) < 0.002
    press(page, threshold, "Home")
    viewer.locator("input[type=color]").fill("#2060ff")
    until(page, lambda: inked(picture(canvas)) < 0.002, "the ink is blue")
    blue = picture(canvas).astype(int)
    assert ((blue[..., 2] - blue[..., 0]) > 60).mean() > 0.02

    # The box as text, in pixels of the whole segment, and its removal.
    frame = canvas.bounding_box()
    x, y = frame["x"] + 0.5 * frame["width"], frame["y"] + 0.5 * frame["height"]
    page.keyboard.down("Shift")
    page.mouse.move(x - 50, y - 30)
    page.mouse.down()
    page.mouse.move(x + 50, y + 30, steps=4)
    page.mouse.up()
    page.keyboard.up("Shift")
    words = viewer.locator(".inkdask-roi")
    x0, y0, x1, y1 = map(int, re.fullmatch("--roi-xyxy (.*)", words.inner_text())[1].split(","))
    assert (x0 + x1) / 2 == pytest.approx(20 + 230, abs=3)
    assert (y0 + y1) / 2 == pytest.approx(10 + 90, abs=3)
    screenshot(page, "tools-box")
    tool("Remove the box").click()
    until(page, lambda: not words.is_visible(), "the box is gone")

    # The picture as a file, and full screen.
    with page.expect_download() as download:
        tool("Save as PNG").click()
    with Image.open(download.value.path()) as saved:
        assert saved.width >= frame["width"]
        assert np.asarray(saved.convert("RGB")).std() > 20
    assert download.value.suggested_filename == "tools_demo.png"
    tool("Full screen").click()
    until(page, lambda: canvas.bounding_box()["height"] > 800, "it fills the screen")
    screenshot(page, "full-screen")
    tool("Full screen").click()
    until(page, lambda: canvas.bounding_box()["height"] < 500, "it is small again")
    assert page.outside == []
    assert page.errors == []


def test_spread_of_opinions_is_a_panel_with_values_of_its_own(page, lab):
    viewer = shown_by(page, lab, "spread", TOOLS.replace("show()", "show(spread=True)"))
    ink, spread = (viewer.locator("canvas").nth(i) for i in range(2))
    until(page, lambda: inked(picture(ink)) > 0.02, "ink is drawn")
    until(page, lambda: picture(spread)[..., 0].std() > 5, "the spread is drawn")
    assert inked(picture(spread)) < 0.001  # it is white on black
    segment = inkdask.open_segment(str(lab[1] / "tools")).crop(slice(10, 190), slice(20, 480))
    expected = inkdask.predict(segment, model="demo", stride=32, chunk_size=256).spread.compute()
    frame, (height, width) = spread.bounding_box(), expected.shape
    y, x = np.unravel_index(expected.argmax(), expected.shape)
    scale = min(frame["width"] / width, frame["height"] / height)
    page.mouse.move(
        frame["x"] + frame["width"] / 2 + (x + 0.5 - width / 2) * scale,
        frame["y"] + frame["height"] / 2 + (y + 0.5 - height / 2) * scale,
    )
    for _ in range(8):
        page.mouse.wheel(0, -300)
        page.wait_for_timeout(100)
    cursor = viewer.locator(".inkdask-cursor").nth(1)
    exact = re.compile(r"y (\d+)  x (\d+) +spread (\d\.\d+)")
    until(page, lambda: exact.search(cursor.inner_text()), "exact values")
    row, column, value = exact.search(cursor.inner_text()).groups()
    screenshot(page, "spread")
    assert float(value) == pytest.approx(expected[int(row), int(column)], abs=0.008)
    assert float(value) > 0.05
    assert page.outside == []
    assert page.errors == []


def test_compare_notebook_zooms_all_panels(page, lab):
    url, _ = lab
    open_notebook(page, url, "compare.ipynb")
    run_all(page)
    viewer = output_of(page, 4)
    page.wait_for_function(
        "document.querySelectorAll('.inkdask-viewer canvas').length == 4", timeout=180_000
    )
    viewer.scroll_into_view_if_needed()
    panels = [viewer.locator("canvas").nth(i) for i in range(4)]
    until(page, lambda: viewer.locator(".inkdask-status").inner_text() == "All 24 chunks computed.",
          "all four are computed", 180)  # fmt: skip
    until(page, lambda: all(picture(p)[..., 0].std() > 5 for p in panels), "all are drawn")
    page.wait_for_timeout(1000)
    screenshot(page, "compare")
    before = [picture(panel) for panel in panels]
    panels[2].hover()
    page.mouse.wheel(0, -600)
    page.wait_for_timeout(1500)
    for panel, shown in zip(panels, before, strict=True):  # one is zoomed, and all follow
        assert np.abs(picture(panel).astype(int) - shown).mean() > 1
    assert page.outside == []
    assert page.errors == []


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-m", "slow"]))
