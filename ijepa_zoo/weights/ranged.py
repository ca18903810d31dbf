"""Reading parts of a remote file by ranged HTTP requests.

Cut lines and busy servers are met with further attempts; a server that ignores ranges, sends
another range or changes the file in between is noticed.
"""

from __future__ import annotations

import http.client
import io
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import CancelledError

from ..errors import FetchError

__all__ = ["FetchError", "RangedStream", "RemoteFile"]

TIMEOUT_SECONDS = 30.0
ATTEMPTS = 5  # in a row without one byte received
BACKOFF_SECONDS = 1.0  # doubles with every attempt
BLOCK = 1 << 18  # read-ahead of random access, bytes
_PIECE = 1 << 20  # most bytes between two looks at the cancel flag
_TRANSIENT = (408, 429, 500, 502, 503, 504)


class RemoteFile(io.RawIOBase):
    """A file at a URL, read by ranged requests only.

    Random access (``seek``, ``read``) goes through aligned blocks that are kept; `RangedStream` is
    for long runs. Every answer is compared with the first one, so a file that changes on the server
    in between is noticed.

    Args:
        url: ``http`` or ``https`` address. Proxies are taken from the environment.
        cancelled: When set, reads end with `CancelledError`.

    Attributes:
        size: Bytes of the whole file.
        version: The server's ETag, else its Last-Modified date, else an empty text.

    Raises:
        FetchError: Anything that keeps the bytes from coming, here and in every read.
    """

    def __init__(self, url: str, cancelled: threading.Event | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise FetchError(f"{url!r} is not an http or https address; load a local file by path")
        self.url = url
        self.cancelled = cancelled or threading.Event()
        self.size = -1
        self.version = ""
        self._position = 0
        self._blocks: dict[int, bytes] = {}
        with RangedStream(self, 0, BLOCK) as stream:
            stream.connect()  # sets size and version
            self._blocks[0] = bytes(stream.read(min(BLOCK, self.size)))

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """Current position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position; no request is made."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError(f"position {base + offset} lies before the start of {self.url}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill ``buffer`` as far as the file reaches; returns the number of bytes."""
        count = max(0, min(len(buffer), self.size - self._position))
        filled = 0
        while filled < count:
            number, within = divmod(self._position, BLOCK)
            part = self._block(number)[within : within + count - filled]
            buffer[filled : filled + len(part)] = part
            filled += len(part)
            self._position += len(part)
        return count

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            start, stop = number * BLOCK, min((number + 1) * BLOCK, self.size)
            with RangedStream(self, start, stop) as stream:
                self._blocks[number] = bytes(stream.read(stop - start))
        return self._blocks[number]

    def accept(self, response: http.client.HTTPResponse, start: int, stop: int) -> None:
        """Check that a response holds the range asked for, of the file seen before."""
        if response.status != 206:
            raise FetchError(
                f"{self.url}: the server answered {response.status} with the whole file instead "
                "of 206 with a part of it: it, or a proxy or login page on the way, ignores range "
                "requests. Download the whole file by other means and load it by path "
                "(checkpoint=PATH)"
            )
        given = response.headers.get("Content-Range", "")
        parsed = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", given.strip())
        if parsed is None:
            raise FetchError(f"{self.url}: the server's answer has Content-Range {given!r}")
        first, last, size = map(int, parsed.groups())
        headers = response.headers
        version = headers.get("ETag") or headers.get("Last-Modified") or ""
        if self.size < 0:
            self.size, self.version = size, version
        if (size, version) != (self.size, self.version):
            raise FetchError(
                f"{self.url} changed on the server while it was being read (size {self.size:,} -> "
                f"{size:,}, version {self.version!r} -> {version!r}). Run again to start anew"
            )
        if (first, last) != (start, min(stop, size) - 1):
            raise FetchError(
                f"{self.url}: asked for bytes {start}-{stop - 1}, the server sent {given!r}. "
                "Run again to resume; if it stays so, a proxy on the way is broken"
            )


class RangedStream:
    """Reads a run of bytes of a `RemoteFile` in order, and reconnects where the line was cut.

    Args:
        remote: The file.
        start: First byte.
        stop: Byte after the last one.
    """

    def __init__(self, remote: RemoteFile, start: int, stop: int) -> None:
        self._remote, self._position, self._stop = remote, start, stop
        self._response: http.client.HTTPResponse | None = None
        self._failures = 0

    def __enter__(self) -> RangedStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def read(self, count: int, received: Callable[[int], None] | None = None) -> bytearray:
        """Return exactly the next ``count`` bytes; ``received`` gets the length of each piece."""
        buffer = bytearray(count)
        left = memoryview(buffer)
        while left:
            if self._remote.cancelled.is_set():
                raise CancelledError
            response = self.connect()
            try:
                got = response.readinto(left[:_PIECE])
                if not got:
                    raise ConnectionError(f"the line was cut at byte {self._position}")
            except (OSError, http.client.HTTPException) as error:
                self._failed(error)
                continue
            self._failures = 0
            self._position += got
            left = left[got:]
            if received is not None:
                received(got)
        return buffer

    def connect(self) -> http.client.HTTPResponse:
        """The open response; asks for the rest of the run where there is none."""
        while self._response is None:
            wanted = {
                "Range": f"bytes={self._position}-{self._stop - 1}",
                "User-Agent": "ijepa-zoo",
            }
            request = urllib.request.Request(self._remote.url, headers=wanted)
            try:
                self._response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in _TRANSIENT:
                    raise FetchError(_refusal(self._remote.url, error)) from error
                self._failed(error)
            except (OSError, http.client.HTTPException) as error:
                self._failed(error)
            else:
                self._remote.accept(self._response, self._position, self._stop)
        return self._response

    def _failed(self, error: OSError | http.client.HTTPException) -> None:
        """Wait before the next attempt, or give up."""
        self._close()
        self._failures += 1
        unreached = self._remote.size < 0 and not isinstance(error, urllib.error.HTTPError)
        if unreached:
            raise FetchError(
                f"cannot reach {self._remote.url} ({error}). Check the network and the proxy "
                "settings (HTTPS_PROXY); a file that lies here already loads with checkpoint=PATH"
            ) from error
        if self._failures >= ATTEMPTS:
            raise FetchError(
                f"{self._remote.url}: gave up after {ATTEMPTS} attempts ({error}). What has "
                "arrived is kept: run again to resume"
            ) from error
        if self._remote.cancelled.wait(BACKOFF_SECONDS * 2 ** (self._failures - 1)):
            raise CancelledError

    def _close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _refusal(url: str, error: urllib.error.HTTPError) -> str:
    advice = {
        404: "There is no such file; check the address",
        410: "The file is gone; check the address",
        401: "The server wants a login; check the address, or download the file by other means",
        403: "The server refuses; check the address, or download the file by other means",
        416: "The file has become shorter; run again to start anew",
    }.get(error.code, "Run again later")
    return f"{url}: the server answered {error.code} {error.reason}. {advice}"
