"""A small open bucket as the Vesuvius Challenge publishes its data, and an HTTP server for it."""

import gzip
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import zarr

from tests.files import encode, random_volume

SAMPLE = "PHercTest1"
ONE, TWO, NONE = "20990102030405-one", "20990203040506", "20990304050607-mesh"
FINE = "2.400um-0.22m-77keV-volume-20990101000000"
COARSE = "9.362um-1.2m-113keV-volume-20990101000001"
LAYERS = random_volume((6, 140, 300), "|u1")
COARSE_LAYERS = random_volume((5, 70, 90), "|u1", seed=1)
WRONG_SCALE = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]


def write_group(folder, layers, *, levels=1, scale=WRONG_SCALE, unit="nanometer", **attributes):
    """Write layers as the community's renderer does: zarr 2, chunks over all layers, no codec."""
    axes = [{"name": name, "type": "space", "unit": unit} for name in "zyx"]
    datasets = [{"path": str(i), "coordinateTransformations": scale} for i in range(levels)]
    multiscales = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    group = zarr.create_group(
        str(folder), zarr_format=2, attributes={"multiscales": multiscales, **attributes}
    )
    for level in range(levels):
        data = layers[:, :: 2**level, :: 2**level]
        array = group.create_array(
            str(level),
            shape=data.shape,
            dtype="u1",
            chunks=(len(layers), 128, 128),
            compressors=None,
            chunk_key_encoding={"name": "v2", "separator": "/"},
        )
        array[:] = data
    return folder


def write_bucket(root):
    """Write the bucket, with its catalogue, to a folder; return the folder."""
    segments = root / SAMPLE / "segments"
    volumes = segments / ONE / "surface-volumes"
    write_group(volumes / f"{FINE}.zarr", LAYERS, levels=2)
    for number, layer in enumerate(LAYERS):
        file = volumes / f"{FINE}.tifs" / f"{number:02d}.tif"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encode(layer, tile=(16, 304), compression="lzw"))
    write_group(segments / TWO / "surface-volumes" / f"{FINE}.zarr", LAYERS)
    write_group(segments / TWO / "surface-volumes" / f"{COARSE}.zarr", COARSE_LAYERS)
    (segments / NONE / "mesh").mkdir(parents=True)
    (segments / NONE / "mesh" / "meta.json").write_text("{}")
    (root / "metadata.json").write_bytes(gzip.compress(json.dumps(catalogue()).encode()))
    return root


def catalogue():
    """Return a catalogue with the oddities of the real one: nulls, missing fields, wrong shapes."""
    roots = [{"type": "s3", "url": "s3://vesuvius-challenge-open-data/", "usage": "public-read"}]

    def item(kind, path, key="path"):
        return {"type": kind, "origins": [{key: path, "access_roots": roots}], "parameters": None}

    def volume(segment, name, key="path"):
        path = f"{SAMPLE}/segments/{segment}/surface-volumes/{name}.zarr/"
        return {**item("layers-zarr", path, key), "properties": {"shape": [1, 2, 3]}}

    def mesh(segment):
        return item("tifxyz", f"{SAMPLE}/segments/{segment}/mesh/tifxyz/")

    sample = {
        "sample": None,
        "scans": {"7": {"properties": {"pixel_size_um": 2.4}}},
        "volumes": {
            "20990101000000": {"scan_id": "7", "properties": {"pixel_size_um": None}},
            "20990101000001": {"properties": {"shape": None, "pixel_size_um": 9.362}},
        },
        "segments": {
            ONE[:14]: {"long_id": ONE, "data": [mesh(ONE), volume(ONE, FINE, "uri"), None]},
            TWO: {"data": [volume(TWO, FINE), volume(TWO, COARSE)], "creation": {"date": "?"}},
            NONE[:14]: {"long_id": NONE, "data": [mesh(NONE)], "properties": None},
        },
    }
    return {"samples": {SAMPLE: sample, "PHercEmpty": None}, "models": None}


class Site:
    """A server of one folder: byte ranges and ETags, and no listings.

    ``missing`` is the answer to a name that is not there. Every ``broken``-th request whose path
    matches ``matching`` is answered 503. Requests without the ``login``, where there is one, are
    answered 401. A site that ``is_strict`` knows If-Match, which no weak ``tag`` matches. ``log``
    has method, path and bytes sent of all others.
    """

    def __init__(self, root):
        self.root, self.missing, self.broken, self.matching = Path(root), 404, 0, r"/\d+$"
        self.log, self.matched, self.login = [], 0, ""
        self.is_strict, self.tag = False, '"{}"'
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                site.answer(self)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request):
        path = unquote(request.path).lstrip("/")
        file = self.root / path
        status, body, headers = self.missing, b"", {}
        if self.broken and re.search(self.matching, request.path):
            self.matched += 1
        if self.matched and self.matched % self.broken == 0 and re.search(self.matching, path):
            status = 503
        elif self.login and request.headers.get("Authorization") != self.login:
            status = 401
        elif file.is_file():
            status, body = 200, file.read_bytes()
            headers = {"ETag": self.tag.format(hashlib.md5(body).hexdigest())}
            match = request.headers.get("If-Match") if self.is_strict else None
            if match and (match.startswith("W/") or match != headers["ETag"]):
                status, body = 412, b""
            elif found := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range") or ""):
                status, body = 206, body[int(found[1]) : int(found[2]) + 1]
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        is_sent = request.command == "GET"
        self.log.append((request.command, path, len(body) if is_sent else 0))
        if is_sent:
            request.wfile.write(body)

    def sent(self, matching=""):
        """Bytes of the bodies that were sent for paths that match."""
        return sum(size for _, path, size in self.log if re.search(matching, path))


@contextmanager
def serving(root):
    """Serve a folder over HTTP inside the block."""
    site = Site(root)
    thread = threading.Thread(target=site.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield site
    site.server.shutdown()
    site.server.server_close()
    thread.join()


def upload(root, uri):
    """Copy all files of a folder below an ``s3://`` URI."""
    from inkdask import storage

    for file in root.rglob("*"):
        if file.is_file():
            storage.write_bytes(f"{uri}/{file.relative_to(root)}", file.read_bytes())


def needed(folder):
    """Bytes of all chunks of an uncompressed array of zarr 2."""
    told = json.loads((folder / ".zarray").read_text())
    counts = [-(-side // chunk) for side, chunk in zip(told["shape"], told["chunks"], strict=True)]
    return int(np.prod(counts) * np.prod(told["chunks"]))
