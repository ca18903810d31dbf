"""A file server on 127.0.0.1 for tests: ranges, ETags, faults, and files of the Hub."""

import hashlib
import importlib
import re
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.utils
import pytest


@dataclass
class Answered:
    """One request and the bytes of its answer's body."""

    path: str
    range: tuple[int, int] | None = None  # first byte, byte after the last; of a 206
    sent: int = 0


@dataclass
class Faults:
    """What the server does wrong."""

    ignore_ranges: bool = False
    shift: int = 0  # sends the range this many bytes later
    statuses: list[int] = field(default_factory=list)  # of the next requests, instead of answers
    cut_after: int | None = None  # bytes of each body
    before: Callable[[int], object] = lambda count: None  # called with the number of requests


@dataclass
class Repository:
    """A model repository of the Hub: one commit, on branch ``main``."""

    files: dict[str, bytes]

    @property
    def commit(self) -> str:
        content = b"\0".join(name.encode() + data for name, data in sorted(self.files.items()))
        return hashlib.sha1(content).hexdigest()


class FileServer:
    """``with FileServer() as server:`` serves ``server.files`` at ``server.url + path``.

    Attributes:
        files: Content by path, such as ``/ijepa/a.pth.tar``.
        repositories: By name, such as ``facebook/ijepa_vith14_1k``; served as the Hub does.
        token: If set, repositories are shown only to requests that carry it.
        faults: What goes wrong.
        answered: All requests so far.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repositories: dict[str, Repository] = {}
        self.token: str | None = None
        self.forget()
        self._http = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("H", (_Handler,), {"server_": self})
        )
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "FileServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def sent(self) -> int:
        """Bytes of bodies sent so far."""
        return sum(request.sent for request in self.answered)

    def forget(self) -> None:
        """Start the count anew, without faults."""
        self.answered: list[Answered] = []
        self.faults = Faults()


def isolate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the environment's offline mode, proxies and tokens."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    _forget_sessions()
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1")


def point_hub_at(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``huggingface_hub``, which reads ``HF_ENDPOINT`` when imported, use the server."""
    isolate(monkeypatch)
    constants = "huggingface_hub.constants"
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    importlib.import_module("huggingface_hub.file_download")  # below 1.0 it has a copy
    copy = "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE"
    monkeypatch.setattr(copy, template, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what ``HF_HUB_OFFLINE=1`` does before ``huggingface_hub`` is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _forget_sessions()


def _forget_sessions() -> None:
    if hasattr(huggingface_hub.utils, "reset_sessions"):  # below 1.0: sessions are on- or offline
        huggingface_hub.utils.reset_sessions()


class _Handler(BaseHTTPRequestHandler):
    server_: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server_
        self.answer = Answered(self.path)
        server.answered.append(self.answer)
        server.faults.before(len(server.answered) - 1)
        path = urllib.parse.unquote(self.path.split("?")[0])
        hub = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if server.faults.statuses:
            self._say(server.faults.statuses.pop(0), {}, b"")
        elif hub:
            self._hub_file(*hub.groups())
        elif path in server.files:
            self._file(server.files[path], {})
        else:
            self._say(404, {}, b"")

    def _hub_file(self, name: str, revision: str, filename: str) -> None:
        repository, token = self.server_.repositories.get(name), self.server_.token
        if repository is None or (token and self.headers["Authorization"] != f"Bearer {token}"):
            self._say(401, {"X-Error-Code": "RepoNotFound"}, b"")
        elif revision not in ("main", repository.commit):
            self._say(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        elif filename not in repository.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit}
            self._say(404, headers, b"")
        else:
            content = repository.files[filename]
            self._file(content, {"X-Repo-Commit": repository.commit, "ETag": _etag(content)})

    def _file(self, content: bytes, headers: dict[str, str]) -> None:
        headers["ETag"] = _etag(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or self.server_.faults.ignore_ranges:
            self._say(200, headers, content)
            return
        start = int(asked[1]) + self.server_.faults.shift
        stop = min(int(asked[2] or len(content)) + 1, len(content))
        if start >= stop:
            self._say(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            return
        self.answer.range = (start, stop)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._say(206, headers, content[start:stop])

    def _say(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server_.faults.cut_after
        if cut is not None and len(body) > cut:
            body, self.close_connection = body[:cut], True
        try:
            self.wfile.write(body)
            self.answer.sent = len(body)
        except ConnectionError:  # the client has ended the request
            self.close_connection = True


def _etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()}"'
