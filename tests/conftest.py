"""Shared fixtures: environments, an S3 server, and a proxy that injects faults before it."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import uuid

import pytest
from hypothesis import settings

from inkdask import engine, storage
from inkdask.settings import parameters
from tests.faultproxy import FaultProxy
from tests.files import SHAPE, random_volume

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which processes of tests inherit
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as by nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config):
    """Draw other examples than always in property tests where ``--hypothesis-seed`` is given."""
    if config.getoption("--hypothesis-seed", None) is not None:
        settings.register_profile("seeded", settings.get_profile("inkdask"), derandomize=False)
        settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def logging_as_before():
    """Restore the logging that the command line changes, so the order of tests does not matter."""
    root, own = logging.getLogger(), logging.getLogger("inkdask")
    handlers, level = list(root.handlers), own.level
    yield
    root.handlers[:] = handlers
    own.setLevel(level)


@pytest.fixture(autouse=True)
def no_gpu_unless_marked(request, monkeypatch):
    """Hide the GPU from tests without the mark ``gpu``."""
    import torch

    if torch.cuda.is_available() and not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def pixels():
    """Small volume, uint16 (z, y, x)."""
    return random_volume(SHAPE)


@pytest.fixture
def own_environment(monkeypatch, tmp_path, tmp_path_factory):
    """Remove all settings from the environment but the test's own places and small chunks."""
    for _, variable, _ in parameters():
        monkeypatch.setenv(variable, "")  # set it first, because monkeypatch then restores it
        monkeypatch.delenv(variable)
    monkeypatch.setenv("MODEL_VERSION", "1")  # lets imported functions resume
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    monkeypatch.setenv("ZARR_OUTPUT_DIR", str(tmp_path / "partitions"))
    monkeypatch.setenv("RESULT_FILE", str(tmp_path / "result.txt"))
    monkeypatch.setenv("CHUNK_SIZE", "128")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def own_tiles(own_environment, monkeypatch, tmp_path):
    """Let `tests.jobs.network` count its tiles, and shorten the pause after failures."""
    monkeypatch.setenv("BATCH_SIZE", "8")
    monkeypatch.setenv("TILES_LOG", str(tmp_path / "tiles.log"))
    monkeypatch.setattr(engine, "PAUSE", 0.01)


held = []  # sockets of ports that servers of this process may take


def free_port():
    """Return a port that no other program is given before the server that it is for begins."""
    held.append(socket.socket())
    held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that the server may bind it
    held[-1].bind(("127.0.0.1", 0))
    return held[-1].getsockname()[1]


def start_server(*command, port):
    """Start a server in another process, and wait until it answers."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise RuntimeError(f"{command} did not start") from None
            time.sleep(0.05)


@pytest.fixture(scope="session")
def s3_endpoint():
    """URL of an S3 server (moto) for the whole session."""
    port = free_port()
    process = start_server("-m", "moto.server", "-H", "127.0.0.1", "-p", str(port), port=port)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def proxy_server(s3_endpoint):
    port = free_port()
    process = start_server("-m", "tests.faultproxy", str(port), s3_endpoint, port=port)
    yield FaultProxy(f"http://127.0.0.1:{port}")
    process.kill()
    process.wait()


@pytest.fixture
def no_credentials(monkeypatch):
    """Remove all AWS settings from the environment."""
    for variable in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def s3(s3_endpoint, no_credentials, monkeypatch):
    """``s3://`` URI of an empty bucket; the environment has its credentials."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    bucket = f"scrolls-{uuid.uuid4().hex[:12]}"
    storage.s3_filesystem().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def faults(s3, proxy_server, monkeypatch):
    """Proxy between inkdask and S3, without faults until `FaultProxy.inject`."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy_server.url)
    yield proxy_server
    proxy_server.inject()


@pytest.fixture(params=["local", "s3"])
def home(request, tmp_path):
    """Empty folder, on disk and on S3."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")
