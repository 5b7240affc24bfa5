"""The catalogue of the open bucket: ``metadata.json`` in its root names what lies where.

Other programs write it, and any of its fields may be missing, null or wrong. So it is searched for
what is needed, and the files themselves decide on shapes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from inkdask import storage
from inkdask.environment import cache_home
from inkdask.errors import InkdaskError, SettingsError
from inkdask.reading.pixel_size import halvings

OPEN_DATA = "https://vesuvius-challenge-open-data.s3.us-east-1.amazonaws.com"
VARIABLE = "INKDASK_CATALOGUE"
SHOWN = 8  # candidates that a sentence names

# Names of the bucket that holds the catalogue; a copy of it elsewhere holds the same files.
_OWN = re.compile(r"s3://vesuvius-challenge(-open-data)?/*")
_VOLUME = re.compile(r"surface-volumes/[^/]+\.(zarr|tifs)$")
_ID = re.compile(r"PHerc\w*(/[\w.-]+)?")


@dataclass(frozen=True)
class Published:
    """Segment of the catalogue.

    Attributes
    ----------
    sample, id
        Ids of the scroll and of the segment.
    names
        What a user may call the segment: its id, long id and folder.
    uri
        Folder of the segment.
    volumes
        Side of a pixel in micrometers, or None, by the URI of each surface volume.
    """

    sample: str
    id: str
    names: tuple[str, ...]
    uri: str
    volumes: dict[str, float | None]


def root_of(root: str | None) -> str:
    """Return the root of the catalogue: the given one, else ``INKDASK_CATALOGUE``, else public."""
    return (root or os.environ.get(VARIABLE) or OPEN_DATA).rstrip("/")


def is_id(path: str) -> bool:
    """Whether a path is an id of the catalogue, such as ``PHerc0139/2026``, and no local file."""
    return bool(_ID.fullmatch(path)) and not Path(path).exists()


def locate(path: str, root: str | None = None) -> str:
    """Return the folder of the segment that an id of the catalogue names; other paths unchanged."""
    if not path.strip():  # would be the current folder
        raise SettingsError("The path is empty: name a segment, a picture or a tile grid.")
    if not is_id(path):
        return path
    sample, _, words = path.partition("/")
    found = find(sample, root)
    exact = [it for it in found if words == it.id]
    fitting = exact or [it for it in found if any(name.startswith(words) for name in it.names)]
    if words and len(fitting) == 1:
        return fitting[0].uri
    names = [f"{it.sample}/{it.id}" for it in fitting or found]
    meant = f"{path} may be {_some(names)}" if fitting else f"{path} is none of {_some(names)}"
    raise InkdaskError(f"{meant}: name one segment of the catalogue {root_of(root)}.")


def find(sample: str, root: str | None = None) -> list[Published]:
    """Return the segments of the one sample that is called or begins so."""
    segments = read(root)
    samples = dict.fromkeys(it.sample for it in segments)
    fitting = [name for name in samples if name.startswith(sample)]
    fitting = [sample] if sample in fitting else fitting
    if len(fitting) != 1:
        says = f"may be {_some(fitting)}" if fitting else f"is none of {_some([*samples])}"
        raise InkdaskError(
            f"{sample} {says} in the catalogue {root_of(root)}, and there is no such file."
        )
    return [it for it in segments if it.sample == fitting[0]]


def volumes_of(uri: str, root: str | None = None) -> dict[str, float | None]:
    """Return the surface volumes of a segment's folder, as `Published.volumes`, below its URI."""
    for it in read(root):
        tail = "/".join(it.uri.split("/")[-3:])  # SAMPLE/segments/FOLDER
        if uri.endswith(f"/{tail}"):
            return {uri + volume[len(it.uri) :]: um for volume, um in it.volumes.items()}
    return {}


def pixel_um(uri: str, root: str | None = None) -> float | None:
    """Return the pixel size of a surface volume in the catalogue's own bucket; None elsewhere."""
    root = root_of(root)
    inside = re.sub(_OWN, f"{root}/", uri) if root == OPEN_DATA else uri
    if not inside.startswith(f"{root}/"):
        return None
    with suppress(InkdaskError):  # the name may tell
        return next((um for it in read(root) if (um := it.volumes.get(inside))), None)
    return None


def read(root: str | None = None) -> list[Published]:
    """Read the segments of a catalogue; it is fetched anew where its ETag has changed."""
    root = root_of(root)
    uri = storage.join(root, "metadata.json")
    return _parse(root, uri, storage.entry(uri).mark)


@lru_cache(maxsize=4)
def _parse(root: str, uri: str, mark: str) -> list[Published]:
    with storage.decoded(uri):
        data = _fetch(uri, mark)
        # The bucket serves it compressed without saying so.
        told = json.loads(gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data)
    samples = _dict(_in(told, "samples"))
    if not samples:
        raise InkdaskError(f"{uri} is no catalogue: it names no samples.")
    return [
        _segment(root, str(name), sample, str(number), _dict(segment))
        for name, sample in samples.items()
        for number, segment in _dict(_in(sample, "segments")).items()
    ]


def _fetch(uri: str, mark: str) -> bytes:
    """Read a file, or the copy that this user keeps of it."""
    if storage.is_local(uri):
        return storage.read_bytes(uri)
    base = cache_home()
    place = hashlib.sha256(uri.encode()).hexdigest()[:16]
    kept = base / f"{place}-{hashlib.sha256(mark.encode()).hexdigest()[:16]}.catalogue"
    with suppress(OSError):
        return kept.read_bytes()
    data = storage.read_bytes(uri)
    with suppress(OSError, InkdaskError):  # as in a container that may not write
        storage.write_bytes(str(kept), data)
        for old in base.glob(f"{place}-*.catalogue"):
            if old != kept:
                old.unlink()
    return data


def _segment(root: str, sample: str, of: Any, number: str, told: dict[str, Any]) -> Published:
    places = [place for item in _list(told.get("data")) for place in _places(root, item)]
    folders = [uri[: m.end()] for uri, _ in places if (m := re.search(r"/segments/[^/]+", uri))]
    long_id = str(told.get("long_id") or number)
    folder = folders[0] if folders else storage.join(root, sample, "segments", long_id)
    volumes: dict[str, float | None] = {}
    for uri, target in places:
        if _VOLUME.search(uri):
            name = uri.rsplit("/", 1)[-1]
            scan = re.search(r"volume-(\d+)", name)
            side = _pitch(of, scan[1] if scan else target)
            volumes[uri] = side and side * 2 ** halvings(name)
    names = number, long_id, folder.rsplit("/", 1)[-1]
    return Published(sample, number, names, folder, volumes)


def _places(root: str, item: Any) -> Iterator[tuple[str, str]]:
    """Yield the URI of each origin of an item, and the volume that it belongs to."""
    for origin in _list(_in(item, "origins")):
        path = _in(origin, "path") or _in(origin, "url") or _in(origin, "uri")
        if not isinstance(path, str):
            continue
        roots = [it for it in _list(_in(origin, "access_roots")) if _in(it, "url")]
        public = [str(it["url"]) for it in roots if _in(it, "usage") == "public-read"]
        base = public[0] if public else ""
        base = root if not base or _OWN.fullmatch(f"{base}/") else base
        uri = path if "://" in path else storage.join(base, path.lstrip("/"))
        yield uri.rstrip("/"), str(_in(item, "parameters", "target_volume"))


def _pitch(sample: Any, volume: str) -> float | None:
    """Return the side of a voxel of a volume, or that of its scan, in micrometers."""
    told = _in(sample, "volumes", volume)
    scan = _in(sample, "scans", str(_in(told, "scan_id")))
    for it in (told, scan):
        side = _in(it, "properties", "pixel_size_um")
        if isinstance(side, int | float) and side > 0:
            return float(side)
    return None


def _in(value: Any, *keys: str) -> Any:
    """Return what lies under the keys; None where something on the way is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + f" and {more} more" * (more > 0)
