"""Outputs: whether they can be written, and how trees of files are removed and replaced."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

from inkdask import storage
from inkdask.errors import InkdaskError

PROBE = ".test"  # ending of the file that `check_writable` writes


def check_writable(uri: str) -> None:
    """Check that the file ``uri`` can be written and replaced."""
    if not storage.is_local(uri):
        probe = f"{uri}.{uuid4().hex[:8]}{PROBE}"
        storage.write_bytes(probe, b"")
        fs, key = storage.filesystem(probe)
        with storage.explained(uri):
            try:
                fs.rm_file(key)  # not `rm`, which hides a refusal
            except PermissionError as error:
                raise InkdaskError(
                    f"Access to {uri} is denied: files can be written there but not removed "
                    f"(s3:DeleteObject), so {probe} is left."
                ) from error
        return
    path = Path(storage.filesystem(uri)[1])
    with storage.explained(uri):
        if path.is_dir():
            raise InkdaskError(f"{uri} cannot be written: it is a folder.")
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InkdaskError(f"{uri} cannot be written: {folder} is not a writable folder.")


def remove(uri: str) -> None:
    """Remove a file, a link, or a folder with all below it; ignore a missing one.

    Every ``zarr.json`` is removed before the rest, the topmost first, so that nobody takes a
    half-removed array for a whole one.
    """
    fs, path = storage.filesystem(uri)
    with storage.explained(uri):
        if storage.is_local(uri) and Path(path).is_symlink():  # The target stays.
            Path(path).unlink()
            return
        metadata, rest = _files(fs, path)
        for file in metadata:
            fs.rm_file(file)
        if storage.is_local(uri) and Path(path).is_dir():
            shutil.rmtree(path)
        elif rest:
            fs.rm(rest)


def remove_file(uri: str) -> None:
    """Remove a single file; ignore a missing one."""
    fs, path = storage.filesystem(uri)
    with storage.explained(uri):
        if storage.is_local(uri):
            if Path(path).is_file():
                Path(path).unlink(missing_ok=True)  # Another process may have removed it since.
        else:
            fs.rm_file(path)


def replace_tree(source: str, target: str) -> None:
    """Move a folder to ``target``, and remove what was there.

    On S3 every ``zarr.json`` is copied after the rest, the topmost last, so that nobody sees an
    incomplete array.
    """
    fs, path = storage.filesystem(source)
    _, final = storage.filesystem(target)
    with storage.explained(target):
        remove(target)
        if storage.is_local(target):
            Path(path).replace(final)
            return
        metadata, rest = _files(fs, path)
        for files in (rest, *([file] for file in reversed(metadata))):
            fs.copy(files, [final + file[len(path) :] for file in files])
        remove(source)


def _files(fs: Any, path: str) -> tuple[list[str], list[str]]:
    """List each ``zarr.json`` below a folder, from the top down, and all other files."""
    files = sorted(fs.find(path), key=lambda file: file.count("/"))
    metadata = [file for file in files if file.endswith("/zarr.json")]
    return metadata, [file for file in files if not file.endswith("/zarr.json")]
