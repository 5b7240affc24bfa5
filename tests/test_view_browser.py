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
    page.wait_for_function("document.querySelectorAll('.inkdask-viewer canvas').length == 2")

    # Layers: the slider, the contrast, and the value under the cursor.
    layers = output_of(page, 5)
    layers.scroll_into_view_if_needed()
    canvas = layers.locator("canvas")
    until(page, lambda: picture(canvas)[..., 0].std() > 20, "the layer is drawn")
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
    viewer = output_of(page, 7)
    viewer.scroll_into_view_if_needed()
    canvas = viewer.locator("canvas")
    status = viewer.locator(".inkdask-status")
    until(page, lambda: "8 of 8 chunks computed" in status.inner_text(), "the map is computed", 120)
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
    cell = page.locator(".jp-Notebook .jp-Cell").nth(9)
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    size = re.compile(r"(\d+) x (\d+) pixels, mean ink")
    until(
        page,
        lambda: (
            (m := size.search(output_of(page, 9).inner_text())) and m.groups() != ("128", "128")
        ),
        "the box reaches the kernel",
    )
    height, width = map(int, size.search(output_of(page, 9).inner_text()).groups())
    assert width / height == pytest.approx(150 / 60, rel=0.1)

    viewer.get_by_role("button", name="beside").click()
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


def test_compare_notebook_zooms_all_panels(page, lab):
    url, _ = lab
    open_notebook(page, url, "compare.ipynb")
    run_all(page)
    viewer = output_of(page, 4)
    page.wait_for_function("document.querySelectorAll('.inkdask-viewer canvas').length == 4")
    viewer.scroll_into_view_if_needed()
    panels = [viewer.locator("canvas").nth(i) for i in range(4)]
    until(page, lambda: viewer.locator(".inkdask-status").inner_text() == "8 of 8 chunks computed",
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
