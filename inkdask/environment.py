"""The environment of this process, which belongs to the caller of a job."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_home() -> Path:
    """Return the folder of inkdask in the user's cache, which may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inkdask"


_lock, _before, _jobs = threading.Lock(), dict[str, str](), 0


@contextmanager
def environment_kept() -> Iterator[None]:
    """Leave all variables as they were before the block, or before the first of several at once.

    Within it, a job sets variables for CUDA and huggingface_hub, and distributed and torch set
    more.
    """
    global _before, _jobs
    with _lock:
        if not _jobs:
            _before = dict(os.environ)
        _jobs += 1
    try:
        yield
    finally:
        with _lock:
            _jobs -= 1
            if not _jobs:
                for name in os.environ.keys() - _before.keys():
                    del os.environ[name]
                os.environ.update(_before)
