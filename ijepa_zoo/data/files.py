"""Image files of folders, globs, lists and tar shards, listed in a fixed order."""

from __future__ import annotations

import glob
import gzip
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import DataError, SettingsError

IMAGE_SUFFIXES = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".dib",
        ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".ico", ".tga", ".qoi",
        ".avif", ".heic", ".heif",  # decoded where the installed Pillow can
        ".npy",
    )
)  # fmt: skip
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TRAIN = ("train", "training")
TEST = ("test", "val", "valid", "validation", "testing")  # in the order of preference
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_ZIP = "a zip archive: unpack it, or pack the images as .tar"
_TAR_BLOCK = 512  # bytes of a header
_LONGEST_LABEL = 4096  # bytes of a .cls member


@dataclass(frozen=True, slots=True)
class File:
    """A file, or a member of a tar shard."""

    path: str  # as users see it; `shard.tar/name.jpg` for a member of a shard
    root: str = ""  # the part of the path above the input, which the fingerprint leaves out
    label: str | None = None  # class
    shard: str | None = None  # the tar file that holds it
    offset: int = 0  # first byte of the member in the uncompressed shard
    size: int = 0  # bytes of the member
    problem: str | None = None  # why it cannot be read, if known
    skipped: str | None = None  # why it is not an image of the input, which is not a failure


def expand(path: str) -> list[str]:
    """Paths that match a glob or `{000..012}`, sorted; any other path unchanged."""
    if os.path.lexists(path):
        return [path]
    if braces := _BRACES.search(path):
        first, last = braces.groups()
        head, tail = path[: braces.start()], path[braces.end() :]
        numbers = range(int(first), int(last) + 1)
        names = (f"{head}{number:0{len(first)}}{tail}" for number in numbers)
        return [path for name in names for path in expand(name)]
    if not glob.has_magic(path):
        return [path]
    matches = sorted(glob.glob(path, recursive=True), key=os.fsencode)
    if not matches and path.startswith(("hfds/", "torch/")):  # `split=train[:100]`
        return [path]
    if not matches:
        raise DataError(f"no file matches the pattern '{path}'")
    return matches


def refuse_inside(path: str | os.PathLike[str], sources: Any) -> None:
    """Refuse an output in a folder that is read: a repeated command would take it for an image."""
    for source in sources if isinstance(sources, list | tuple) else [sources]:
        if isinstance(source, str | os.PathLike):
            folder, out = Path(source).resolve(), Path(path).resolve()
            matches = fnmatch(os.path.abspath(path), os.path.abspath(source))
            if matches or (folder.is_dir() and folder in (out, *out.parents)):
                raise SettingsError(f"'{path}' is inside its images, '{source}': choose another")


def list_files(paths: Sequence[str]) -> Iterator[File]:
    """List folders (sorted by path bytes), files, shards and `.txt` lists, in the given order."""
    for path in paths:
        if not os.path.exists(path):
            raise DataError(f"'{path}' does not exist")
        parent, suffix = os.path.join(os.path.dirname(path), ""), path.lower()
        if os.path.isdir(path):
            if not (shards := _shards_in(path)):
                yield from _walk(path)
            for shard in shards:
                yield from list_shard(shard, os.path.join(path, ""))
        elif suffix.endswith(SHARD_SUFFIXES):
            yield from list_shard(path, parent)
        elif suffix.endswith(".txt"):
            yield from _read_list(path)
        elif suffix.endswith(".zip"):
            raise DataError(f"'{path}' is {_ZIP}")
        else:
            yield File(path, parent)


def _shards_in(folder: str) -> list[str]:
    """The tar shards of a folder that holds no images and no other folders."""
    entries = _entries(folder)
    if any(entry.is_dir() or _is_image(entry.name) for entry in entries):
        return []
    return [entry.path for entry in entries if entry.name.lower().endswith(SHARD_SUFFIXES)]


def _walk(folder: str) -> Iterator[File]:
    """Files below a folder; each real folder is visited once, also if several links lead to it."""
    root = os.path.join(folder, "")
    real_root = os.path.join(os.path.realpath(root), "")
    entries = _entries(root)
    has_splits = _are_splits({entry.name for entry in entries if _is_folder(entry)})
    visited: set[str] = set()

    def below(entries: list[os.DirEntry[str]]) -> Iterator[File]:
        for entry in entries:
            path = entry.path
            if not _is_folder(entry):
                name = path[len(root) :].replace(os.sep, "/")
                label, skipped = _class_of(name, has_splits), _skip_reason(entry.name)
                yield File(path, root, label, skipped=skipped)
                continue
            try:
                found = _entries(path)
            except OSError as error:
                reason = f"the folder cannot be listed: {error.strerror}"
                yield File(path, root, problem=reason)
                continue
            real = os.path.join(os.path.realpath(path), "")
            is_inside = real.startswith(real_root) or real_root.startswith(real)
            if real in visited or (entry.is_symlink() and is_inside):
                yield File(path, root, skipped="a link to a folder that is read elsewhere")
                continue
            visited.add(real)
            yield from below(found)

    return below(entries)


def _are_splits(folders: set[str]) -> bool:
    return bool(folders) and {*TRAIN, *TEST}.issuperset(folders)


def _class_of(name: str, has_splits: bool) -> str | None:
    """The first folder of a relative path, below the folder of its split if there are those."""
    folders = name.split("/")[:-1]
    if has_splits:
        folders = folders[1:]
    return folders[0] if folders else None


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Visible entries, sorted so that the paths of a walk are sorted."""
    with os.scandir(folder) as listing:
        entries = [entry for entry in listing if not entry.name.startswith(".")]
    return sorted(entries, key=lambda entry: os.fsencode(entry.name + "/" * _is_folder(entry)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: opening it as a file gives the reason
        return False


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _skip_reason(name: str) -> str | None:
    if _is_image(name):
        return None
    if name.lower().endswith(SHARD_SUFFIXES):
        return "a tar shard beside other files; name it as an input to read it"
    if name.lower().endswith(".zip"):
        return _ZIP
    return f"not an image by its name ({os.path.splitext(name)[1] or 'no suffix'})"


def _read_list(path: str) -> Iterator[File]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                if number == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield File(os.fsdecode(line.removesuffix(b"\n").removesuffix(b"\r")))
    except OSError as error:
        raise DataError(f"the list '{path}' cannot be read: {error.strerror}") from error


def open_shard(path: str) -> BinaryIO:
    """Open a shard for seeking in its uncompressed bytes."""
    return cast(BinaryIO, gzip.open(path, "rb")) if is_compressed(path) else open(path, "rb")


def is_compressed(path: str) -> bool:
    """Whether a file is compressed with gzip."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def list_shard(path: str, root: str) -> list[File]:
    """Members of a shard; if it is damaged, those before the damage and an entry with the error."""
    files: list[tuple[str, File]] = []
    texts: dict[str, str] = {}
    problem = None
    try:
        with open_shard(path) as file:
            for name, member in _members(file):
                if name.endswith(".cls") and member.isfile():
                    file.seek(member.offset_data)
                    text = file.read(min(member.size, _LONGEST_LABEL))
                    texts[_sample_key(name)] = text.decode("utf-8", "surrogateescape").strip()
                else:
                    files.append((name, _member_file(path, root, name, member)))
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError) as error:
        problem = f"a damaged tar shard: {error}"
    has_splits = _are_splits({name.split("/")[0] for name, _ in files if "/" in name})
    listed = [
        replace(file, label=texts.get(_sample_key(name), _class_of(name, has_splits)))
        for name, file in files
    ]
    if problem or not listed:
        listed.append(File(path, root, problem=problem or "a tar shard without files"))
    return listed


def _members(file: BinaryIO) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Name and header of each member that is not hidden."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
            if not 0 <= member.size < 1 << 60:  # below 0 the next header would be before this one
                raise tarfile.ReadError(f"'{member.name}' has an impossible size")
            name = member.name.removeprefix("./")
            if not member.isdir() and not re.search(r"(^|/)\.(?!\./)", name):
                yield name, member
        # tarfile treats a broken header or a truncated file as the end of the archive
        file.seek(tar.offset)
        end = file.read(_TAR_BLOCK)
        if end.strip(b"\0"):
            raise tarfile.ReadError(f"no valid member header at byte {tar.offset}")
        if not end:
            raise tarfile.ReadError("it has no end-of-archive marker, so it may be truncated")


def _member_file(path: str, root: str, name: str, member: tarfile.TarInfo) -> File:
    problem, skipped = None, _skip_reason(name)
    if skipped is None and (not member.isfile() or member.issparse()):
        problem = "refused: a link, device or sparse file inside a tar shard"
    shown, extent = f"{path}/{name}", (member.offset_data, member.size)
    return File(shown, root, None, path, *extent, problem, skipped)


def _sample_key(name: str) -> str:
    """The part of a member's name that webdataset takes as the sample's key."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
