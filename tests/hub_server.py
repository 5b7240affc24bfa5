"""A stand-in for the Hugging Face Hub on the loopback: the few routes that a download uses."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class FakeRepo:
    """Files of one commit; ``token`` makes the repo private, ``gated`` asks for accepted terms.

    ``fault`` is how the way to it misbehaves: ``login page`` and ``other JSON`` answer everything,
    ``no headers`` drops those of the Hub, ``odd names`` lists a number as the name of a file,
    ``ETag .`` has that ETag, and ``bad token`` refuses any token.
    """

    files: dict[str, bytes]
    token: str | None = None
    gated: bool = False
    fault: str = ""
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    cut: dict[str, int] = field(default_factory=dict)  # how many answers end halfway, by file


class HubServer(ThreadingHTTPServer):
    """Serves ``repos`` by ``owner/name``; ``requests`` lists (method, path, range header)."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, repos: dict[str, FakeRepo]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self, name: str) -> list[str | None]:
        """Return the range header of every GET of a file."""
        return [
            span for method, path, span in self.requests if method == "GET" and path.endswith(name)
        ]

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        owner, name, _, revision, *rest = (parts[2:] if listing else parts) + [""] * 4
        repo = self.server.repos.get(f"{owner}/{name}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo and repo.fault in ("login page", "other JSON"):
            body = b"<html>Log in</html>" if repo.fault == "login page" else b'{"error": "log in"}'
            self._send(200, body, {"Content-Type": "text/html"})
        elif repo and repo.fault == "bad token" and token:
            words = "Invalid credentials in Authorization header"
            self._send(401, headers={"X-Error-Message": words})
        elif repo and repo.fault == "old token" and token:
            self._send(401, headers={"X-Error-Message": 'User Access Token "ink" is expired'})
        elif repo is None or (repo.token and token != repo.token):
            # The Hub does not tell strangers whether a private repo exists.
            self._send(404 if token else 401, error="RepoNotFound" if token else None)
        elif revision not in ("", "main", repo.commit):
            self._send(404, error="RevisionNotFound")
        elif listing:
            names = [7] * (repo.fault == "odd names")
            siblings = [{"rfilename": file} for file in (*names, *repo.files)]
            info = {"id": f"{owner}/{name}", "sha": repo.commit, "siblings": siblings}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif repo.gated:
            self._send(403, error="GatedRepo")
        else:
            self._send_file(repo, "/".join(filter(None, rest)))

    def _send_file(self, repo: FakeRepo, name: str) -> None:
        data = repo.files.get(name)
        headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if data is None:
            return self._send(404, headers=headers, error="EntryNotFound")
        sha256 = "." if repo.fault == "ETag ." else hashlib.sha256(data).hexdigest()
        headers |= {"ETag": f'"{sha256}"', "X-Linked-Etag": f'"{sha256}"'}
        headers["X-Linked-Size"] = str(len(data))
        if repo.fault == "no headers":
            headers = {}
        status, start = 200, 0
        if span := self.headers.get("Range"):
            status, start = 206, int(span.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if self.command == "GET" and repo.cut.get(name, 0) > 0:
            repo.cut[name] -= 1
            return self._send(status, body, headers, cut=True)
        return self._send(status, body, headers)

    def _send(
        self,
        status: int,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        error: str | None = None,
        cut: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut
