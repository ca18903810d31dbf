"""Safetensors files that are written piece by piece, or read tensor by tensor.

The safetensors package writes a file from tensors that are all in memory, and maps a file as a
whole. Where tensors come in pieces (a download, rows of features), this module says which bytes the
file starts with and where every tensor goes; the writer puts the pieces there in any order. Where
they are converted one after the other, it maps each on its own. Format:
https://github.com/huggingface/safetensors#format
"""

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import SettingsError

__all__ = ["DTYPE_NAMES", "Entry", "Layout", "layout", "map_tensors"]

# In the order in which the safetensors package stores them, so that every tensor is aligned.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_NAMES)}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_LONGEST_HEADER = 100_000_000  # readers refuse longer ones
_MAPPINGS = 32  # of a file; each holds a file descriptor


@dataclass(frozen=True, slots=True)
class Entry:
    """Name, dtype and shape of one tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in a file.

    Attributes:
        header: The first bytes of the file, up to the first tensor.
        offsets: Byte offset of each tensor, counted from the start of the file. Elements follow
            each other there in C order, little-endian.
        size: Bytes of the whole file.
    """

    header: bytes
    offsets: dict[str, int]
    size: int


def layout(entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> Layout:
    """Plan a safetensors file.

    Tensors lie in the order that the safetensors package uses: by dtype, then by name. The same
    entries and metadata, in whatever order, always give the same bytes.

    Args:
        entries: The tensors.
        metadata: Texts for the ``__metadata__`` field.

    Returns:
        Header, offset of each tensor and size of the file.

    Raises:
        ValueError: A dtype that the format lacks, a name that comes twice or is reserved, or a
            header longer than readers accept.
    """
    described: dict[str, object] = {}
    if metadata:
        described["__metadata__"] = dict(sorted(metadata.items()))
    starts: dict[str, int] = {}
    end = 0
    for entry in sorted(entries, key=_place):
        if entry.name in starts or entry.name == "__metadata__":
            why = "is reserved" if entry.name == "__metadata__" else "comes twice"
            raise SettingsError(f"the tensor name {entry.name!r} {why}; rename that tensor")
        starts[entry.name] = end
        end += entry.nbytes
        described[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [starts[entry.name], end],
        }
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise SettingsError(
            f"the header would take {len(text):,} bytes and readers accept {_LONGEST_HEADER:,}; "
            "put fewer tensors or less metadata into one file"
        )
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + start for name, start in starts.items()}
    return Layout(header, offsets, len(header) + end)


def _place(entry: Entry) -> tuple[int, str]:
    if entry.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise SettingsError(
            f"tensor {entry.name!r} has dtype {entry.dtype}, which this package does not write "
            f"as safetensors; convert it to one of {known}"
        )
    return _RANK[entry.dtype], entry.name


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a file into memory, some neighbours at a time.

    Pages are read when touched and writes stay private. A mapping ends with its last tensor, so a
    program that converts tensors in their order and lets go of them holds little of the file.

    Args:
        path: A sound file: header and sizes are not checked again.

    Returns:
        The tensors whose dtype is in ``DTYPE_NAMES``, in the order of the file.
    """
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        described = json.loads(file.read(header))
        described.pop("__metadata__", None)
        size = file.seek(0, os.SEEK_END)
        tensors: dict[str, Tensor] = {}
        pages, begin, end = None, 0, 0
        for name, entry in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = (8 + header + offset for offset in entry["data_offsets"])
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is None:
                continue
            if start == stop:
                tensors[name] = torch.empty(entry["shape"], dtype=dtype)
                continue
            if pages is None or stop > end:
                begin = start - start % mmap.ALLOCATIONGRANULARITY
                end = min(size, max(stop, begin + size // _MAPPINGS))
                pages = mmap.mmap(file.fileno(), end - begin, access=mmap.ACCESS_COPY, offset=begin)
            count = (stop - start) // dtype.itemsize
            flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=start - begin)
            tensors[name] = flat.view(entry["shape"])
    return tensors
