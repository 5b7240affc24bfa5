"""A Hugging Face Hub that answers wrongly."""

import contextlib
import json
import shutil
import threading
from unittest import mock

from huggingface_hub import constants, hf_api

from inkdask.models import registry, sources
from tests.fuzz import spoil
from tests.hub_server import FakeRepo, HubServer, _Handler

FILE = "{repo_id}/resolve/{revision}/{filename}"
WEIGHTS = bytes(range(256)) * 40
STATUSES = (200, 204, 206, 301, 302, 307, 400, 401, 403, 404, 416, 429, 500, 503, 599)
HEADERS = ("Content-Length", "Content-Range", "Content-Type", "ETag", "X-Linked-Etag", "Location",
           "X-Linked-Size", "X-Repo-Commit", "X-Error-Code", "Content-Encoding")  # fmt: skip


class Handler(_Handler):
    """Spoils answers of `HubServer`."""

    rng, share = None, 0.0

    def _send(self, status, body=b"", headers=None, error=None, cut=False):
        headers, rng = dict(headers or {}), self.rng
        while rng.random() < self.share:
            how = rng.integers(6)
            if how == 0:
                status = int(spoil.choice(rng, STATUSES))
            elif how == 1 and headers:
                headers.pop(spoil.choice(rng, list(headers)))
            elif how == 2:
                value = str(spoil.choice(rng, (*spoil.TEXTS, *spoil.INTEGERS, f'"{"0" * 64}"')))
                value = value.replace("\n", " ").encode("latin1", "ignore").decode("latin1")
                headers[spoil.choice(rng, HEADERS)] = value
            elif how == 3 and body.startswith(b"{"):
                body = spoil.change_text(rng, body.decode())
            elif how == 4:
                cut = True
            elif how == 5:
                body = b"<html>Please log in</html>"
        if length := headers.pop("Content-Length", ""):  # the right one comes, too
            headers["content-length"] = length
        try:
            super()._send(status, body, headers, error, cut)
        except UnicodeError:
            self.close_connection = True


@contextlib.contextmanager
def opened(home):
    """Yield the reader of one input."""
    repo = FakeRepo({"a.safetensors": WEIGHTS, "inkdask.json": json.dumps({"layers": 18}).encode()})
    server = HubServer({"ink/open": repo})
    server.RequestHandlerClass = Handler
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    # huggingface_hub has read its environment when it was imported.
    patches = [
        mock.patch.object(constants, "ENDPOINT", server.url),
        mock.patch.object(constants, "HF_HUB_OFFLINE", False),
        mock.patch.object(constants, "HF_HUB_CACHE", str(home / "cache")),
        mock.patch.object(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1),
        mock.patch.object(constants, "HF_HUB_ETAG_TIMEOUT", 1),
        mock.patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{FILE}"),
        mock.patch.object(hf_api.api, "endpoint", server.url),
        mock.patch("time.sleep"),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield lambda rng, folder: read(rng, home / "cache")
    server.shutdown()


def read(rng, cache):
    """Fetch the weights and their description into an empty cache."""
    shutil.rmtree(cache, ignore_errors=True)
    Handler.rng, Handler.share = rng, float(spoil.choice(rng, (0.1, 0.3, 0.8)))
    if rng.integers(2):
        network = registry.resolve("ink/open", model_type="resnet3d-50")
        assert network.layers in (18, 26)
        return "read" if network.layers == 18 else "unjudged"
    path = sources.Repo("ink/open", None).get("a.safetensors")
    return "read" if path.read_bytes() == WEIGHTS else "unjudged"
