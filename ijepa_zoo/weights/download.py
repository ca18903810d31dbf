"""Download weights: one network of an official file, or one file of the Hugging Face Hub.

An official file holds three networks and the optimizer state. `fetch_official` reads the directory
of the remote zip archive and its pickle, requests the byte ranges of one network's tensors, and
caches them as a safetensors file.
"""

import hashlib
import io
import json
import logging
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from ..errors import FetchError, some
from ..parts import whole_file
from .formats import safetensors_header
from .remote import RemoteFile

_log = logging.getLogger(__name__)

REQUEST = 16 << 20  # neighboring tensors are joined into requests of up to this many bytes,
GAP = 1 << 16  # across gaps of up to this many
CONNECTIONS = 8


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Folder of downloaded official networks.

    By default ``$IJEPA_ZOO_CACHE``, ``$XDG_CACHE_HOME/ijepa_zoo`` or ``~/.cache/ijepa_zoo``.
    """
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(cache_dir or os.environ.get("IJEPA_ZOO_CACHE") or shared / "ijepa_zoo").expanduser()


def fetch_official(
    url: str,
    network: str,
    *,
    cache_dir: str | Path | None = None,
    sha256: str | None = None,
    progress: bool = True,
) -> Path:
    """Download one network of a remote ``torch.save`` file, or return its cached file.

    A cached network needs no request. An interrupted download resumes, tensor by tensor; each is
    checked against the CRC-32 in the zip directory. Of several processes, one downloads and the
    others wait.

    The first download of a URL records its size, ETag and the SHA-256 of the network (the bytes
    after the safetensors header) in a JSON file beside the cached file. A later download from that
    URL with another size or SHA-256 is refused; another ETag alone only gives a warning, since
    mirrors may differ in it. ``sha256`` is compared already with the first download.
    """
    from huggingface_hub import constants

    folder = cache_folder(cache_dir)
    path = folder / f"{_file_name(url, network)}.safetensors"
    record = folder / f"{_file_name(url)}.json"
    if path.exists():
        return path
    if constants.HF_HUB_OFFLINE:
        raise FetchError(
            f"{url} is not cached and HF_HUB_OFFLINE is set; unset it, or copy {path.name} from "
            f"another computer into {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(record.with_suffix(".lock")):
        if path.exists():  # another process has downloaded it meanwhile
            return path
        remote = RemoteFile(url)
        known: dict[str, Any] = {"url": url, "size": remote.size, "etag": remote.etag, "sha256": {}}
        if record.exists():
            known = json.loads(record.read_bytes())
        _require_equal(f"size of {url}", remote.size, known["size"], record)
        if remote.etag != known["etag"]:
            _log.warning("%s may be another file now: its ETag differs from %s", url, record)
        partial = path.with_name(f"{path.name}.partial")
        _download(remote, network, partial, progress)
        found = _data_sha256(partial)
        expected = sha256 or known["sha256"].get(network, found)
        _require_equal(f"SHA-256 of {network} of {url}", found, expected, record)
        known["sha256"][network] = found
        with whole_file(record) as file:
            file.write(json.dumps(known, indent=1).encode())
        partial.replace(path)
    return path


def fetch_hub(
    repo_id: str, filename: str, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Call ``huggingface_hub.hf_hub_download``; failures raise :class:`FetchError`."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir))
    except Exception as error:  # its own, of requests or of httpx, by version
        raise FetchError(
            f"cannot fetch {filename!r} of the Hugging Face repository {repo_id!r}, revision "
            f"{revision or 'main'}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def _file_name(url: str, *network: str) -> str:
    base = url.split("?")[0].rsplit("/", 1)[-1].removesuffix(".tar").removesuffix(".pth")
    readable = re.sub(r"[^\w.-]", "_", ".".join([base, *network]))[:150]
    digest = hashlib.sha256("\n".join([url, *network]).encode()).hexdigest()
    return f"{readable}-{digest[:12]}"


def _require_equal(what: str, found: object, expected: object, record: Path) -> None:
    if found != expected:
        raise FetchError(
            f"{what} is {found}, expected {expected}: the weights have changed; upgrade ijepa-zoo, "
            f"or delete {record} and the networks beside it to download again"
        )


def _data_sha256(path: Path) -> str:
    """SHA-256 of the tensors of a safetensors file."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Storage(NamedTuple):
    """A storage in the remote zip archive."""

    start: int  # byte of the remote file where its zip header starts
    stop: int  # byte where the next header starts
    nbytes: int
    crc: int


class _Tensor(NamedTuple):
    """A tensor in the pickle that fills its storage."""

    storage: _Storage
    meta: Tensor  # on the meta device, with dtype and shape


def _download(remote: RemoteFile, network: str, partial: Path, progress: bool) -> None:
    """Write a network into a safetensors file, or the rest of it after an interruption."""
    tensors = _find_tensors(remote, network)
    header, offsets = safetensors_header(
        {name: (meta.dtype, tuple(meta.shape)) for name, (_, meta) in tensors.items()},
        {"format": "pt"},
    )
    total = sum(tensor.meta.nbytes for tensor in tensors.values())
    partial.touch()
    with partial.open("r+b") as file:
        file.write(header)
        file.truncate(len(header) + total)
        missing = {
            name: tensor
            for name, tensor in tensors.items()
            if tensor.meta.nbytes and not _is_downloaded(tensor, offsets[name], file)
        }
    bar = tqdm(
        desc=f"{network} of {remote.url.rpartition('/')[2]}",
        total=total,
        initial=total - sum(tensor.meta.nbytes for tensor in missing.values()),
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    with bar, ThreadPoolExecutor(CONNECTIONS) as pool:
        jobs = [
            pool.submit(_fetch_group, remote, group, partial, offsets)
            for group in _join_neighbors(missing)
        ]
        try:
            for job in as_completed(jobs):
                bar.update(job.result())
        finally:  # an error or Ctrl-C ends the other requests
            remote.cancelled.set()
            pool.shutdown(cancel_futures=True)
    with partial.open("r+b") as file:
        os.fsync(file.fileno())


def _is_downloaded(tensor: _Tensor, offset: int, file: BinaryIO) -> bool:
    """Whether the file has a tensor's bytes."""
    file.seek(offset)
    return zlib.crc32(file.read(tensor.meta.nbytes)) == tensor.storage.crc


def _join_neighbors(tensors: dict[str, _Tensor]) -> list[dict[str, _Tensor]]:
    """Split tensors in file order into groups; each group is one request."""
    groups: list[dict[str, _Tensor]] = []
    start = stop = -math.inf
    for name, tensor in tensors.items():
        storage = tensor.storage
        if storage.start > stop + GAP or storage.stop > start + REQUEST:
            groups.append({})
            start = storage.start
        groups[-1][name] = tensor
        stop = storage.stop
    return groups


def _fetch_group(
    remote: RemoteFile, group: dict[str, _Tensor], partial: Path, offsets: dict[str, int]
) -> int:
    """Fetch, check and write neighboring tensors; returns their size."""
    start = min(tensor.storage.start for tensor in group.values())
    stop = max(tensor.storage.stop for tensor in group.values())
    content = memoryview(remote.fetch(start, stop))
    with partial.open("r+b") as file:
        for name, tensor in group.items():
            # a zip header has 30 bytes, a name and padding; the lengths of both are at byte 26
            header = tensor.storage.start - start
            begin = header + 30 + sum(struct.unpack_from("<HH", content, header + 26))
            storage = content[begin : begin + tensor.storage.nbytes]
            if zlib.crc32(storage) != tensor.storage.crc:
                raise FetchError(
                    f"{name} of {remote.url} was corrupted in transfer (wrong CRC-32): run again; "
                    "if the error persists, the file on the server is corrupt"
                )
            file.seek(offsets[name])
            file.write(storage)
    return sum(tensor.meta.nbytes for tensor in group.values())


def _find_tensors(remote: RemoteFile, network: str) -> dict[str, _Tensor]:
    """Read the zip directory and the pickle; return a network's tensors in file order."""
    try:
        with zipfile.ZipFile(remote) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            (pickled,) = (info for info in infos if info.filename.endswith("/data.pkl"))
            content = archive.read(pickled)
        storages = {}
        for info, following in zip_longest(infos, infos[1:]):
            stop = following.header_offset if following else remote.size
            key = info.filename.rpartition("/")[2]
            storages[key] = _Storage(info.header_offset, stop, info.file_size, info.CRC)
        checkpoint = _Unpickler(io.BytesIO(content), storages).load()
    except (zipfile.BadZipFile, ValueError, pickle.UnpicklingError) as error:
        raise FetchError(
            f"{remote.url} is not a zip-format torch.save file of tensors and plain values "
            f"({error}); download the whole file and open it by its path"
        ) from error
    tensors = checkpoint.get(network) if isinstance(checkpoint, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(t, _Tensor) for t in tensors.values()):
        found = some(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint)
        raise FetchError(f"{remote.url} has no dict of tensors named {network!r}, but {found}")
    for name, (storage, meta) in tensors.items():
        if not meta.is_contiguous() or meta.nbytes != storage.nbytes:
            raise FetchError(
                f"{name} of {remote.url} is a view of another tensor; download the whole file and "
                "open it by its path"
            )
    return dict(sorted(tensors.items(), key=lambda item: item[1].storage.start))


class _Unpickler(pickle.Unpickler):
    """Reads the pickle of ``torch.save``: descriptions of tensors, without running code."""

    GLOBALS: ClassVar[dict[str, Any]] = {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, stride, *_: _Tensor(
            storage[0], storage[1].as_strided(shape, stride, offset)
        ),
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch.Size": torch.Size,
        "torch.device": torch.device,
        "torch.DoubleStorage": torch.float64,
        "torch.FloatStorage": torch.float32,
        "torch.HalfStorage": torch.float16,
        "torch.BFloat16Storage": torch.bfloat16,
        "torch.LongStorage": torch.int64,
        "torch.IntStorage": torch.int32,
        "torch.ShortStorage": torch.int16,
        "torch.CharStorage": torch.int8,
        "torch.ByteStorage": torch.uint8,
        "torch.BoolStorage": torch.bool,
    }

    def __init__(self, file: BinaryIO, storages: dict[str, _Storage]) -> None:
        super().__init__(file)
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which could run code")
        return self.GLOBALS[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> tuple[_Storage, Tensor]:
        _, dtype, key, _, numel = pid  # "storage", dtype, key, device, number of elements
        return self.storages[key], torch.empty(numel, dtype=dtype, device="meta")
