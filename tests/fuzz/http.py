"""The server of `tests.fuzz.s3` as one of plain HTTP: files are read by name, nothing is listed."""

import contextlib

import numpy as np

from inkdask import storage
from inkdask.segment import open_segment
from inkdask.storage import http
from tests.fuzz import spoil
from tests.fuzz.s3 import STATUSES, spoil_some
from tests.fuzz.s3 import opened as bucket


@contextlib.contextmanager
def opened(home):
    """Yield the reader of one input."""
    http.READ_TIMEOUT = http.CONNECT_TIMEOUT = 0.3
    with bucket(home, read) as reader:
        yield reader


def read(rng, server, volume):
    """Do one of the things that a job does over HTTP, and compare."""
    spoil_some(server, rng)
    # These mean that a file is not there, and zarr takes a chunk that is not there for zeros.
    server.statuses = [status for status in STATUSES if status not in (403, 404)]
    site = f"http://127.0.0.1:{server.server_address[1]}/b"
    if rng.integers(3):
        segment = open_segment(f"{site}/{spoil.choice(rng, ('seg', 'v.zarr'))}", (0, 2))
        got = segment.volume.compute(scheduler="synchronous")
        np.testing.assert_array_equal(got, volume)
    else:
        key = spoil.choice(rng, sorted(server.objects))
        assert storage.read_bytes(f"{site}/{key}") == server.objects[key]
    return "read"
