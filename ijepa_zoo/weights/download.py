"""Download one network of a remote ``torch.save`` file into a safetensors file."""

import hashlib
import logging
import mmap
import os
import shutil
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm

from ..errors import FetchError
from .ranged import RangedStream, RemoteFile
from .safetensors_file import Entry, Layout, layout
from .torch_file import Record, network_records

__all__ = ["download"]

_log = logging.getLogger(__name__)
REQUEST = 16 << 20  # neighbouring storages are joined up to this many bytes ...
GAP = 1 << 16  # ... and across gaps of at most this many
_NO_HASH = "0" * 64  # stands in the header until the file is whole


def download(
    url: str,
    network: str,
    path: Path,
    size: int | None,
    sha256: str | None,
    progress: bool,
    workers: int,
) -> None:
    """Fetch into ``<path>.partial``, and give it its real name once all of it has been checked.

    Arguments and errors are those of `ijepa_zoo.weights.fetch.fetch_official`; errors of the local
    disk come as `OSError`. The caller sees to it that no other process does the same.
    """
    remote = RemoteFile(url, threading.Event())
    if size is not None and remote.size != size:
        raise FetchError(
            f"{url} has {remote.size:,} bytes, expected {size:,}: it is another file now. Upgrade "
            "ijepa-zoo, or load a file of your own with checkpoint=PATH"
        )
    records = network_records(remote, network)
    plan = _plan(remote, network, records, _NO_HASH)
    partial = path.with_name(f"{path.name}.partial")
    missing = _open_partial(partial, plan, records, url)
    total = sum(record.size for record in records)
    with tqdm(
        desc=f"{network} of {url.rsplit('/', 1)[-1]}",
        total=total,
        initial=total - sum(record.size for record in missing),
        unit="B",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        _fetch_records(remote, missing, partial, plan, workers, bar.update)
    digest = _data_sha256(partial, plan)
    if sha256 is not None and digest != sha256.lower():
        partial.unlink()
        raise FetchError(
            f"{network} of {url} has SHA-256 {digest}, expected {sha256}: the server holds other "
            "weights than those asked for, and they were not kept. Check the address, or upgrade "
            "ijepa-zoo"
        )
    _seal(partial, _plan(remote, network, records, digest).header, path)


def _plan(remote: RemoteFile, network: str, records: list[Record], digest: str) -> Layout:
    entries = [Entry(use.name, use.dtype, use.shape) for item in records for use in item.uses]
    metadata = {
        "format": "pt",
        "url": remote.url,
        "network": network,
        "etag": remote.version,
        "size": str(remote.size),
        "sha256": digest,
    }
    try:
        return layout(entries, metadata)
    except ValueError as error:
        raise FetchError(f"{remote.url}: {error}") from error


def _open_partial(partial: Path, plan: Layout, records: list[Record], url: str) -> list[Record]:
    """Make the unfinished file, or find in it what an earlier call has brought.

    There is no list of finished parts, which could be ahead of the disk after a power cut: the
    header tells whether the file belongs to this version of the remote one, and a storage has
    arrived if its bytes have its CRC-32.

    Returns:
        The storages that are still to be fetched.
    """
    records = [record for record in records if record.size]
    missing = records
    if partial.exists():
        with partial.open("rb") as file:
            header = file.read(len(plan.header))
            same = header == plan.header and partial.stat().st_size == plan.size
            if same:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    missing = [item for item in records if not _has_arrived(item, content, plan)]
        if not same:
            _log.warning("%s has changed since its download began; starting anew", url)
            partial.unlink()
    needed, free = sum(item.size for item in missing), shutil.disk_usage(partial.parent).free
    if free < needed:
        raise FetchError(
            f"{needed:,} bytes are needed in {partial.parent} and {free:,} are free. Make room and "
            "run again, or choose another cache folder with cache_dir=... or the variable "
            "IJEPA_ZOO_CACHE"
        )
    partial.touch()
    with partial.open("r+b") as file:
        file.write(plan.header)
        file.truncate(plan.size)
    return missing


def _has_arrived(record: Record, content: mmap.mmap, plan: Layout) -> bool:
    """Whether all tensors of a storage are there; parts of a storage have no CRC-32 to tell."""
    starts = [plan.offsets[use.name] for use in record.uses]
    return all(use.whole for use in record.uses) and all(
        zlib.crc32(content[start : start + record.size]) == record.crc for start in starts
    )


def _fetch_records(
    remote: RemoteFile,
    records: list[Record],
    partial: Path,
    plan: Layout,
    workers: int,
    received: Callable[[int], object],
) -> None:
    """Fetch storages in parallel; the first failure, or Ctrl-C, ends all of it."""
    guard = threading.Lock()

    def count(amount: int) -> None:
        with guard:
            received(amount)

    with ThreadPoolExecutor(workers, thread_name_prefix="fetch") as pool:
        try:
            jobs = [
                pool.submit(_fetch_group, remote, group, partial, plan, count)
                for group in _groups(records)
            ]
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()
        finally:
            remote.cancelled.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _groups(records: list[Record]) -> list[list[Record]]:
    """Runs of neighbouring storages; each run is one request."""
    groups: list[list[Record]] = []
    for record in records:
        run = groups[-1] if groups else []
        if run and record.start - run[-1].stop <= GAP and record.stop - run[0].start <= REQUEST:
            run.append(record)
        else:
            groups.append([record])
    return groups


def _fetch_group(
    remote: RemoteFile,
    group: list[Record],
    partial: Path,
    plan: Layout,
    received: Callable[[int], None],
) -> None:
    """Read the storages of one run, check each and write its tensors to their places."""
    position = group[0].start
    with (
        RangedStream(remote, position, group[-1].stop) as stream,
        partial.open("r+b") as file,
    ):
        for record in group:
            stream.read(record.start - position)
            # The header's last part is padding, whose length only the header itself tells.
            header = stream.read(30)
            rest = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
            position = record.start + 30 + rest + record.size
            if header[:4] != b"PK\3\4" or position > record.stop:
                raise FetchError(_corrupt(remote, record))
            stream.read(rest)
            content = stream.read(record.size, received)
            if zlib.crc32(content) != record.crc:
                raise FetchError(_corrupt(remote, record))
            _write_tensors(record, content, file, plan)


def _write_tensors(record: Record, content: bytearray, file: BinaryIO, plan: Layout) -> None:
    storage = torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
    for use in record.uses:
        tensor = torch.empty(0, dtype=use.dtype, device="cpu")
        tensor.set_(storage, use.offset, use.shape, use.stride)
        file.seek(plan.offsets[use.name])
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _corrupt(remote: RemoteFile, record: Record) -> str:
    names = ", ".join(use.name for use in record.uses)
    return (
        f"{remote.url}: the bytes of {names} are corrupt (CRC-32 of {record.name}). What has "
        "arrived intact is kept: run again to resume. If it stays so, the file on the server is "
        "damaged"
    )


def _data_sha256(partial: Path, plan: Layout) -> str:
    with partial.open("rb") as file:
        file.seek(len(plan.header))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(partial: Path, header: bytes, path: Path) -> None:
    """Write the header with the hash and give the file its name, safe from power cuts."""
    with partial.open("r+b") as file:
        file.write(header)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    if os.name == "posix":  # elsewhere folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
