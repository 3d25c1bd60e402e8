"""A Hugging Face hub on this machine: as much of its API as a download asks for, with faults on demand.

What the real one answers: https://huggingface.co/docs/hub/api; the codes: `hf_raise_for_status` of huggingface_hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_valid_token"


@dataclass
class Repo:
    """access: open, gated (its files need a token) or private (everything does). commit: 40 hexadecimal digits."""

    files: dict[str, bytes]
    commit: str = "c0ffee" + "0" * 34
    access: str = "open"
    xet: bool = False


@dataclass(frozen=True)
class Cut:
    """Break the connection after `after` bytes of a file's content. reset: rudely (RST) instead of by an early end."""

    after: int
    reset: bool = False


@dataclass(frozen=True)
class Seen:
    """A request that came. start: first byte of the range that it asked for."""

    method: str
    path: str
    start: int
    token: str | None


@dataclass
class HubServer:
    """Serves `repos` (by id) on `endpoint` while entered. cuts: by file name, taken from the front as they happen.

    down: answer everything with that status. xet_storage: the address that files of repositories with `xet` are said
    to have in Xet; None: this server has no route that says it, as mirrors have not.
    """

    repos: dict[str, Repo]
    cuts: dict[str, list[Cut]] = field(default_factory=dict)
    down: int | None = None
    xet_storage: str | None = None
    seen: list[Seen] = field(default_factory=list)
    endpoint: str = ""

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def gets(self, name: str) -> list[Seen]:
        """The requests for the content of a file."""
        return [seen for seen in self.seen if seen.method == "GET" and seen.path.endswith(f"/{name}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: pytest shows what is printed as the output of some test."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.server_hub.seen.append(Seen(self.command, path, start, token))
        if self.server_hub.down is not None:
            self._send(self.server_hub.down, b"down")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            self._answer_api(match[1], match[2], match[3], token)
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/xet-read-token/[^/]+", path):
            self._answer_xet()
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._answer_file(match[1], match[2], match[3], token, start)
        else:
            self._refuse(404, "Unknown", "no such route")

    def _repo(self, name: str, revision: str, token: str | None, *, content: bool) -> Repo | None:
        """The repository if this request may see it; else the refusal is sent."""
        if token is not None and token != TOKEN:
            self._refuse(401, None, "Invalid credentials in Authorization header")
            return None
        repo = self.server_hub.repos.get(name)
        if repo is None or (repo.access == "private" and token is None):
            self._refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
            return None
        if repo.access == "gated" and content and token is None:
            self._refuse(401, "GatedRepo", f"Access to model {name} is restricted.")
            return None
        if repo.access == "forbidden":
            self._refuse(403, None, "This token may not read that.")
            return None
        if revision not in ("main", repo.commit):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo

    def _answer_api(self, name: str, kind: str, revision: str, token: str | None) -> None:
        repo = self._repo(name, revision, token, content=False)
        if repo is None:
            return
        if kind == "tree":
            content: object = [
                {"type": "file", "path": path, "size": len(data), "oid": _etag(data)}
                for path, data in sorted(repo.files.items())
            ]
        else:
            siblings = [{"rfilename": path} for path in sorted(repo.files)]
            content = {"_id": "1", "id": name, "modelId": name, "sha": repo.commit, "siblings": siblings}
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, name: str, revision: str, path: str, token: str | None, start: int) -> None:
        repo = self._repo(name, revision, token, content=True)
        if repo is None:
            return
        if path not in repo.files:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repo.commit})
            return
        data = repo.files[path]
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if repo.xet:
            route = f"{self.server_hub.endpoint}/api/models/{name}/xet-read-token/{repo.commit}"
            headers |= {"X-Xet-Hash": hashlib.sha256(data).hexdigest(), "X-Xet-Refresh-Route": route}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[start:], headers, self._cut(path))

    def _answer_xet(self) -> None:
        if self.server_hub.xet_storage is None:
            self._refuse(404, None, "no such route")
            return
        names = {"X-Xet-Cas-Url": self.server_hub.xet_storage, "X-Xet-Access-Token": "t"}
        self._send(200, b"{}", names | {"X-Xet-Token-Expiration": "9999999999"})

    def _cut(self, path: str) -> Cut | None:
        cuts = self.server_hub.cuts.get(path)
        return cuts.pop(0) if cuts and self.command == "GET" else None

    def _refuse(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(
            status, b"", {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        )

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, cut: Cut | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data if cut is None else data[: cut.after])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            if cut.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())
            else:
                self.connection.shutdown(socket.SHUT_WR)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
