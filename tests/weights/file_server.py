"""A file server on 127.0.0.1 for tests: ranges, versions, faults, and the Hub's protocol.

It answers plain paths, and the requests with which ``huggingface_hub`` reads model repositories.
"""

import hashlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

__all__ = ["Answered", "Faults", "FileServer", "Repository", "isolate", "point_hub_at"]


@dataclass
class Answered:
    """One request and the bytes of its answer's body."""

    method: str
    path: str
    range: tuple[int, int] | None  # first byte, byte after the last; of a 206
    status: int
    headers: dict[str, str]  # of the request
    sent: int = 0


@dataclass
class Faults:
    """What the server does wrong; changed at will between or during requests."""

    ignore_ranges: bool = False
    shift: int = 0  # sends a range that lies this many bytes further on
    statuses: list[int] = field(default_factory=list)  # of the next requests, instead of answers
    cut_each_after: int | None = None  # bytes of body of each answer
    budget: int | None = None  # bytes of body in all, then the line is dead
    pace: float = 0.0  # seconds before each 64 KiB
    without_versions: bool = False  # neither ETag nor Last-Modified
    before: Callable[[int], None] | None = None  # called with the number of requests so far


@dataclass
class Repository:
    """A model repository of the Hub: one commit, on branch ``main``."""

    files: dict[str, bytes]
    gated: bool = False

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()


class FileServer:
    """``with FileServer() as server:`` serves ``server.files`` at ``server.url + path``.

    Attributes:
        files: Content by path, such as ``/ijepa/a.pth.tar``.
        repositories: By name, such as ``facebook/ijepa_vith14_1k``; served as the Hub does.
        faults: What goes wrong.
        answered: All requests so far.
        token: When set, repositories are shown only to requests that carry it.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repositories: dict[str, Repository] = {}
        self.faults = Faults()
        self.answered: list[Answered] = []
        self.token: str | None = None
        self.guard = threading.Lock()
        server = self

        class Handler(_Handler):
            files = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "FileServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def sent(self) -> int:
        """Bytes of file contents sent so far."""
        return sum(request.sent for request in self.answered)

    def forget(self) -> None:
        """Start the count anew, without faults."""
        self.answered, self.faults = [], Faults()


def isolate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what the machine's environment says about offline mode, proxies and tokens."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1")


def point_hub_at(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``huggingface_hub`` in this process take the server for the Hub.

    It reads ``HF_ENDPOINT`` when it is imported; another process just needs the variable.
    """
    from huggingface_hub import constants

    isolate(monkeypatch)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_ENDPOINT", server.url)


class _Handler(BaseHTTPRequestHandler):
    files: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, faults = self.files, self.files.faults
        with server.guard:
            count = len(server.answered)
            answer = Answered(self.command, self.path, None, 0, dict(self.headers))
            server.answered.append(answer)
            status = faults.statuses.pop(0) if faults.statuses else None
        self.answer = answer
        if faults.before is not None:
            faults.before(count)
        if faults.budget is not None and server.sent >= faults.budget:
            self.close_connection = True  # closed without an answer
        elif status is not None:
            self._say(status, {}, b"")
        else:
            self._route(urllib.parse.unquote(self.path.split("?")[0]))

    def _route(self, path: str) -> None:
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        if resolve:
            self._hub_file(*resolve.groups())
        elif api:
            self._hub_api(*api.groups())
        elif path in self.files.files:
            self._file(self.files.files[path], {})
        else:
            self._say(404, {}, b"")

    # --- the Hub

    def _repository(self, name: str, revision: str | None) -> Repository | None:
        """The repository, or None after an answer that says why not."""
        repository = self.files.repositories.get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {self.files.token}"
        if repository is None or (self.files.token is not None and not allowed):
            self._say(401, {"X-Error-Code": "RepoNotFound"}, b"")
        elif repository.gated:
            self._say(403, {"X-Error-Code": "GatedRepo"}, b"")
        elif revision not in (None, "main", repository.commit):
            self._say(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        else:
            return repository
        return None

    def _hub_file(self, name: str, revision: str, filename: str) -> None:
        if (repository := self._repository(name, revision)) is None:
            return
        commit = {"X-Repo-Commit": repository.commit}
        if filename not in repository.files:
            self._say(404, {"X-Error-Code": "EntryNotFound", **commit}, b"")
            return
        content = repository.files[filename]
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": _etag(content)}
        self._file(content, commit | linked)

    def _hub_api(self, name: str, kind: str | None, revision: str | None) -> None:
        if (repository := self._repository(name, revision)) is None:
            return
        entries = [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
            }
            for path, content in sorted(repository.files.items())
        ]
        about = {
            "id": name,
            "sha": repository.commit,
            "private": False,
            "siblings": [{"rfilename": entry["path"]} for entry in entries],
        }
        body = json.dumps(entries if kind == "tree" else about).encode()
        self._say(200, {"Content-Type": "application/json"}, body)

    # --- answers

    def _file(self, content: bytes, headers: dict[str, str]) -> None:
        faults = self.files.faults
        if not faults.without_versions:
            headers = {"ETag": _etag(content), **headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or faults.ignore_ranges:
            self._say(200, {"Accept-Ranges": "bytes", **headers}, content)
            return
        start = int(asked[1]) + faults.shift
        stop = min(int(asked[2]) + 1 if asked[2] else len(content), len(content))
        if start >= len(content):
            self._say(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            return
        self.answer.range = (start, stop)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._say(206, headers, content[start:stop])

    def _say(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.answer.status = status
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if (cut := self.files.faults.cut_each_after) is not None and len(body) > cut:
            body, self.close_connection = body[:cut], True
        try:
            self._send(body)
        except ConnectionError:  # the other side has had enough
            self.close_connection = True

    def _send(self, body: bytes) -> None:
        server = self.files
        for start in range(0, len(body), 1 << 16):
            piece = body[start : start + (1 << 16)]
            time.sleep(server.faults.pace)
            with server.guard:
                if server.faults.budget is not None:
                    left = server.faults.budget - server.sent
                    piece, self.close_connection = piece[: max(0, left)], left < len(piece)
                self.answer.sent += len(piece)
            self.wfile.write(piece)
            if self.close_connection and server.faults.budget is not None:
                return


def _etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()}"'
