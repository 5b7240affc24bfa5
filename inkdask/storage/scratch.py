"""Scratch folders of this process, on its local disk."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path


class Scratch:
    """Folder that is removed with its last reference, and at the latest when the process ends.

    ``is_there`` is False as soon as `remove_all` begins: zarr reads what is gone as zeros.
    """

    def __init__(self, parent: str | None = None) -> None:
        self.path, self.is_there = tempfile.mkdtemp(prefix="inkdask-scratch-", dir=parent), True
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        _all.add(self)


_all: weakref.WeakSet[Scratch] = weakref.WeakSet()


def remove_all() -> None:
    """Remove all scratch folders, in a process that is interrupted."""
    for scratch in list(_all):
        scratch.is_there = False
        while Path(scratch.path).exists():  # threads may still write into it
            shutil.rmtree(scratch.path, ignore_errors=True)
