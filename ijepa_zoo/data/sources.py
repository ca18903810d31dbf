"""From what the user names (folders, files, globs, tar shards, lists) to an ordered list of images.

Nothing is opened here except tar shards, whose member offsets are needed. Every file that is seen
becomes an :class:`Item`, also those that cannot or need not be read, so that nothing is lost.
"""

import difflib
import glob
import os
import stat
from collections.abc import Iterator, Sequence

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
    items: list[Item] = []
    for given in inputs:
        if isinstance(given, Item):
            items.append(given)
        else:
            items.extend(_expand(os.fspath(given)))
    if all(item.skipped is not None for item in items):
        raise InputError(_no_images(inputs, items))
    return items


def _expand(path: str) -> Iterator[Item]:
    if os.path.lexists(path) or not glob.has_magic(path):
        yield from _one_input(path)
        return
    matches = sorted(glob.glob(path, recursive=True), key=os.fsencode)
    if not matches:
        raise InputError(f"no file matches the pattern '{path}'")
    for match in matches:
        yield from _one_input(match)


def _one_input(path: str) -> Iterator[Item]:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise InputError(f"no such file or folder: '{path}'{_nearest(path)}") from None
    except OSError as error:
        raise InputError(f"input '{path}' cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        yield from _list_folder(path)
    elif path.lower().endswith((*SHARD_SUFFIXES, ".txt")):
        if not stat.S_ISREG(mode):  # a pipe would be waited for, and a device has no end
            raise InputError(f"'{path}' is no regular file, as a tar shard or a list must be")
        yield from list_shard(path) if path.lower().endswith(SHARD_SUFFIXES) else _read_list(path)
    else:
        yield Item(path)


def _list_folder(root: str) -> list[Item]:
    """Everything below a folder; links to folders are followed unless they lead back up."""
    items: list[Item] = []
    pending: list[tuple[str, str | None, frozenset[tuple[int, int]]]] = [(root, None, frozenset())]
    while pending:
        folder, label, above = pending.pop()
        try:
            status = os.stat(folder)
            with os.scandir(folder) as listing:
                entries = [entry for entry in listing if not entry.name.startswith(".")]
        except OSError as error:
            items.append(Item(folder, problem=f"folder cannot be listed: {error.strerror}"))
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            items.append(Item(folder, skipped="a link back to a folder that holds it"))
            continue
        for entry in entries:
            if _is_folder(entry):
                pending.append((entry.path, entry.name, above | {identity}))
            elif is_image_name(entry.name):
                items.append(Item(entry.path, label))
            else:
                items.append(Item(entry.path, label, skipped=_why_skipped(entry.name)))
    items.sort(key=lambda item: os.fsencode(item.path))
    return items


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
            data = file.read()
    except OSError as error:
        raise InputError(f"list '{path}' cannot be read: {error.strerror}") from error
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if line.strip():
            yield Item(os.fsdecode(line.removesuffix(b"\r")))


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


def _no_images(inputs: Sequence[str | os.PathLike[str] | Item], items: list[Item]) -> str:
    named = ", ".join(f"'{os.fspath(i)}'" for i in inputs if not isinstance(i, Item)) or "the list"
    if not items:
        return f"no images found in {named}: nothing there except hidden files"
    example = items[0]
    return (
        f"no images found in {named}: {len(items)} other files were seen, for example "
        f"'{example.path}': {example.skipped}"
    )
