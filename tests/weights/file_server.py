"""A file server on 127.0.0.1 for tests: ranges, ETags, faults, and repositories of the Hub."""

import hashlib
import importlib
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.utils
import pytest

COMMIT = "a" * 40  # of every repository, on its branch main


@dataclass
class Answered:
    """One request: the range of a 206 (first byte, byte after the last) and the bytes sent."""

    range: tuple[int, int] | None = None
    sent: int = 0


class FileServer:
    """``with FileServer() as server:`` serves ``server.files`` at ``server.url + path``.

    Attributes:
        files: Content by path, such as ``/ijepa/a.pth.tar``.
        repositories: Files of each repository of the Hub, such as ``facebook/ijepa_vith14_1k``.
        answered: All requests so far.
        before: Called with the number of earlier requests, before each answer.
        statuses: Status codes that answer the next requests.
        cut_after: Bytes of a body after which the connection breaks.
        shift: Ranges are sent this many bytes later.
        ignores_ranges: Every answer is the whole file.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.forget()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.files = self
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
        self.before = lambda count: None
        self.statuses: list[int] = []
        self.cut_after: int | None = None
        self.shift = 0
        self.ignores_ranges = False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server.files
        self.answered = Answered()
        server.answered.append(self.answered)
        server.before(len(server.answered) - 1)
        hub = re.fullmatch(rf"/(.+/.+)/resolve/(?:main|{COMMIT})/(.+)", self.path)
        files = server.repositories.get(hub[1], {}) if hub else server.files
        headers = {"X-Repo-Commit": COMMIT} if files and hub else {}
        content = files.get(hub[2] if hub else self.path)
        if server.statuses:
            self.answer(server.statuses.pop(0), {}, b"")
        elif content is None:
            self.answer(404, {**headers, "X-Error-Code": "EntryNotFound"} if headers else {}, b"")
        else:
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.answer_range(content, {**headers, "ETag": etag})

    def answer_range(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or self.server.files.ignores_ranges:
            self.answer(200, headers, content)
            return
        start = int(asked[1]) + self.server.files.shift
        stop = min(int(asked[2] or len(content)) + 1, len(content))
        self.answered.range = start, stop
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.answer(206, headers, content[start:stop])

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.files.cut_after
        if cut is not None and len(body) > cut:
            body, self.close_connection = body[:cut], True
        try:
            self.wfile.write(body)
            self.answered.sent = len(body)
        except ConnectionError:  # the client has ended the request
            self.close_connection = True


def point_hub_at(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``huggingface_hub``, which reads its environment when imported, use the server."""
    go_offline(monkeypatch, False)
    constants = "huggingface_hub.constants"
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    importlib.import_module("huggingface_hub.file_download")  # below 1.0 it has a copy
    copy = "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE"
    monkeypatch.setattr(copy, template, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def go_offline(monkeypatch: pytest.MonkeyPatch, is_offline: bool = True) -> None:
    """Do what ``HF_HUB_OFFLINE`` does before ``huggingface_hub`` is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", is_offline)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1")
    if hasattr(huggingface_hub.utils, "reset_sessions"):  # below 1.0: sessions are on- or offline
        huggingface_hub.utils.reset_sessions()
