"""From what the user names (folders, files, globs, tar shards, lists) to an ordered list of images.

Nothing is opened here except tar shards, whose member offsets are needed. Every file that is seen
becomes an :class:`Item`, also those that cannot or need not be read, so that nothing is lost.
"""

import difflib
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .items import Item, is_image_name
from .shards import list_shard

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")


class InputError(ValueError):
    """An input that does not exist or holds no images; raised before any work is done."""


Inputs = str | os.PathLike[str] | Item | Sequence[str | os.PathLike[str] | Item]


def find_items(inputs: Inputs) -> list[Item]:
    """List the images of all inputs: inputs in the given order, folders sorted by path bytes.

    Args:
        inputs: Folders (read with everything below them), image files, globs, tar shards (also
            gzipped; ``key.jpg`` beside ``key.cls`` gives the label), ``.txt`` lists of image
            paths (one a line, relative to the current folder), or items from an earlier call;
            one of them, or several.

    Returns:
        All items in row order, those to be skipped included. Hidden files are left out.

    Raises:
        InputError: If an input does not exist, a glob matches nothing or there is no image at all.
    """
    if isinstance(inputs, str | os.PathLike | Item):
        inputs = [inputs]
    items = [item for _, item in list_items(inputs)]
    if all(item.skipped is not None for item in items):
        raise InputError(no_images(inputs, len(items), next(iter(items), None)))
    return items


def list_items(
    inputs: Iterable[str | os.PathLike[str] | Item], also: tuple[str, ...] = ()
) -> Iterator[tuple[str, Item]]:
    """List the images of all inputs one by one, for lists too long for a list of objects.

    Args:
        inputs: As in :func:`find_items`.
        also: Lower-case suffixes of files in folders that count as images beside the usual ones.

    Yields:
        The part of the item's path that only says where its input lies (a folder with a slash at
        its end; empty for lines of a list), and the item.

    Raises:
        InputError: If an input does not exist or a glob matches nothing.
    """
    for given in inputs:
        if isinstance(given, Item):
            yield "", given
            continue
        for path in expand(os.fspath(given)):
            yield from _one_input(path, also)


def expand(path: str) -> list[str]:
    """The paths that a glob matches, sorted; any other path as it is.

    Raises:
        InputError: If the glob matches nothing.
    """
    if os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    matches = sorted(glob.glob(path, recursive=True), key=os.fsencode)
    if not matches:
        raise InputError(f"no file matches the pattern '{path}'")
    return matches


def _one_input(path: str, also: tuple[str, ...]) -> Iterator[tuple[str, Item]]:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise InputError(f"no such file or folder: '{path}'{_nearest(path)}") from None
    except OSError as error:
        raise InputError(f"input '{path}' cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        root = os.path.join(path, "")
        yield from ((root, item) for item in _list_folder(path, also))
        return
    root = path[: path.rfind("/") + 1]
    if path.lower().endswith((*SHARD_SUFFIXES, ".txt")):
        if not stat.S_ISREG(mode):  # a pipe would be waited for, and a device has no end
            raise InputError(f"'{path}' is no regular file, as a tar shard or a list must be")
        if path.lower().endswith(SHARD_SUFFIXES):
            yield from ((root, item) for item in list_shard(path))
        else:
            yield from (("", item) for item in _read_list(path))
    else:
        yield root, Item(path)


@dataclass(frozen=True, slots=True)
class _Folder:
    path: str
    label: str | None
    above: frozenset[tuple[int, int]]  # device and inode of the folders that lead to it


def _list_folder(root: str, also: tuple[str, ...]) -> Iterator[Item]:
    """Everything below a folder; links to folders are followed unless they lead back up."""
    pending: list[_Folder | Item] = [_Folder(root, None, frozenset())]
    while pending:
        found = pending.pop()
        if isinstance(found, Item):
            yield found
            continue
        # A folder sorts as its name with a slash: then the whole list is in the order of its paths.
        entries = _entries(found, also)
        entries.sort(key=lambda e: os.fsencode(e.path + "/" * isinstance(e, _Folder)), reverse=True)
        pending += entries


def _entries(folder: _Folder, also: tuple[str, ...]) -> list[_Folder | Item]:
    try:
        status = os.stat(folder.path)
        with os.scandir(folder.path) as listing:
            entries = [entry for entry in listing if not entry.name.startswith(".")]
    except OSError as error:
        return [Item(folder.path, problem=f"folder cannot be listed: {error.strerror}")]
    identity = (status.st_dev, status.st_ino)
    if identity in folder.above:
        return [Item(folder.path, skipped="a link back to a folder that holds it")]
    found: list[_Folder | Item] = []
    for entry in entries:
        if _is_folder(entry):
            found.append(_Folder(entry.path, entry.name, folder.above | {identity}))
        elif is_image_name(entry.name) or entry.name.lower().endswith(also):
            found.append(Item(entry.path, folder.label))
        else:
            found.append(Item(entry.path, folder.label, skipped=_why_skipped(entry.name)))
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: it is listed as a file, and opening it gives the reason
        return False


def _why_skipped(name: str) -> str:
    if name.lower().endswith(SHARD_SUFFIXES):
        return "a tar shard inside a folder; name it as an input to read it"
    return f"no image by its name ({os.path.splitext(name)[1] or 'no suffix'})"


def _read_list(path: str) -> Iterator[Item]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                if number == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield Item(os.fsdecode(line.removesuffix(b"\n").removesuffix(b"\r")))
    except OSError as error:
        raise InputError(f"list '{path}' cannot be read: {error.strerror}") from error


def _nearest(path: str) -> str:
    """A hint for a path that does not exist: how far it does, and the nearest name there."""
    parent, name = os.path.split(os.path.normpath(path))
    while parent and not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    try:
        names = os.listdir(parent or ".")
    except OSError:
        return ""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f". Did you mean '{os.path.join(parent, close[0])}'?"
    return f" (the folder '{parent or '.'}' has nothing like '{name}')"


def no_images(
    inputs: Iterable[str | os.PathLike[str] | Item], skipped: int, example: Item | None
) -> str:
    """Why there is nothing to read: how many other files were seen, and one of them."""
    named = ", ".join(f"'{os.fspath(i)}'" for i in inputs if not isinstance(i, Item)) or "the list"
    if example is None:
        return f"no images found in {named}: nothing there except hidden files"
    return (
        f"no images found in {named}: {skipped} other files were seen, for example "
        f"'{example.path}': {example.skipped}"
    )
