"""An HTTP proxy that fails on purpose: ``python -m tests.faultproxy PORT UPSTREAM``.

Every ``every``-th request whose ``METHOD path`` matches fails, by turns in each of the ways named
in ``kinds``:

``503``, ``500``, ``403``, ``expired``, ``stranger``
    The answer is that of S3 when it is busy or broken, refuses a right, or does not accept the
    token or the key; for a request of STS, which has the path ``/``, that of STS.
``other``
    The answer of S3 to a request of STS.
``reset``
    The connection is dropped before the answer.
``truncate``
    The connection is dropped in the middle of the body.
``stall``
    There is never an answer.
"""

import asyncio
import itertools
import json
import re
import sys
import urllib.request

import aiohttp
from aiohttp import web

CODES = {
    "503": (503, "SlowDown"), "500": (500, "InternalError"), "403": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"), "stranger": (403, "InvalidAccessKeyId"),
    "other": (405, "MethodNotAllowed"),
}  # fmt: skip
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive"}


class FaultProxy:
    """The tests' end of a proxy at ``url``."""

    def __init__(self, url):
        self.url = url

    def inject(self, kinds=(), every=1, match="", latency=0.0):
        """Fail from now on; without ``kinds`` everything works. Latency is in seconds."""
        faults = {"kinds": kinds, "every": every, "match": match, "latency": latency}
        self._control(json.dumps(faults).encode())

    def injected(self):
        """How often each kind has failed a request since `inject`."""
        return self._control(None)

    def _control(self, data):
        with urllib.request.urlopen(f"{self.url}/__faults", data) as answer:
            return json.load(answer)


class Proxy:
    """The server."""

    def __init__(self, upstream):
        self.upstream = upstream
        self.set({"kinds": [], "every": 1, "match": "", "latency": 0})

    def set(self, faults):
        self.faults = faults
        self.kinds = itertools.cycle(faults["kinds"])
        self.matched = 0
        self.injected = {}

    async def control(self, request):
        if request.method == "POST":
            self.set(await request.json())
        return web.json_response(self.injected)

    def fault(self, request):
        """Name the way in which this request is to fail; None lets it pass."""
        if not re.search(self.faults["match"], f"{request.method} {request.path_qs}"):
            return None
        self.matched += 1
        if not self.faults["kinds"] or self.matched % self.faults["every"]:
            return None
        kind = next(self.kinds)
        self.injected[kind] = self.injected.get(kind, 0) + 1
        return kind

    async def handle(self, request):
        kind = self.fault(request)
        await asyncio.sleep(self.faults["latency"])
        if kind == "stall":
            await asyncio.sleep(3600)
        if kind == "reset":
            request.transport.abort()
            return web.Response()
        if kind in CODES:
            await request.read()
            status, code = CODES[kind]
            # As Ceph, which says no more where it does not know a key.
            words = "" if kind == "stranger" else f"<Message>{code}</Message>"
            body = f"<Error><Code>{code}</Code>{words}</Error>"
            if request.path == "/" and kind != "other":
                body = f"<ErrorResponse>{body}</ErrorResponse>"
            return web.Response(status=status, text=body, content_type="application/xml")
        return await self.forward(request, truncate=kind == "truncate")

    async def forward(self, request, truncate):
        async with self.client.request(
            request.method,
            self.upstream + request.raw_path,
            headers=end_to_end(request.headers),
            data=await request.read() or None,
            allow_redirects=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        ) as answer:
            response = web.StreamResponse(status=answer.status, headers=end_to_end(answer.headers))
            await response.prepare(request)
            body = await answer.read()
            await response.write(body[: len(body) // 2] if truncate else body)
            if truncate:
                request.transport.abort()
            else:
                await response.write_eof()
            return response

    async def open_client(self, _):
        async with aiohttp.ClientSession(auto_decompress=False) as self.client:
            yield

    def app(self):
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/__faults", self.control)
        app.router.add_route("*", "/{path:.*}", self.handle)
        app.cleanup_ctx.append(self.open_client)
        return app


def end_to_end(headers):
    return {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP}


if __name__ == "__main__":
    port, upstream = sys.argv[1:]
    web.run_app(
        Proxy(upstream).app(), host="127.0.0.1", port=int(port), print=None, access_log=None
    )
