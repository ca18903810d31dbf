"""Where the tensors of one network lie in a remote ``torch.save`` file."""

import bisect
import io
import pickle
import re
import sys
import zipfile
from dataclasses import dataclass, field

import torch

from ..errors import FetchError
from .ranged import RemoteFile

__all__ = ["Record", "Use", "network_records"]


@dataclass(frozen=True, slots=True)
class Use:
    """One tensor that reads a storage.

    Attributes:
        name: Its name in the network.
        dtype: Its dtype.
        shape: Its shape.
        stride: Its stride, in elements.
        offset: Where it begins in the storage, in elements.
        whole: It is the storage from end to end, in C order.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    whole: bool


@dataclass(frozen=True, slots=True)
class Record:
    """One storage in the file.

    Attributes:
        name: Its name in the zip archive.
        start: Byte of the file where its zip header begins; the storage follows that header.
        stop: Byte where the next header begins.
        size: Bytes of the storage.
        crc: CRC-32 of the storage, from the archive's directory.
        uses: The network's tensors that lie in this storage.
    """

    name: str
    start: int
    stop: int
    size: int
    crc: int
    uses: list[Use] = field(default_factory=list)


def network_records(remote: RemoteFile, network: str) -> list[Record]:
    """Find the storages of one network in a remote ``torch.save`` file.

    Only the archive's directory and its pickle are read. ``torch.load`` (with
    ``weights_only=True``) gets a stand-in archive with that pickle and empty storages: in fake
    mode it reads no storage, and the offset that it notes for each one tells which record it is.
    The offset in the remote file cannot be asked for in the same way, as that costs one request
    for each of its storages, those of the optimizer too.

    Args:
        remote: The file.
        network: Top-level key, such as ``target_encoder``, with a dict of tensors behind it.

    Returns:
        The storages in file order. Tensors without elements are in records of size 0.

    Raises:
        FetchError: Not such a file, or no such network in it.
    """
    try:
        with zipfile.ZipFile(remote) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            starts = [*sorted(info.header_offset for info in infos.values()), archive.start_dir]
            stand_in = _stand_in(archive, remote.url)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise FetchError(
            f"{remote.url} cannot be read in parts: it is not a sound zip-format torch.save file "
            f"({error}). Download it and load it by path (checkpoint=PATH)"
        ) from error
    by_offset = {offset: infos[name] for offset, name in _data_offsets(stand_in).items()}
    records: dict[str, Record] = {}
    for name, tensor in _fake_network(stand_in, network, remote.url).items():
        info = by_offset[_checkpoint_offset(tensor)]
        record = records.setdefault(
            info.filename,
            Record(
                info.filename,
                info.header_offset,
                starts[bisect.bisect_right(starts, info.header_offset)],
                info.file_size,
                info.CRC,
            ),
        )
        stored = info.compress_type == zipfile.ZIP_STORED
        if not stored or record.size != tensor.untyped_storage().nbytes():
            raise FetchError(f"{remote.url}: record {record.name} is not stored as torch.save does")
        record.uses.append(_use(name, tensor))
    return sorted(records.values(), key=lambda record: record.start)


def _use(name: str, tensor: torch.Tensor) -> Use:
    return Use(
        name,
        tensor.dtype,
        tuple(tensor.shape),
        tuple(tensor.stride()),
        int(tensor.storage_offset()),
        tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes(),
    )


def _stand_in(archive: zipfile.ZipFile, url: str) -> io.BytesIO:
    """The archive with its pickle and with empty storages."""
    pickles = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise FetchError(f"{url} is a zip file, but not one that torch.save wrote: no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    byteorder: str = sys.byteorder
    if f"{root}byteorder" in archive.namelist():
        byteorder = archive.read(f"{root}byteorder").decode()
    if byteorder != "little" or sys.byteorder != "little":
        raise FetchError(f"{url}: only little-endian files and machines are supported")
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as copy:
        copy.writestr(pickles[0], archive.read(pickles[0]))
        copy.writestr(f"{root}version", b"3\n")
        for name in archive.namelist():
            if name.startswith(f"{root}data/"):
                copy.writestr(name, b"")
    return result


def _data_offsets(stand_in: io.BytesIO) -> dict[int, str]:
    with zipfile.ZipFile(stand_in) as archive:
        # A record's data follows its 30 bytes of header and its name.
        return {
            info.header_offset + 30 + len(info.filename.encode()): info.filename
            for info in archive.infolist()
        }


def _checkpoint_offset(tensor: torch.Tensor) -> int:
    """Offset of a tensor's storage in the file that it was loaded from in fake mode."""
    offset: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise FetchError(
            f"torch {torch.__version__} does not say where tensors lie in a file; this needs "
            "torch >= 2.11. Upgrade torch, or download the file and load it by path"
        )
    return offset


def _fake_network(stand_in: io.BytesIO, network: str, url: str) -> dict[str, torch.Tensor]:
    stand_in.seek(0)
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

    try:
        with FakeTensorMode():
            checkpoint = torch.load(stand_in, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FetchError(
            f"{url} holds more than tensors and plain values and is not read, as such a pickle "
            f"could run any code ({error})"
        ) from error
    except RuntimeError as error:  # torch cannot make fakes of sparse tensors, for example
        raise FetchError(
            f"{url} cannot be read in parts ({str(error).splitlines()[0]}). Download it and load "
            "it by path (checkpoint=PATH)"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(network), dict):
        held = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else "no dict"
        raise FetchError(f"{url} holds no network {network!r}; it has: {held}")
    tensors: dict[str, torch.Tensor] = checkpoint[network]
    if not tensors:
        raise FetchError(f"{url}: network {network!r} is empty")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise FetchError(f"{url}: {network}[{name!r}] is no dense tensor but {type(tensor)}")
    return tensors
