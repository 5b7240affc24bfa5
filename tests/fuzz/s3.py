"""An S3 server that answers wrongly: status, headers, bodies cut or spoiled, redirects."""

import contextlib
import hashlib
import re
import threading
import xml.sax.saxutils as xml
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import tenacity
import zarr

from inkdask import storage
from inkdask.models.sources import Bucket
from inkdask.segment import open_segment
from inkdask.storage import outputs, parallel, s3
from tests.files import encode, random_volume
from tests.fuzz import spoil
from tests.fuzz.campaign import environment

STATUSES = (
    100, 200, 204, 206, 301, 302, 304, 307, 400, 401, 403, 404, 405, 409, 412, 416, 429, 499, 500,
    501, 503, 599,
)  # fmt: skip
HEADERS = (
    "Content-Type", "ETag", "Last-Modified", "Location", "Transfer-Encoding", "Content-Encoding",
    "x-amz-bucket-region", "Connection",
)  # fmt: skip
# Nobody can tell NoSuchKey from an object that is not there.
CODES = ("AccessDenied", "NoSuchBucket", "SlowDown", "ExpiredToken", "InvalidRange",
         "PermanentRedirect", "AuthorizationHeaderMalformed", "Nonsense", "")  # fmt: skip


class Server(ThreadingHTTPServer):
    """Serves ``objects`` of the bucket ``b``, and spoils a ``share`` of the answers."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, objects):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects = objects
        self.rng, self.share, self.statuses = None, 0.0, STATUSES

    def handle_error(self, *_):
        """Ignore clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5

    def log_message(self, *_):
        pass

    def answer(self):
        """Make the right answer, spoil it now and then, and send it."""
        if self.headers.get("Expect"):
            self.send_response_only(100)
            self.end_headers()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, headers, body = self.right()
        rng, fault = self.server.rng, 0
        if rng.random() < self.server.share:
            fault = int(rng.integers(1, 10))
            statuses = self.server.statuses
            status, headers, body, fault = spoiled(rng, statuses, status, headers, body, fault)
        if fault == 9:
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(f"HTTP/1.1 {status} x\r\n".encode())
        for name, value in headers.items():
            self.wfile.write(f"{name}: {value}\r\n".encode("latin1", "replace"))
        self.wfile.write(b"\r\n")
        if self.command != "HEAD":
            self.wfile.write(body)
        if fault or "Content-Length" not in headers:
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = answer  # noqa: N815

    def right(self):
        """Return status, headers and body as S3 answers."""
        url = urlsplit(self.path)
        key = unquote(url.path).removeprefix("/b").strip("/")
        asked = parse_qs(url.query)
        if "list-type" in asked:
            return answer_of(listing(self.server.objects, asked))
        if self.command in ("PUT", "DELETE", "POST"):
            return answer_of(b"") if self.command == "PUT" else (204, {}, b"")
        data = self.server.objects.get(key)
        if data is None:
            return answer_of(error_of("NoSuchKey"), 404)
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        headers["Last-Modified"] = "Sat, 28 Nov 2026 00:00:00 GMT"
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(span[1]), min(int(span[2] or len(data) - 1) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return answer_of(data[start:stop], 206, headers)
        return answer_of(data, 200, headers)


def answer_of(body, status=200, headers=None):
    return status, {**(headers or {}), "Content-Length": str(len(body))}, body


def error_of(code):
    return f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()


def listing(objects, asked):
    """Return the XML of a listing."""
    prefix = asked.get("prefix", [""])[0]
    delimiter = asked.get("delimiter", [""])[0]
    keys, folders = [], set()
    for key in sorted(objects):
        if key.startswith(prefix):
            head, found, _ = key[len(prefix) :].partition(delimiter or "\0")
            if found:
                folders.add(prefix + head + found)
            else:
                keys.append(key)
    contents = "".join(
        f"<Contents><Key>{xml.escape(key)}</Key><Size>{len(objects[key])}</Size>"
        f"<LastModified>2026-11-28T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{hashlib.md5(objects[key]).hexdigest()}&quot;</ETag></Contents>"
        for key in keys
    )
    shared = "".join(
        f"<CommonPrefixes><Prefix>{xml.escape(it)}</Prefix></CommonPrefixes>" for it in folders
    )
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>b</Name><KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>"
        f"{contents}{shared}</ListBucketResult>"
    ).encode()


def spoiled(rng, statuses, status, headers, body, fault):
    """Change an answer such that a client can know it; 0 for a fault that is none."""
    is_xml = body.startswith(b"<")
    if fault == 1:
        status = int(spoil.choice(rng, statuses))
        if status >= 400:
            _, headers, body = answer_of(error_of(spoil.choice(rng, CODES)))
    elif fault == 2:
        headers.pop(spoil.choice(rng, [*headers]), None)
    elif fault == 3 and not is_xml:
        length = spoil.number(rng)
        if status == 206 or length > len(body):  # nobody can tell a shorter one from a whole file
            headers["Content-Length"] = str(length)
    elif fault == 4:
        value = spoil.choice(rng, [*spoil.TEXTS, str(spoil.number(rng))])
        headers[spoil.choice(rng, HEADERS)] = value.replace("\n", " ").replace("\r", "")
    elif fault == 5:  # the connection ends early
        body = body[: len(body) // 2]
    elif fault == 6 and is_xml:
        status, headers, body = answer_of(spoil.change(rng, body), status)
    elif fault == 7 and is_xml:
        tags = re.findall(rb">[^<]+<", body) or [b">"]
        text = str(spoil.choice(rng, [*spoil.TEXTS[:30], spoil.number(rng)]))
        text = xml.escape(text).encode("utf-8", "replace")
        body = body.replace(spoil.choice(rng, tags), b">" + text + b"<", 1)
        status, headers, body = answer_of(body, status)
    elif fault == 8 and (is_xml or status == 206):  # nobody can tell it from a whole file
        page = b"<html><body>Please log in</body></html>"
        status, headers, body = answer_of(page, 200, {"Content-Type": "text/html"})
    return status, headers, body, fault


@contextlib.contextmanager
def opened(home, reader=None):
    """Yield the reader of one input."""
    parallel._here.is_in_pool = True  # one request at a time, so that an input can be repeated
    zarr.config.set({"async.concurrency": 1})
    s3.READ_TIMEOUT = s3.CONNECT_TIMEOUT = 0.3
    s3.wait_random_exponential = lambda **_: tenacity.wait_none()
    volume = random_volume((2, 40, 50), "|u1")
    objects = {f"seg/layers/{at:02d}.tif": encode(layer) for at, layer in enumerate(volume)}
    zarr.create_array(home / "v.zarr", data=volume, chunks=(2, 32, 32))
    for path in Path(home / "v.zarr").rglob("*"):
        if path.is_file():
            objects[str(path.relative_to(home))] = path.read_bytes()
    server = Server(objects)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "XDG_CACHE_HOME": str(home / "cache"),
    }  # fmt: skip
    with environment(**variables):
        yield lambda rng, folder: (reader or read)(rng, server, volume)
    server.shutdown()


def spoil_some(server, rng):
    """Let the server spoil a share of its answers."""
    server.rng, server.share = rng, float(spoil.choice(rng, (0.1, 0.3, 1.0)))


def read(rng, server, volume):
    """Do one of the things that a job does on S3, and compare."""
    spoil_some(server, rng)
    what = rng.integers(7)
    name = spoil.choice(rng, ("seg", "v.zarr"))
    if what < 3:
        segment = open_segment(f"s3://b/{name}", (0, 2))  # a listing may lack a layer
        got = segment.volume.compute(scheduler="synchronous")
        np.testing.assert_array_equal(got, volume)
    elif what == 3:
        key = spoil.choice(rng, sorted(server.objects))
        assert storage.read_bytes(f"s3://b/{key}") == server.objects[key]
    elif what == 4:
        uri = "s3://b/seg/layers"
        folder = Bucket(uri)
        assert folder.get("00.tif").read_bytes() == server.objects["seg/layers/00.tif"]
    elif what == 5:
        storage.write_bytes("s3://b/out/x.png", b"x" * 1000)
        outputs.check_writable("s3://b/out/y.png")
    else:
        outputs.remove(f"s3://b/{name}")
    return "read"
