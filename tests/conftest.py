"""Servers that many tests share: an S3 of their own, and faults in front of it."""

import logging
import os
import socket
import subprocess
import sys
import time
import uuid

import pytest

from inkdask import engine, storage
from inkdask.settings import Environment, parameters
from tests.faultproxy import FaultProxy
from tests.files import SHAPE, random_volume


@pytest.fixture(autouse=True)
def logging_as_before():
    """Undo what the command line sets, so that tests do not depend on their order."""
    root, own = logging.getLogger(), logging.getLogger("inkdask")
    handlers, level = list(root.handlers), own.level
    yield
    root.handlers[:] = handlers
    own.setLevel(level)


@pytest.fixture(autouse=True)
def no_gpu_unless_marked(request, monkeypatch):
    """A test without the mark ``gpu`` means the CPU, on a machine with a GPU too."""
    import torch  # whichever test comes first

    if torch.cuda.is_available() and not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def pixels():
    """A small volume uint16 (z, y, x)."""
    return random_volume(SHAPE)


@pytest.fixture
def own_environment(monkeypatch, tmp_path):
    """An environment without any setting but places of the test's own, and small chunks."""
    for _, variable, _ in parameters():
        monkeypatch.setenv(variable, "")  # so that it is restored, whatever the job sets
        monkeypatch.delenv(variable)
    monkeypatch.setenv("MODEL_VERSION", "1")  # imported functions may resume
    monkeypatch.setattr(Environment, "told", None)
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    monkeypatch.setenv("ZARR_OUTPUT_DIR", str(tmp_path / "partitions"))
    monkeypatch.setenv("RESULT_FILE", str(tmp_path / "result.txt"))
    monkeypatch.setenv("CHUNK_SIZE", "128")


@pytest.fixture
def own_tiles(own_environment, monkeypatch, tmp_path):
    """An environment in which `tests.jobs.network` counts its tiles, and failures wait briefly."""
    monkeypatch.setenv("BATCH_SIZE", "8")
    monkeypatch.setenv("TILES_LOG", str(tmp_path / "tiles.log"))
    monkeypatch.setattr(engine, "PAUSE", 0.01)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_server(*command, port):
    """Start a server in a process of its own, and wait until it answers."""
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
    """URL of an S3 server (moto) that lives as long as the tests."""
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
    """An environment without a trace of AWS."""
    for variable in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def s3(s3_endpoint, no_credentials, monkeypatch):
    """``s3://`` URI of an empty bucket, with the environment set to reach it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    bucket = f"scrolls-{uuid.uuid4().hex[:12]}"
    storage.s3_filesystem().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def faults(s3, proxy_server, monkeypatch):
    """Faults to inject between inkdask and S3 (`FaultProxy.inject`); none to begin with."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy_server.url)
    yield proxy_server
    proxy_server.inject()


@pytest.fixture(params=["local", "s3"])
def home(request, tmp_path):
    """A folder that is empty: once on disk, once on S3."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")
