"""Files at local paths and at ``s3://`` and ``https://`` URIs, behind the same few functions.

Every `InkdaskError` names the file. Each process connects anew: event loops survive no fork.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem

from inkdask.errors import DamagedError, InkdaskError, UnavailableError, reason, without_password
from inkdask.storage.counting import count
from inkdask.storage.parallel import for_each
from inkdask.storage.scratch import Scratch, part_of

if TYPE_CHECKING:
    from zarr import Array, Group
    from zarr.abc.store import Store

    from inkdask.storage.s3 import S3FileSystem

_OF_S3 = ("s3fs", "botocore", "aiobotocore")
SAMPLE_BYTES = 4096  # tell apart files of one name, size and time


@dataclass(frozen=True)
class Entry:
    """A file or folder; for a link, the size, time and kind of its target.

    Attributes
    ----------
    name
        Last part of the path.
    size
        Bytes.
    etag
        ETag of an S3 object; empty for local files and for folders.
    modified
        Time of the last write.
    is_folder
        Whether the entry is a folder.
    """

    name: str
    size: int
    etag: str
    modified: str
    is_folder: bool

    @property
    def mark(self) -> str:
        """ETag, or time of the last write where there is none; changes with the file."""
        return self.etag or self.modified


def s3_filesystem(asynchronous: bool = False) -> S3FileSystem:
    """Return this process's S3 connection, as `inkdask.storage.s3.connection` does."""
    # Imported here, because botocore loads slowly and local jobs do not need it.
    from inkdask.storage.s3 import connection

    return connection(asynchronous)


def has_credentials() -> bool:
    """Whether there are AWS credentials; without them, buckets are only read."""
    return not s3_filesystem().anon


def is_local(uri: str) -> bool:
    """Whether ``uri`` is a path of this machine (``/data/x``, ``file:///data/x``)."""
    return split_protocol(uri)[0] in (None, "file", "local")


def is_http(uri: str) -> bool:
    """Whether ``uri`` is read by HTTP, which neither lists nor writes."""
    return split_protocol(uri)[0] in ("http", "https")


def filesystem(uri: str) -> tuple[Any, str]:
    """Return the fsspec file system of ``uri``, and the path in it."""
    if is_local(uri):
        fs = LocalFileSystem()
        return fs, fs._strip_protocol(uri)
    protocol, path = split_protocol(uri)
    if without_password(uri) != uri:
        how = "~/.netrc, or save the file" if is_http(uri) else "AWS_SECRET_ACCESS_KEY"
        raise InkdaskError(f"{uri} with a password or signature would be shown in logs: use {how}.")
    if is_http(uri):
        from inkdask.storage.http import connection

        return connection(), uri.rstrip("/")
    if protocol not in ("s3", "s3a") or not path:
        raise InkdaskError(f"{uri} is neither a local path nor an s3:// or https:// URI.")
    with explained(uri):
        return s3_filesystem(), path.rstrip("/")


def join(uri: str, *names: str) -> str:
    """Join names below ``uri`` with single slashes."""
    return "/".join([uri.rstrip("/"), *names])


def absolute(uri: str) -> str:
    """Return the absolute path or the URI of ``uri``, without following links."""
    path: str = filesystem(uri)[1]
    return path if is_http(uri) else os.path.normpath(path) if is_local(uri) else f"s3://{path}"


def exists(uri: str) -> bool:
    """Whether there is a file or folder at ``uri``."""
    fs, path = filesystem(uri)
    with explained(uri):
        return bool(fs.exists(path))


def list_folder(uri: str) -> list[Entry]:
    """List a folder, sorted by name; return an empty list when there is no folder."""
    fs, path = filesystem(uri)
    with explained(uri):
        try:
            found = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            if code_of(error) == "NoSuchBucket":
                raise
            return []
    # Skip what has the path itself: the listing of a file, and the marker object of an S3 folder.
    entries = [_entry(info) for info in found if info["name"].rstrip("/") != path]
    return sorted(entries, key=lambda entry: entry.name)


def find_entries(uri: str, names: Collection[str]) -> list[Entry]:
    """Return the entries of a folder that have one of these names; over HTTP, ask for each."""
    if not is_http(uri):
        return [entry for entry in list_folder(uri) if entry.name in names]

    def ask(name: str) -> Entry | None:
        fs, path = filesystem(join(uri, name))
        with explained(path), suppress(FileNotFoundError, PermissionError):
            return _entry(fs.info(path))
        return None

    return [found for found in for_each(ask, names) if found]


def list_files(uri: str) -> list[str]:
    """List all files below a folder, as relative paths; an empty list when there is no folder."""
    fs, path = filesystem(uri)
    with explained(uri):
        return [name[len(path) :].lstrip("/") for name in fs.find(path)]


def entry(uri: str) -> Entry:
    """Look up a single file or folder, which must exist."""
    fs, path = filesystem(uri)
    with explained(uri):
        return _entry(fs.info(path))


def _entry(info: dict[str, Any]) -> Entry:
    name = info["name"].rstrip("/").rsplit("/", 1)[-1]
    if info.get("islink"):  # Ask anew, because fsspec gives the time and type of the link itself.
        with suppress(OSError):  # The target is missing: keep the link, as a file of no bytes.
            to = Path(info["name"]).stat()
            return Entry(name, to.st_size, "", str(to.st_mtime), stat.S_ISDIR(to.st_mode))
    return Entry(
        name=name,
        size=info["size"] or 0,
        etag=str(info.get("ETag") or ""),
        modified=str(info.get("LastModified") or info.get("mtime") or ""),
        is_folder=info["type"] == "directory",
    )


def read_bytes(uri: str, etag: str = "") -> bytes:
    """Read a whole file; with an ``etag``, fail when the S3 object has another one by now."""
    fs, path = filesystem(uri)
    with explained(uri):
        if not is_local(uri):
            return bytes(fs.cat_file(path, etag=etag))
        data: bytes = fs.cat_file(path)
        count(requests=1, bytes_read=len(data))
        return data


def read_range(uri: str, start: int, stop: int, etag: str = "") -> bytes:
    """Read bytes ``start`` to ``stop``, all of them; ``etag`` as in `read_bytes`."""
    fs, path = filesystem(uri)
    with explained(uri):
        if is_local(uri):
            data = _read_local(path, start, stop)
        else:
            data = fs.cat_file(path, start=start, end=stop, etag=etag)
    if len(data) != stop - start:
        raise InkdaskError(
            f"{uri} is truncated: bytes {start} to {stop} were asked for, {len(data)} are there."
        )
    return data


def read_middle(uri: str, size: int) -> bytes:
    """Read up to `SAMPLE_BYTES` from the middle of a file of ``size`` bytes."""
    start = max(0, size - SAMPLE_BYTES) // 2
    return read_range(uri, start, min(start + SAMPLE_BYTES, size)) if size else b""


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically; missing folders are created."""
    with writing(uri) as part:
        part.write_bytes(data)


def put_file(local: str | Path, uri: str) -> None:
    """Copy a local file to ``uri`` atomically."""
    with writing(uri) as part:
        shutil.copyfile(local, part)


@contextmanager
def writing(uri: str) -> Iterator[Path]:
    """Yield a local path to write to; the file is moved to ``uri`` when the block succeeds."""
    fs, path = filesystem(uri)
    with explained(uri):
        if not is_local(uri):
            with Scratch() as scratch:
                part = scratch / "file"
                yield part
                fs.put_file(str(part), path)
            return
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(final)
        try:
            yield part
            part.replace(final)
        finally:
            part.unlink(missing_ok=True)


def zarr_store(uri: str, read_only: bool = False) -> Store:
    """Return the zarr store at ``uri``; its reads are counted, and retried over a network."""
    from inkdask.storage.zarr_stores import LocalStore, RemoteStore, S3Store

    path = filesystem(uri)[1]
    if is_local(uri):
        return LocalStore(path, read_only=read_only)
    if is_http(uri):
        from inkdask.storage.http import connection

        return RemoteStore(connection(asynchronous=True), path=path, read_only=read_only)
    with explained(uri):
        return S3Store(s3_filesystem(asynchronous=True), path=path, read_only=read_only)


def zarr_node(uri: str) -> Array[Any] | Group:
    """Open the zarr array or group at ``uri`` to read."""
    import zarr

    with decoded(uri):
        store = zarr_store(uri, read_only=True)
        try:
            node = zarr.open(store, mode="r")
        except FileNotFoundError as error:
            if refused := getattr(store, "refused", None):
                raise refused from error
            if not exists(uri):
                raise
            raise InkdaskError(f"{uri} is no zarr array and no zarr group.") from error
        if not isinstance(node.metadata.attributes, dict):
            raise TypeError("its attributes are no object of JSON")
        return node


def zarr_array(uri: str) -> Array[Any]:
    """Open the zarr array at ``uri`` to read; a group is an error."""
    import zarr

    node = zarr_node(uri)
    if isinstance(node, zarr.Group):
        raise InkdaskError(f"{uri} is a zarr group, not an array: name that group itself.")
    return node


def open_array(uri: str, version: str = "", read_only: bool = False) -> Array[Any]:
    """Open a zarr array, to write too or ``read_only``; once in each process and ``version``."""
    return _open_array(os.getpid(), uri, version, read_only)


@lru_cache(maxsize=48)
def _open_array(process: int, uri: str, version: str, read_only: bool) -> Array[Any]:
    import zarr

    with suppress(FileNotFoundError):  # zarr's own cannot be unpickled, so no worker may raise it
        return zarr.open_array(zarr_store(uri, read_only), mode="r" if read_only else "r+")
    raise FileNotFoundError(uri)


def explain(error: BaseException, uri: str) -> InkdaskError:
    """Turn a failure at ``uri`` into an error of one sentence."""
    if isinstance(error, InkdaskError):
        return error
    if isinstance(error, PermissionError):
        if is_local(uri):
            return InkdaskError(f"{uri}: permission denied.")
        if is_http(uri):
            return InkdaskError(f"{uri} does not exist, or is not open to all: {reason(error)}.")
        from inkdask.storage.s3 import refusal

        return InkdaskError(f"Access to {uri} is denied{refusal(error, s3_filesystem().anon)}.")
    if code_of(error) == "NoSuchBucket":
        return InkdaskError(f"The bucket of {uri} does not exist.")
    if code_of(error) == "PreconditionFailed" or getattr(error, "errno", 0) == errno.ESTALE:
        return InkdaskError(f"{uri} has changed since it was opened: run the job again.")
    if isinstance(error, FileNotFoundError):
        return InkdaskError(f"{uri} does not exist.")
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return UnavailableError(f"{uri} does not answer{_endpoint(uri)}: several tries timed out.")
    if type(error).__name__ == "EndpointConnectionError" or "ClientConn" in type(error).__name__:
        return UnavailableError(f"{uri} cannot be reached{_endpoint(uri)}: nothing answers there.")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return InkdaskError(f"No space is left to write {uri}.")
    if not isinstance(error, OSError) and _is_odd(error):
        said = f"{type(error).__name__}: {reason(error)}"
        return InkdaskError(f"What answers for {uri}{_endpoint(uri)} is not S3 ({said}).")
    return InkdaskError(f"{uri}: {reason(error)}.")


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Raise failures of storage inside the block as the `InkdaskError` of `explain`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InkdaskError) or not _is_of_storage(error):
            raise
        raise explain(error, uri) from error


@contextmanager
def decoded(uri: str, remedy: str = "") -> Iterator[None]:
    """Raise any failure inside the block as an `InkdaskError`; for blocks that parse or decode.

    Failures of storage are raised as by `explained`, all others as a `DamagedError`, because
    damaged data make a parser raise anything. Its sentence ends with ``remedy``.
    """
    try:
        with explained(uri):
            yield
    except InkdaskError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {reason(error)}"
        raise DamagedError(f"{uri} cannot be read ({what}){remedy}.") from error


def _is_of_storage(error: Exception) -> bool:
    """Whether a file system or network raised the error; bugs must keep their traceback."""
    home = type(error).__module__.split(".")[0]
    return isinstance(error, OSError) or home in (*_OF_S3, "aiohttp", "fsspec") or _is_odd(error)


def _is_odd(error: BaseException) -> bool:
    """Whether a library of S3 raised an error of Python, because it trusts the answer."""
    frames = traceback.walk_tb(error.__traceback__)
    homes = [frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in frames]
    ours = [home for home in homes if home in ("inkdask", *_OF_S3)]
    return type(error).__module__ == "builtins" and ours[-1:] != ["inkdask"] and bool(ours)


def _read_local(path: str, start: int, stop: int) -> bytes:
    with Path(path).open("rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    count(requests=1, bytes_read=len(data))
    return data


def code_of(error: BaseException) -> str:
    """Return the error code of S3 (``NoSuchBucket``, ``AccessDenied``, ...), or ``""``."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return str(response["Error"].get("Code", "")) if response else ""


def _endpoint(uri: str) -> str:
    if is_http(uri):
        return ""
    from inkdask.storage.s3 import endpoint_variable

    return f" at {os.environ[name]} ({name})" if (name := endpoint_variable()) else ""
