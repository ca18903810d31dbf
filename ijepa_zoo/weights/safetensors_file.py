"""Layout of a safetensors file that is written piece by piece.

The safetensors package writes a file from tensors that are all in memory. Where they come in
pieces (a download, rows of features), this module says which bytes the file starts with and where
every tensor goes; the writer puts the pieces there in any order. Format:
https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["DTYPE_NAMES", "Entry", "Layout", "layout"]

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
_LONGEST_HEADER = 100_000_000  # readers refuse longer ones


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
            raise ValueError(f"the tensor name {entry.name!r} {why}; rename that tensor")
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
        raise ValueError(
            f"the header would take {len(text):,} bytes and readers accept {_LONGEST_HEADER:,}; "
            "put fewer tensors or less metadata into one file"
        )
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + start for name, start in starts.items()}
    return Layout(header, offsets, len(header) + end)


def _place(entry: Entry) -> tuple[int, str]:
    if entry.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise ValueError(
            f"tensor {entry.name!r} has dtype {entry.dtype}, which this package does not write "
            f"as safetensors; convert it to one of {known}"
        )
    return _RANK[entry.dtype], entry.name
