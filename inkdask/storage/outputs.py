"""Outputs: whether they can be written, and how trees of files are removed and replaced."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import shutil
import stat
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from inkdask import storage
from inkdask.errors import InkdaskError
from inkdask.storage import scratch
from inkdask.storage.parallel import for_each

log = logging.getLogger("inkdask")

# Conditions that S3 looks at after the right to upload, and its answers where they are not met.
NEVER = {"IfMatch": f'"{"0" * 32}"', "ContentMD5": "AAAAAAAAAAAAAAAAAAAAAA=="}
UNMET = ("NoSuchKey", "404", "PreconditionFailed", "412", "BadDigest")
LEFT = re.compile(r"\.([0-9a-f]{8}\.(part|unfinished)|[0-9a-f]{32}\.partial)$")  # the last by zarr
REST = 24 * 3600  # seconds: a living process writes to its unfinished picture more often


@contextmanager
def moved_by(variable: str) -> Iterator[None]:
    """Let an error in the block end with the variable that moves the output elsewhere."""
    try:
        yield
    except InkdaskError as error:
        raise type(error)(f"{str(error)[:-1]}: set {variable} to another place.") from error


def check_writable(uri: str) -> None:
    """Check that the file ``uri`` can be written and replaced; leaves nothing there."""
    if storage.is_http(uri):
        raise InkdaskError(f"{uri} cannot be written: over HTTP, files are read alone.")
    fs, place = storage.filesystem(uri)
    path = folder = Path(place)
    with storage.explained(uri):
        if not storage.is_local(uri):
            bucket, _, key = f"{place}.{uuid4().hex[:8]}.part".partition("/")
            try:
                fs.call_s3("put_object", Bucket=bucket, Key=key, Body=b"", **NEVER)
                fs.rm_file(f"{bucket}/{key}")  # a server that knows no conditions has written it
            except OSError as error:
                if storage.code_of(error) not in UNMET:
                    raise
            return
        if path.is_dir():
            raise InkdaskError(f"{uri} cannot be written: it is a folder.")
        with suppress(FileNotFoundError, NotADirectoryError):
            scratch.part_of(path).lstat()  # a name may be too long
        while folder == path or not os.path.lexists(folder):
            folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise InkdaskError(f"{uri} cannot be written: {folder} is not a writable folder.")
    owners = {0, folder.stat().st_uid, path.stat().st_uid if path.exists() else os.geteuid()}
    is_shared = folder.stat().st_mode & stat.S_ISVTX  # as /tmp: only owners replace files
    if is_shared and os.geteuid() not in owners:
        raise InkdaskError(f"{uri} cannot be written: it is another user's.")


def may_remove(uri: str) -> bool:
    """Whether a group that is to be written at ``uri`` can be removed; S3 may not allow it."""
    fs, metadata = storage.filesystem(storage.join(uri, "zarr.json"))
    with storage.explained(uri), suppress(FileNotFoundError):
        try:
            fs.rm_file(metadata)  # is not there yet
        except PermissionError:
            return False
    return True


def remove(uri: str) -> None:
    """Remove a file, a link, or a folder with all below it; ignore a missing one.

    A local folder is renamed first. On S3 every ``zarr.json`` is removed before the rest, the
    topmost first. So no reader takes a half-removed array for a whole one.
    """
    fs, path = storage.filesystem(uri)
    with storage.explained(uri):
        if not storage.is_local(uri):
            metadata, rest = _files(fs, path)
            for file in metadata:
                fs.rm_file(file)
            for_each(fs.rm_file, rest)  # `fs.rm` takes the name [a] for a pattern
            return
        with suppress(FileNotFoundError):  # another process may have removed it since
            away = Path(path).rename(f"{path}.{uuid4().hex[:8]}.unfinished")
            if away.is_dir() and not away.is_symlink():  # the target of a link stays
                shutil.rmtree(away)
            else:
                away.unlink()


def discard(uri: str) -> None:
    """Remove what is of no more use; a failure is only logged."""
    try:
        remove(uri)
    except InkdaskError as error:
        log.warning("%s is left: %s", uri, error)


def remove_file(uri: str) -> None:
    """Remove a single file; ignore a missing one. A file that may not be removed is emptied."""
    fs, path = storage.filesystem(uri)
    with storage.explained(uri), suppress(FileNotFoundError):  # another process may remove it, too
        if fs.isfile(path):
            try:
                fs.rm_file(path)
            except PermissionError:
                fs.pipe_file(path, b"")


def replace_tree(source: str, target: str) -> None:
    """Move a folder to ``target``, and remove what was there.

    On S3 every ``zarr.json`` is copied after the rest, the topmost last, so that nobody sees an
    incomplete array.
    """
    fs, path = storage.filesystem(source)
    _, final = storage.filesystem(target)

    def copy(file: str) -> None:
        fs.cp_file(file, final + file[len(path) :])

    with storage.explained(target):
        remove(target)
        while storage.is_local(target):
            try:
                Path(path).replace(final)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                remove(target)  # another process has put its own there
        metadata, rest = _files(fs, path)
        for_each(copy, rest)
        for file in reversed(metadata):
            copy(file)
        remove(source)


def sweep(*pictures: str, others: Iterable[str] = ()) -> None:
    """Remove what killed processes left: temporary folders, and files where a command writes.

    These lie beside files whose names begin like the last part of a place, and in the folders of
    ``others``. They have rested for a day, because a process of any machine may write there. On S3
    only pictures leave any, because all else appears there whole.
    """
    scratch.sweep()
    local = [uri for uri in others if storage.is_local(uri)]
    names = defaultdict(set)
    for uri in map(storage.absolute, (*pictures, *local)):
        folder, name = uri.rsplit("/", 1)
        names[folder].add(re.escape(name))
    for folder, beside in names.items():
        left = re.compile(rf"\.?({'|'.join(beside)}).*{LEFT.pattern}")
        with suppress(InkdaskError):
            for entry in storage.list_folder(folder):
                if left.fullmatch(entry.name):
                    _discard_rested(storage.join(folder, entry.name))
    for folder, folders, files in itertools.chain(*map(os.walk, map(storage.absolute, local))):
        for name in filter(LEFT.search, folders + files):
            _discard_rested(storage.join(folder, name))


def _discard_rested(uri: str) -> None:
    """Remove a file or folder in which nothing was written for a day."""
    fs, path = storage.filesystem(uri)
    with suppress(InkdaskError), storage.explained(uri):
        files = fs.find(path, detail=True, withdirs=storage.is_local(uri)).values()
        times = [it.get("mtime") or it["LastModified"].timestamp() for it in files]
        if times and max(times) < time.time() - REST:
            remove(uri)


def _files(fs: Any, path: str) -> tuple[list[str], list[str]]:
    """List each ``zarr.json`` below a folder, from the top down, and all other files."""
    files = sorted(fs.find(path), key=lambda file: file.count("/"))
    metadata = [file for file in files if file.endswith("/zarr.json")]
    return metadata, [file for file in files if not file.endswith("/zarr.json")]
