"""A file server on 127.0.0.1 for tests: ranges, ETags, faults, and repositories of the Hub."""

import hashlib
import importlib
import itertools
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.utils
import pytest

COMMIT = "a" * 40  # of every repository, on its branch main


class FileServer:
    """``with FileServer() as server:`` serves ``server.files`` at ``server.url + path``."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}  # by path, such as /ijepa/a.pth.tar
        self.repositories: dict[str, dict[str, bytes]] = {}  # of the Hub: files by name
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
        return sum(self.answered.values())

    def forget(self) -> None:
        """Start the count anew, without faults."""
        self.numbers = itertools.count()
        self.answered: dict[int, int] = {}  # bytes of each answer
        self.before = lambda number: None  # called before each answer
        self.statuses: list[int] = []  # that answer the next requests
        self.cut_after: int | None = None  # bytes of a body, then the connection breaks
        self.ignores_ranges = False  # every answer is the whole file


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server.files
        number = next(server.numbers)
        server.answered[number] = 0
        server.before(number)
        hub = re.fullmatch(rf"/(.+/.+)/resolve/(?:main|{COMMIT})/(.+)", self.path)
        files = server.repositories.get(hub[1], {}) if hub else server.files
        headers = {"X-Repo-Commit": COMMIT} if files and hub else {}
        content = files.get(hub[2] if hub else self.path)
        status = 200
        if server.statuses:
            status, content = server.statuses.pop(0), b""
        elif content is None:
            status, content = 404, b""
            headers |= {"X-Error-Code": "EntryNotFound"} if headers else {}
        else:
            headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked and not server.ignores_ranges:
                start, stop = int(asked[1]), min(int(asked[2] or 1 << 60) + 1, len(content))
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
                status, content = 206, content[start:stop]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if server.cut_after is not None and len(content) > server.cut_after:
            content, self.close_connection = content[: server.cut_after], True
        try:
            self.wfile.write(content)
            server.answered[number] = len(content)
        except ConnectionError:  # the client has ended the request
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815


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
