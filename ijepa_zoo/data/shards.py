"""Tar shards: listing members with their offsets, and reading single members by offset."""

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from .items import Item, is_image_name

_BLOCK = 512  # bytes of a tar header
_LONGEST_LABEL = 4096  # bytes of a .cls member


def open_shard(path: str) -> BinaryIO:
    """Open a shard for seeking in its uncompressed bytes; gzip is told by its first two bytes.

    Seeking forward in a gzipped shard decompresses what lies between, seeking back starts anew.
    """
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb")) if gzipped else open(path, "rb")


def list_shard(path: str) -> list[Item]:
    """List the members of a shard in their order.

    A damaged shard gives the members before the damage, and one item that says so.
    """
    items: list[Item] = []
    labels: dict[str, str] = {}
    try:
        with open_shard(path) as file:
            for name, member, text in _members(file):
                if text is not None:
                    labels[_key(name)] = text
                else:
                    items.append(_item(path, name, member))
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        items.append(Item(path, problem=f"damaged tar shard: {error}"))
    if not items:
        items.append(Item(path, problem="a tar shard without files"))
    return [_with_label(item, labels) for item in items]


def _members(file: BinaryIO) -> Iterator[tuple[str, tarfile.TarInfo, str | None]]:
    """Yield name, member and, for ``.cls`` members, their text; hidden files are left out."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
            name = member.name.removeprefix("./")
            if member.isdir() or any(part.startswith(".") for part in name.split("/")):
                continue
            text = None
            if name.endswith(".cls") and member.isfile():
                file.seek(member.offset_data)
                text = file.read(min(member.size, _LONGEST_LABEL)).decode(
                    "utf-8", "surrogateescape"
                )
                text = text.strip()
            yield name, member, text
        # tarfile takes a broken header in the middle for the end of the archive.
        file.seek(tar.offset)
        if file.read(_BLOCK).strip(b"\0"):
            raise tarfile.ReadError(f"no valid member header at byte {tar.offset}")


def _item(path: str, name: str, member: tarfile.TarInfo) -> Item:
    problem = skipped = None
    if not is_image_name(name):
        skipped = f"no image by its name ({os.path.splitext(name)[1] or 'no suffix'})"
    elif not member.isfile() or member.issparse():
        problem = "a link, device or sparse file inside a tar shard, not a plain file"
    folder = name.rpartition("/")[0].rpartition("/")[2] or None
    return Item(f"{path}/{name}", folder, path, member.offset_data, member.size, problem, skipped)


def _key(name: str) -> str:
    """The part of a member's name that webdataset takes as the sample's key."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _with_label(item: Item, labels: dict[str, str]) -> Item:
    if item.shard is None or not labels:
        return item
    label = labels.get(_key(item.path.removeprefix(f"{item.shard}/")), item.label)
    return Item(item.path, label, item.shard, item.offset, item.size, item.problem, item.skipped)
