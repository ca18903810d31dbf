"""Ranged reads of a file on a web server."""

import http.client
import math
import os
import re
import threading
import urllib.request
from concurrent.futures import CancelledError

from ..errors import FetchError

ATTEMPTS = 5  # in a row without one byte received
BACKOFF_SECONDS = 0.5  # doubles with every attempt
TIMEOUT_SECONDS = 30.0
BLOCK = 1 << 18  # bytes per request while reading the zip directory and the pickle
_TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP status codes worth another attempt


class RemoteFile:
    """A file on a web server, read by ranged requests; file-like for `zipfile`."""

    def __init__(self, url: str) -> None:
        self.url, self.size, self.etag = url, 0, ""
        self.cancelled = threading.Event()
        self._position = 0
        self._blocks: dict[int, bytearray] = {}
        self.fetch(0, 1)  # sets size and etag

    def fetch(self, start: int, stop: int) -> bytearray:
        """The bytes ``[start, stop)``; reconnects if the connection breaks."""
        content, failures = bytearray(), 0
        while (first := start + len(content)) < stop:
            headers = {"Range": f"bytes={first}-{stop - 1}", "User-Agent": "ijepa-zoo"}
            request = urllib.request.Request(self.url, headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                    self._check(response, first, stop)
                    while piece := response.read(1 << 18):
                        content += piece
                        failures = 0
                        if self.cancelled.is_set():
                            raise CancelledError
                if start + len(content) < stop:
                    raise ConnectionError("the connection was cut")
            except (OSError, http.client.HTTPException) as error:
                failures += 1
                status = getattr(error, "code", None)  # of an HTTPError
                permanent = status not in _TRANSIENT if status else not self.size
                if permanent or failures == ATTEMPTS:
                    raise FetchError(
                        f"cannot read {self.url} ({error}); check the address, the network and the "
                        "proxy settings (HTTPS_PROXY), and run again to resume"
                    ) from error
                if self.cancelled.wait(BACKOFF_SECONDS * 2**failures):
                    raise CancelledError from error
        return content

    def _check(self, response: http.client.HTTPResponse, first: int, stop: int) -> None:
        """Refuse an answer that is not the requested range of the same file."""
        given = response.headers.get("Content-Range", "")
        matched = re.fullmatch(rf"bytes {first}-{stop - 1}/(\d+)", given)
        if response.status != 206 or matched is None:
            raise FetchError(
                f"{self.url}: asked for bytes {first}-{stop - 1}, the server or a proxy answered "
                f"{response.status} {given!r}; download the whole file and open it by its path"
            )
        size = int(matched[1])
        etag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if not self.size:
            self.size, self.etag = size, etag
        if (size, etag) != (self.size, self.etag):
            raise FetchError(f"{self.url} changed on the server during the download; run again")

    def read(self, count: int = -1) -> bytes:
        """Read at the position, through cached blocks."""
        start = self._position
        self._position = self.size if count < 0 else min(start + count, self.size)
        numbers = range(start // BLOCK, math.ceil(self._position / BLOCK))
        for number in numbers:
            if number not in self._blocks:
                stop = min((number + 1) * BLOCK, self.size)
                self._blocks[number] = self.fetch(number * BLOCK, stop)
        content = b"".join(self._blocks[number] for number in numbers)
        skip = start - numbers.start * BLOCK
        return content[skip : skip + self._position - start]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.IOBase`."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """See `io.IOBase`."""
        return self._position

    def seekable(self) -> bool:
        """See `io.IOBase`."""
        return True
