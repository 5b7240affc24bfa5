"""Places that hold weights: a local folder, a Hugging Face repo, an object store.

Each place gives its files as paths on the local disk. A file is downloaded once per machine, by one
process under a lock, while other processes wait.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub import errors as hf

from inkdask import storage
from inkdask.environment import cache_home
from inkdask.errors import InkdaskError, reason

_IS_MD5 = re.compile(r"[0-9a-f]{32}")
_IS_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 16 * 2**20  # bytes of one range request
# What huggingface_hub raises where an answer lacks headers, is no JSON, or is JSON of another kind.
_UNLIKE_THE_HUB = (hf.FileMetadataError, ValueError, KeyError, TypeError, AttributeError)
_AT_ONCE = 4  # range requests in flight, and so 64 MiB in memory


class WeightsSource(Protocol):
    """A place that holds weights files; ``str(source)`` is its address."""

    def names(self) -> list[str]:
        """Return the names of its files."""

    def get(self, name: str) -> Path:
        """Return the path of a file on the local disk."""

    def pin(self, name: str, path: Path) -> dict[str, Any]:
        """Return the `ModelSpec` fields that lead to exactly this file."""
        return {"weights": f"{self}/{name}", "filename": None}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, computed again when the file changes."""
    with storage.explained(str(path)):
        stat = path.stat()
        return _sha256(path, stat.st_size, stat.st_mtime_ns)


@lru_cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Folder(WeightsSource):
    """A folder on the local disk; ``address`` leads to it on any machine, by default the path."""

    def __init__(self, path: Path, address: str | None = None) -> None:
        self.path, self.address = path, address or str(path)

    def __str__(self) -> str:
        return self.address

    def names(self) -> list[str]:
        """Return the names of its files."""
        with storage.explained(str(self.path)):
            return [entry.name for entry in self.path.iterdir() if entry.is_file()]

    def get(self, name: str) -> Path:
        """Return the path of a file."""
        path = self.path / name
        with storage.explained(str(path)):
            if not path.is_file():
                raise InkdaskError(f"The weights {path} do not exist.")
        return path


class Repo(WeightsSource):
    """A Hugging Face repo, with files in the cache that all programs of a user share.

    huggingface_hub reads ``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE``.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self.revision = name, revision

    def __str__(self) -> str:
        return f"{constants.ENDPOINT}/{self.name}"

    def names(self) -> list[str]:
        """Return the names of its files, or of its cached files when the Hub does not answer."""
        with self._explained():
            try:
                info = huggingface_hub.model_info(
                    self.name, revision=self.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
                )
                return _texts(file.rfilename for file in info.siblings or ())
            except Exception as error:  # of any type, because the library trusts the answer
                if isinstance(error, hf.HfHubHTTPError) and error.response.status_code < 500:
                    raise
                if cached := self._cached_names():
                    return cached
            # With more patience, because nothing is cached.
            return _texts(huggingface_hub.list_repo_files(self.name, revision=self.revision))

    def _cached_names(self) -> list[str]:
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    self.name, revision=self.revision, local_files_only=True
                )
            )
        except hf.LocalEntryNotFoundError as error:
            folder = Path(getattr(error, "snapshot_path", None) or os.devnull)
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]

    def get(self, name: str) -> Path:
        """Return the path of a file in the cache, after a download if needed."""
        with self._explained(name):
            path = Path(huggingface_hub.hf_hub_download(self.name, name, revision=self.revision))
            if not path.is_file():
                raise ValueError("an ETag that is no name of a file, such as .")
        # The cache names a large file by the SHA-256 that the Hub promises.
        promised = path.resolve().name
        if _IS_SHA256.fullmatch(promised) and sha256(path) != promised:
            raise InkdaskError(
                f"{path} is not the file that the Hub has: its SHA-256 is {sha256(path)[:12]}..., "
                f"not {promised[:12]}...; delete it and it will be downloaded again."
            )
        return path

    def pin(self, name: str, path: Path) -> dict[str, Any]:
        """Return the name of the file and its commit."""
        commit = path.parts[-1 - len(Path(name).parts)]  # .../snapshots/COMMIT/NAME
        return {"filename": name, "revision": commit}

    @contextmanager
    def _explained(self, name: str = "") -> Iterator[None]:
        """Turn errors of huggingface_hub into one sentence."""
        try:
            yield
        except hf.HFValidationError as error:
            raise InkdaskError(f"{self.name} is not the name of a repo.") from error
        except Exception as error:  # of any type, because the library trusts the answer
            raise InkdaskError(self._sentence(error, name)) from error

    def _sentence(self, error: Exception, name: str) -> str:
        file = f"{self}/{name}" if name else str(self)
        revision = self.revision or constants.DEFAULT_REVISION
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        is_old = response is not None and "expired" in response.headers.get("X-Error-Message", "")
        token = _place_of_token()
        remedy = f"the token in {token} does not open it" if token else "set HF_TOKEN"
        if isinstance(error, hf.GatedRepoError):
            return f"{self} is open to those who accept its terms on that page: {remedy}."
        is_refused = is_old or not isinstance(error, hf.RepositoryNotFoundError)
        if status == 401 and token and is_refused:
            return f"{constants.ENDPOINT} refuses the token in {token}: renew or remove it."
        if isinstance(error, hf.RepositoryNotFoundError) or status in (401, 403):
            return f"{self} does not exist, or it is private: {remedy}."
        if isinstance(error, hf.RevisionNotFoundError):
            return f"{self} has no revision {revision}."
        if isinstance(error, hf.RemoteEntryNotFoundError):
            return f"{self} has no file {name} at revision {revision}."
        if constants.HF_HUB_OFFLINE:
            return f"{file} is not in the cache, and HF_HUB_OFFLINE forbids to download it."
        if status is not None:
            return f"{file} cannot be read: the Hub answers with status {status}."
        if isinstance(error.__cause__ or error, _UNLIKE_THE_HUB):
            return (
                f"{file} cannot be read: {constants.ENDPOINT} does not answer as the Hugging Face "
                "Hub does; check HF_ENDPOINT, proxies, and whether this network wants a login."
            )
        disconnected = isinstance(error, hf.HTTPError)  # of its HTTP client
        if isinstance(error, hf.LocalEntryNotFoundError) or (disconnected and not name):
            return f"{file} is not in the cache, and the Hub cannot be reached."
        if disconnected or "Consistency check failed" in str(error):
            return f"The download of {file} broke off, and trying again did not help."
        return f"{file} cannot be had: {' '.join(str(error).split()).rstrip('.')}."


def _texts(names: Iterable[Any]) -> list[str]:
    """List names; other values are a TypeError, because the library trusts the answer."""
    return [str.__str__(name) for name in names]


def _place_of_token() -> str:
    """Return the variable or file that gives huggingface_hub its token; empty without a token."""
    names = ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    login: str = constants.HF_TOKEN_PATH if Path(constants.HF_TOKEN_PATH).is_file() else ""
    return next((name for name in names if os.environ.get(name, "").strip()), login)


class Bucket(WeightsSource):
    """Files below an ``s3://`` prefix, kept in a cache by their ETag.

    The cache is the folder ``inkdask`` in ``XDG_CACHE_HOME`` (``~/.cache``). A download has another
    name until it is whole, and resumes after an interruption.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __str__(self) -> str:
        return self.uri

    def names(self) -> list[str]:
        """Return the names of its files."""
        return [entry.name for entry in storage.list_folder(self.uri) if not entry.is_folder]

    def get(self, name: str) -> Path:
        """Return the path of a file in the cache, after a download if needed."""
        uri = storage.join(self.uri, name)
        size, etag = _size_and_etag(uri)
        cache = cache_home()
        folder = cache / hashlib.sha256(f"{uri} {size} {etag}".encode()).hexdigest()[:32]
        path, part = folder / name, folder / f"{name}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{name}.lock"):
                if not path.exists():
                    _download(uri, size, part)
                    _check(uri, size, etag, part)
                    part.replace(path)
        except OSError as error:
            raise InkdaskError(
                f"{uri} cannot be kept in the cache {cache}: {reason(error)}."
            ) from error
        return path


def _size_and_etag(uri: str) -> tuple[int, str]:
    system, path = storage.filesystem(uri)
    with storage.explained(uri):
        info = system.info(path)
    if info["type"] != "file":
        raise InkdaskError(f"{uri} is not a file.")
    return info["size"], info["ETag"].strip('"')


def _download(uri: str, size: int, part: Path) -> None:
    """Append the rest of an object to ``part``."""
    with part.open("ab") as file, ThreadPoolExecutor(_AT_ONCE) as pool:
        while (start := file.tell()) < size:
            stop = min(size, start + _BLOCK * _AT_ONCE)
            starts = range(start, stop, _BLOCK)
            stops = [min(stop, s + _BLOCK) for s in starts]
            for block in pool.map(storage.read_range, [uri] * len(starts), starts, stops):
                file.write(block)


def _check(uri: str, size: int, etag: str, part: Path) -> None:
    """Compare size, MD5 and ETag of a download with its object; delete a download that differs."""
    with part.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    # The ETag of an object in one piece is its MD5, unless a managed key encrypts the object.
    damaged = _IS_MD5.fullmatch(etag) and md5 != etag and not _has_managed_key(uri)
    if part.stat().st_size != size or damaged or _size_and_etag(uri) != (size, etag):
        part.unlink()
        raise InkdaskError(f"{uri} did not arrive as it is there, or was replaced; try again.")


def _has_managed_key(uri: str) -> bool:
    system, path = storage.filesystem(uri)
    bucket, key, _ = system.split_path(path)
    with storage.explained(uri):
        head = system.call_s3("head_object", Bucket=bucket, Key=key)
    return head.get("ServerSideEncryption", "AES256") != "AES256"
