"""Test jobs in real processes: killed workers, killed clients, signals, and parts in any order.

A test disturbs a job once its store shows enough progress, never after some time.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import inkdask
from inkdask import engine, storage
from inkdask.errors import InkdaskError
from inkdask.store import GridStore
from tests.files import grids, read_picture, write_layers
from tests.jobs import count_tiles, network
from tests.oracle import papyrus

pytestmark = pytest.mark.usefixtures("own_tiles")

LAYERS, HEIGHT, WIDTH = 5, 400, 780  # 3 x 6 chunks
REPOSITORY = Path(__file__).parent.parent

# Fork each job from a server, because importing torch and distributed takes seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["inkdask.workflow", "inkdask.predictor", "distributed"])


def job(environment, log):
    """Run the job that the environment describes, and write its messages to a file."""
    os.environ.update(environment)
    sys.stderr = Path(log).open("w", buffering=1)  # noqa: SIM115  open until the process ends
    inkdask.run(model=network)


def guarded_network(x):
    """Logits from the first and last layer: (b, 1, 4, 4).

    The size of the file `tiles` counts the tiles of all processes. A process waits while this size
    exceeds that of the file `limit`, and leaves a file named after its process id.
    """
    folder = Path(os.environ["GUARD"])
    with (folder / "tiles").open("ab", buffering=0) as tiles:
        tiles.write(bytes(len(x)))
    while (folder / "tiles").stat().st_size > (folder / "limit").stat().st_size:
        (folder / f"{os.getpid()}.waits").touch()
        time.sleep(0.01)
    return 300 * torch.nn.functional.adaptive_avg_pool2d(x[:, :, -1] - x[:, :, 0], 4)


@pytest.fixture(scope="module")
def volume():
    return papyrus((LAYERS, HEIGHT, WIDTH))


@pytest.fixture
def segment(tmp_path, volume):
    """Folder of layers in TIFF tiles of 128 pixels."""
    folder = tmp_path / "segment"
    write_layers(folder / "layers", volume, tile=(128, 128), compression="deflate")
    return str(folder)


@pytest.fixture
def start(segment, tmp_path):
    """Function that starts a job on the segment, with additions to its environment."""
    started = []

    def begin(**environment):
        log = tmp_path / f"{len(started)}.log"
        inherited = {**os.environ, "S3_PATH": segment, **environment}
        process = PROCESSES.Process(target=job, args=(inherited, str(log)))
        process.start()
        started.append(process)
        return Started(process, log)

    yield begin
    for process in started:
        process.kill()
        process.join()


@dataclass
class Started:
    process: multiprocessing.process.BaseProcess
    log: Path

    def poll(self):
        return self.process.exitcode

    def finish(self, code=0):
        """Wait for the job, check its exit code, and return its log."""
        self.process.join(120)
        assert self.process.exitcode == code, self.log.read_text()
        return self.log.read_text()


def share_done(folder):
    """Share of chunks that are stored in the only grid of a folder."""
    for uri in grids(folder):
        try:
            return GridStore.open(uri)[0].chunks_done().mean()
        except (InkdaskError, OSError, KeyError):
            pass  # another process is creating the grid
    return 0.0


def wait_until(condition, process=None):
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.02)


@pytest.mark.slow
def test_picture_is_the_same_after_workers_are_killed(segment, tmp_path, capsys, monkeypatch):
    from distributed import Client

    guard = tmp_path / "guard"
    guard.mkdir()
    monkeypatch.setenv("GUARD", str(guard))
    tiles, limit = guard / "tiles", guard / "limit"
    limit.touch()
    os.truncate(limit, 1_000_000)  # a sparse file, which takes no space
    undisturbed = inkdask.run(segment, model=guarded_network, output_path=tmp_path / "undisturbed")
    share = tiles.stat().st_size // 5
    tiles.write_bytes(b"")
    killed = []

    def waiting():
        return {int(file.stem) for file in guard.glob("*.waits")}.difference(killed)

    def kill_some():
        for step in range(1, 4):
            wait_until(waiting)  # in the middle of a forward pass
            killed.append(random.Random(step).choice(sorted(waiting())))
            os.kill(killed[-1], signal.SIGKILL)
            os.truncate(limit, (step + 1) * share if step < 3 else 1_000_000)
            for file in guard.glob("*.waits"):
                file.unlink()

    os.truncate(limit, share)
    capsys.readouterr()
    workers = Client(n_workers=3, threads_per_worker=2, dashboard_address=None)
    with suppress(TimeoutError), workers:  # closing may time out on a busy machine
        killer = threading.Thread(target=kill_some)
        killer.start()
        uri = inkdask.run(segment, model=guarded_network, zarr_output_dir=tmp_path / "other")
        killer.join()
    assert len(killed) == 3
    assert np.array_equal(read_picture(uri), read_picture(undisturbed))
    said = capsys.readouterr().err
    assert "computed again after workers were lost" in said
    again = int(said.split(" of them computed again")[0].rsplit(" ", 1)[1])
    # A killed worker loses the chunks that it computes and those that it has not yet reported.
    assert 0 < again <= 3 * 2 * len(killed)


@pytest.mark.slow
@pytest.mark.parametrize("place", [pytest.param("local", marks=pytest.mark.slow), "s3"])
def test_job_resumes_after_its_client_is_killed(place, segment, start, tmp_path, request):
    folder = str(tmp_path / "partitions")
    if place == "s3":
        folder = f"{request.getfixturevalue('s3')}/partitions"
    first = start(ZARR_OUTPUT_DIR=folder, SECONDS_A_TILE="0.002")
    wait_until(lambda: share_done(folder) >= 0.5, first)
    first.process.kill()
    first.finish(-signal.SIGKILL)
    assert not list(tmp_path.rglob("*.png"))
    assert "resumed from an earlier run" in start(ZARR_OUTPUT_DIR=folder).finish()
    resumed = read_picture((tmp_path / "result.txt").read_text())
    tiles = count_tiles(tmp_path)
    (tmp_path / "tiles.log").unlink()

    undisturbed = inkdask.run(segment, model=network, zarr_output_dir=tmp_path / "undisturbed")
    assert np.array_equal(resumed, read_picture(undisturbed))
    in_flight = engine.threads() * (128 // 16) ** 2  # tiles of the chunks that the kill lost
    assert tiles <= count_tiles(tmp_path) + in_flight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cluster", "how"),
    [
        ("threads", signal.SIGTERM),
        pytest.param("threads", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("local", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_signal_stops_a_job_that_resumes(segment, tmp_path, cluster, how, capsys):
    folder = str(tmp_path / "partitions")
    command = [sys.executable, "-m", "inkdask", "run", segment, "--model", "demo", "--no-compile"]
    command += ["--layers", "0:5", "--model-in-chans", "5", "--cluster", cluster]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: share_done(folder) > 0, process)
    process.send_signal(how)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 128 + how
    assert "the same command resumes" in said
    assert "Traceback" not in said
    assert "Scheduler" not in said  # distributed logs every connection that it closes
    assert not list(tmp_path.rglob("*.png"))
    assert 0 < share_done(folder) < 1
    uri = inkdask.run(segment, model="demo", compile=False, layers=(0, 5), model_in_chans=5)
    assert "resumed from an earlier run" in capsys.readouterr().err
    assert storage.exists(uri)


@pytest.mark.slow
def test_parts_in_any_order_give_the_whole_picture(segment, start, tmp_path):
    """One part runs twice."""
    parts = [*range(4), 3]
    random.Random(1).shuffle(parts)
    parts.remove(1)

    def run_parts(numbers):
        for pair in (numbers[i : i + 2] for i in range(0, len(numbers), 2)):
            for running in [start(NUM_PARTS="4", PART_ID=str(part)) for part in pair]:
                running.finish()

    run_parts(parts)
    with pytest.raises(InkdaskError, match="NUM_PARTS=4 and PART_ID=1 first"):
        inkdask.run(segment, model=network, num_parts=4, step="reduce")
    assert not list(tmp_path.rglob("*.png"))
    assert not (tmp_path / "result.txt").exists()
    run_parts([1])
    got = read_picture(inkdask.run(segment, model=network, num_parts=4, step="reduce"))
    whole = inkdask.run(segment, model=network, zarr_output_dir=tmp_path / "one")
    assert np.array_equal(got, read_picture(whole))
