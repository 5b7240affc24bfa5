"""Runs that survive: processes that are killed, parts in any order, and grids made into pictures.

Everything here runs in real processes. A run is disturbed when its store shows enough progress,
never after some time.
"""

import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inkdask
from inkdask import engine, storage
from inkdask.settings import parameters
from inkdask.store import GridStore
from inkdask.types import InkdaskError
from tests.files import write_layers
from tests.oracle import papyrus

LAYERS, HEIGHT, WIDTH = 5, 700, 1300  # 5 x 10 chunks
REPOSITORY = Path(__file__).parent.parent

# What runs in a process of its own; the network counts its tiles, and can be slow.
SCRIPT = """
import os, sys, time
import torch
import inkdask

def network(x):
    with open(os.environ["TILES_LOG"], "a") as log:
        log.write(f"{len(x)}\\n")
    time.sleep(len(x) * float(os.environ.get("SECONDS_A_TILE", 0)))
    return 300 * torch.nn.functional.adaptive_avg_pool2d(x[:, :, -1] - x[:, :, 0], 4)

if __name__ == "__main__":
    inkdask.run(model=network)
"""


def network(x):
    """Logits from the first and last layer: (b, 1, 4, 4); slow, so that it can be disturbed."""
    time.sleep(0.002 * len(x))
    return 300 * torch.nn.functional.adaptive_avg_pool2d(x[:, :, -1] - x[:, :, 0], 4)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    for _, variable, _ in parameters():
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("ZARR_OUTPUT_DIR", str(tmp_path / "partitions"))
    monkeypatch.setenv("RESULT_FILE", str(tmp_path / "result.txt"))
    monkeypatch.setenv("CHUNK_SIZE", "128")
    monkeypatch.setenv("BATCH_SIZE", "8")
    monkeypatch.setenv("TILES_LOG", str(tmp_path / "tiles.log"))
    monkeypatch.setattr(engine, "PAUSE", 0.01)


@pytest.fixture(scope="module")
def volume():
    return papyrus((LAYERS, HEIGHT, WIDTH))


@pytest.fixture
def segment(tmp_path, volume):
    """Layers in tiles of 128 pixels."""
    folder = tmp_path / "segment"
    write_layers(folder / "layers", volume, tile=(128, 128), compression="deflate")
    return str(folder)


@pytest.fixture
def script(tmp_path, segment, monkeypatch):
    """The path of `SCRIPT`, and the environment that makes it run the segment."""
    monkeypatch.setenv("S3_PATH", segment)
    path = tmp_path / "job.py"
    path.write_text(SCRIPT)
    return path


def read_picture(uri):
    with Image.open(io.BytesIO(storage.read_bytes(uri))) as image:
        return np.asarray(image)


def start(script, **environment):
    return subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    return said


def grids(folder):
    """The stores in a folder."""
    entries = storage.list_folder(folder) if storage.exists(folder) else []
    return [storage.join(folder, entry.name) for entry in entries if entry.name.endswith(".zarr")]


def share_done(folder):
    """Share of the chunks that the one store in a folder has."""
    for uri in grids(folder):
        try:
            return (GridStore.open(uri).tiles_run() >= 0).mean()
        except (InkdaskError, OSError, KeyError):
            pass  # it is being made
    return 0.0


def wait_until(condition, process=None):
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def count_tiles(tmp_path):
    return sum(map(int, (tmp_path / "tiles.log").read_text().split()))


def test_workers_that_are_killed_change_nothing(segment, tmp_path, capsys):
    from distributed import Client

    undisturbed = read_picture(inkdask.run(segment, model=network, zarr_output_dir=tmp_path / "u"))
    folder = str(tmp_path / "partitions")
    killed = []

    def kill_some(client):
        for step in range(1, 7):
            wait_until(lambda step=step: share_done(folder) >= step / 10)
            busy = [
                pid
                for pid in client.run(os.getpid, on_error="ignore").values()
                if pid not in killed
            ]
            killed.append(random.Random(step).choice(busy))
            os.kill(killed[-1], signal.SIGKILL)

    capsys.readouterr()
    with Client(n_workers=3, threads_per_worker=2, dashboard_address=None) as client:
        killer = threading.Thread(target=kill_some, args=(client,))
        killer.start()
        uri = inkdask.run(segment, model=network)
        killer.join()
    assert len(killed) >= 5
    assert np.array_equal(read_picture(uri), undisturbed)
    said = capsys.readouterr().err
    assert "computed again after workers were lost" in said
    again = int(said.split(" of them computed again")[0].rsplit(" ", 1)[1])
    assert 0 < again <= 3 * 2 * len(killed)  # what a worker had under way or not yet told


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_killed_client_resumes(place, script, tmp_path, request):
    folder = str(tmp_path / "partitions")
    if place == "s3":
        folder = f"{request.getfixturevalue('s3')}/partitions"
    first = start(script, ZARR_OUTPUT_DIR=folder, SECONDS_A_TILE="0.002")
    wait_until(lambda: share_done(folder) >= 0.5, first)
    first.kill()
    first.communicate()
    assert not list(tmp_path.rglob("*.png"))
    said = finish(start(script, ZARR_OUTPUT_DIR=folder))
    assert "resumed from an earlier run" in said
    resumed = read_picture((tmp_path / "result.txt").read_text())
    tiles = count_tiles(tmp_path)
    (tmp_path / "tiles.log").unlink()

    finish(start(script, ZARR_OUTPUT_DIR=str(tmp_path / "undisturbed")))
    assert np.array_equal(resumed, read_picture((tmp_path / "result.txt").read_text()))
    assert tiles <= 1.05 * count_tiles(tmp_path)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("cluster", ["threads", "local"])
def test_a_signal_stops_a_run_that_resumes(segment, tmp_path, how, cluster):
    if cluster == "local" and how is signal.SIGINT:
        pytest.skip("as SIGTERM")
    folder = str(tmp_path / "partitions")
    job = [sys.executable, "-m", "inkdask", "run", segment, "--model", "demo", "--layers", "0:5"]
    job += ["--model-in-chans", "5", "--cluster", cluster]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(job, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: share_done(folder) > 0, process)
    process.send_signal(how)
    began = time.monotonic()
    said = finish(process, 128 + how)
    assert time.monotonic() - began < 10
    assert "the same command resumes" in said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.png"))
    before = share_done(folder)
    assert 0 < before < 1
    done = subprocess.run(job, env=environment, capture_output=True, text=True, check=True)
    assert "resumed from an earlier run" in done.stderr
    assert storage.exists(done.stdout.strip())


def test_parts_in_any_order_one_of_them_twice(script, tmp_path):
    parts = [*range(7), 3]
    random.Random(1).shuffle(parts)
    missing = parts.index(5)
    late = [parts.pop(missing)]

    def run_parts(numbers):
        for pair in (numbers[i : i + 2] for i in range(0, len(numbers), 2)):
            running = [start(script, NUM_PARTS="7", PART_ID=str(part)) for part in pair]
            for process in running:
                finish(process)

    run_parts(parts)
    said = finish(start(script, NUM_PARTS="7", STEP="reduce"), 1)
    assert "NUM_PARTS=7 and PART_ID=5 first" in said
    assert not list(tmp_path.rglob("*.png"))
    assert not (tmp_path / "result.txt").exists()
    run_parts(late)
    finish(start(script, NUM_PARTS="7", STEP="reduce"))
    got = read_picture((tmp_path / "result.txt").read_text())
    finish(start(script, ZARR_OUTPUT_DIR=str(tmp_path / "one")))
    assert np.array_equal(got, read_picture((tmp_path / "result.txt").read_text()))
