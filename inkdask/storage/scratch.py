"""Temporary files; and temporary folders, which the next job removes if their process was killed.

Each folder has a lock, which the system releases when the process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

PREFIX, NEW = "inkdask-tmp-", "inkdask-new-"  # with and without its lock


class Scratch:
    """A temporary folder, until it is closed, nobody holds it any longer, or the process ends.

    Attributes
    ----------
    path
        The folder.
    close
        Removes it; safe to call again.
    """

    def __init__(self, folder: str | None = None) -> None:
        made = Path(tempfile.mkdtemp(prefix=NEW, dir=folder))
        lock = os.open(made, os.O_RDONLY)
        with suppress(OSError):  # without locks, as on some network disks, nothing is swept
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Renamed under its lock, because `sweep` takes a folder that nobody has locked yet.
        self.path = made.rename(made.with_name(made.name.replace(NEW, PREFIX)))
        self.close = weakref.finalize(self, _remove, self.path, lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def sweep() -> None:
    """Remove the temporary folders of this user's processes that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or removed since
            lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)


def part_of(final: Path) -> Path:
    """Return the file that is written before it takes the place of ``final``."""
    return final.with_name(f".{final.name}.{uuid4().hex[:8]}.part")
