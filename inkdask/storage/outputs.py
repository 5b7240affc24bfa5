"""Trees of files that appear whole: removing them, and moving them to their final place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from uuid import uuid4

from inkdask import storage
from inkdask.types import InkdaskError


def check_writable(uri: str) -> None:
    """Fail now, not after hours, when the file ``uri`` could not be written.

    Raises
    ------
    InkdaskError
        Naming the place.
    """
    if not storage.is_local(uri):
        probe = f"{uri}.{uuid4().hex[:8]}.test"
        storage.write_bytes(probe, b"")
        remove(probe)
        return
    path = Path(storage.filesystem(uri)[1])
    with storage.explained(uri):
        if path.is_dir():
            raise InkdaskError(f"{uri} cannot be written: it is a folder.")
        folder = path.parent
        while not folder.exists():  # the nearest that is there must let us make the others
            folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InkdaskError(f"{uri} cannot be written: {folder} is not a writable folder.")


def remove(uri: str) -> None:
    """Remove a file, or a folder with all below it; nothing happens when it is not there.

    The ``zarr.json`` at the top goes first: what is removed halfway is no array any more.
    """
    fs, path = storage.filesystem(uri)
    with storage.explained(uri):
        if storage.is_local(uri):
            if Path(path).is_dir():
                (Path(path) / "zarr.json").unlink(missing_ok=True)
                shutil.rmtree(path)
            else:
                Path(path).unlink(missing_ok=True)
        elif fs.exists(path):
            if fs.exists(f"{path}/zarr.json"):
                fs.rm_file(f"{path}/zarr.json")
            fs.rm(path, recursive=True)


def replace_tree(source: str, target: str) -> None:
    """Move a folder to ``target`` in place of what is there.

    On S3 the ``zarr.json`` at the top goes last, so that an array shows only when it is whole.
    """
    fs, path = storage.filesystem(source)
    _, final = storage.filesystem(target)
    with storage.explained(target):
        remove(target)
        if storage.is_local(target):
            Path(path).replace(final)
            return
        metadata = f"{path}/zarr.json"
        files = [file for file in fs.find(path) if file != metadata]
        fs.copy(files, [final + file[len(path) :] for file in files])
        fs.copy(metadata, f"{final}/zarr.json")
        fs.rm(path, recursive=True)
