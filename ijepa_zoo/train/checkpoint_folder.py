"""Checkpoints on disk: names, checksums, which one to go on from, and which ones to keep.

A checkpoint is a folder `step-000000600`. It is written as `step-000000600.partial`, flushed to
the disk, described in `checkpoint.json` with the checksum of every file, and renamed: what has the
final name was whole.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import CheckpointError, SettingsError, some

PARTIAL, _DELETED = ".partial", ".deleted"
_NAME = re.compile(r"step-(\d{9,})")
_ABOUT = "checkpoint.json"
_FORMAT = 1
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
_READERS = 4  # files whose checksums are computed at a time


def path(folder: Path, step: int, suffix: str = "") -> Path:
    """Folder of the checkpoint of a step."""
    return folder / f"step-{step:09d}{suffix}"


def steps(folder: Path, suffix: str = "") -> list[int]:
    """Steps of the checkpoints that were written to the end (or have `suffix`), oldest first."""
    if not folder.is_dir():
        return []
    names = [p.name.removesuffix(suffix) for p in folder.iterdir() if p.name.endswith(suffix)]
    return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def newest(folder: Path) -> Path:
    """`folder` if it is a checkpoint, else the newest one in it.

    Raises:
        CheckpointError: There is none.
    """
    if _NAME.fullmatch(folder.name):
        return folder
    found = steps(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no complete checkpoint (a folder step-...)")
    return path(folder, found[-1])


def refuse_a_file(folder: Path) -> None:
    """See that checkpoints can be written into `folder`, which need not be there yet.

    Raises:
        CheckpointError: Something else has its name.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder, and checkpoints are written into one of this name: move it "
            "away"
        )


def prepare(partial: Path) -> None:
    """Make the folder that a checkpoint is written into, without remains of an earlier try."""
    _remove(partial)
    partial.mkdir(parents=True)


def _remove(remains: Path) -> None:
    if remains.is_dir() and not remains.is_symlink():
        shutil.rmtree(remains)
    else:
        remains.unlink(missing_ok=True)


def _set_aside(old: Path) -> None:
    """Rename what is to be deleted: half deleted must not look like damaged."""
    aside = old.with_suffix(_DELETED)
    _remove(aside)
    os.replace(old, aside)


def complete(partial: Path, step: int, about: dict[str, Any]) -> None:
    """Describe what was written and give it its name.

    Raises:
        OSError: Something could not be written, or is not seen from here.
    """
    names = sorted(file.name for file in partial.iterdir())
    content: dict[str, Any] = {
        "format": _FORMAT,
        "step": step,
        "torch": torch.__version__,
        "about": about,
        "files": {
            name: {"bytes": (partial / name).stat().st_size, "sha256": _digest(partial / name)}
            for name in names  # one by one: pools start no threads while the program ends
        },
    }
    content["sha256"] = _seal(content)
    with (partial / _ABOUT).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    target = partial.with_suffix("")
    if target.exists():  # from before the run went back to an earlier step
        _set_aside(target)
    os.replace(partial, target)
    _sync(target.parent)


def thin_out(folder: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Delete what is not kept now that `step` is complete, and remains of what was broken off.

    Checkpoints of later steps go too: the run was taken back to before them.
    """
    found = steps(folder)
    past = [s for s in found if s <= step]
    kept = {*past[-keep:], *(s for s in past if keep_every and s % keep_every == 0)}
    for old in found:
        if old not in kept:
            _set_aside(path(folder, old))
    for suffix in (PARTIAL, _DELETED):
        for old in steps(folder, suffix):
            _remove(path(folder, old, suffix))


def read(folder: Path) -> dict[str, Any]:
    """The contents of `checkpoint.json`.

    Raises:
        CheckpointError: It is missing, damaged or of a newer version.
    """
    file = folder / _ABOUT
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        seal = content.pop("sha256")
        version = content["format"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{file} is missing") from error
    except (OSError, *_DAMAGED) as error:
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error})") from error
    if seal != _seal(content):
        raise CheckpointError(f"{file} is damaged (its contents do not have its checksum)")
    if version != _FORMAT:
        raise CheckpointError(
            f"{file} has format {version}, this version of ijepa_zoo reads {_FORMAT}: use the "
            "version that wrote it"
        )
    if path(folder.parent, content["step"]).name != folder.name:
        raise CheckpointError(
            f"{file} is damaged: it is of step {content['step']}, the name of its folder is not"
        )
    return content


def verify(folder: Path) -> dict[str, Any]:
    """Compare every file with its checksum.

    Returns:
        The contents of `checkpoint.json`.

    Raises:
        CheckpointError: A file is missing or damaged; names it.
    """
    content = read(folder)
    with ThreadPoolExecutor(_READERS) as pool:
        faults = list(
            pool.map(lambda item: _fault(folder / item[0], item[1]), content["files"].items())
        )
    if found := [fault for fault in faults if fault]:
        raise CheckpointError("; ".join(found))
    return content


def _fault(file: Path, written: dict[str, Any]) -> str | None:
    try:
        size = file.stat().st_size
        if size != written["bytes"]:
            return f"{file} is damaged: {size} bytes, {written['bytes']} were written"
        if _digest(file) != written["sha256"]:
            return f"{file} is damaged: it does not have the checksum it was written with"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    return None


def compare(stored: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a checkpoint of other networks.

    Raises:
        CheckpointError: Names or shapes differ; lists them.
    """
    texts = []
    if lacking := tensors.keys() - stored.keys():
        texts.append(f"it lacks {some(sorted(lacking))}")
    if unknown := stored.keys() - tensors.keys():
        texts.append(f"this run has no {some(sorted(unknown))}")
    shapes = [
        f"{name} {list(stored[name].size)}, here {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in stored and stored[name].size != tensor.shape
    ]
    if shapes:
        texts.append(f"shapes differ: {some(shapes)}")
    if texts:
        raise CheckpointError(
            f"checkpoint {folder} is of other networks: {'; '.join(texts)}. Use the settings it "
            "was made with, or another folder"
        )


def choice(resume_from: object) -> int | Literal["latest", "previous"]:
    """What `Checkpoints.choose` was given, if it means something.

    Raises:
        ValueError: It does not.
    """
    if resume_from == "latest" or resume_from == "previous":
        return resume_from
    try:
        if not isinstance(resume_from, bool):
            return operator.index(resume_from)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise SettingsError(
        f"resume_from is {resume_from!r}; it must be 'latest', 'previous' or the step of a "
        "checkpoint as a whole number, such as 600"
    )


def choose(folder: Path, resume_from: int | Literal["latest", "previous"]) -> int | None:
    """See `Checkpoints.choose`."""
    found = steps(folder)
    for step in steps(folder, PARTIAL):
        if not found or step > found[-1]:
            instead = f"going on from step {found[-1]}" if found else "starting anew"
            warnings.warn(
                f"{path(folder, step, PARTIAL)}: the run ended while it was saving step {step}; "
                f"{instead}",
                stacklevel=3,
            )
    if isinstance(resume_from, int):
        if resume_from not in found:
            raise CheckpointError(
                f"{folder} has no checkpoint of step {resume_from}: it has {found}"
            )
        verify(path(folder, resume_from))
        return resume_from
    if not found:
        return None
    try:
        verify(path(folder, found[-1]))
    except CheckpointError as error:
        good = _newest_whole(folder, found[:-1])
        if good is None:
            raise CheckpointError(
                f"{error}. No other checkpoint in {folder} is whole: mend the file, or start anew "
                "in another folder"
            ) from error
        if resume_from == "latest":
            raise CheckpointError(
                f"{error}. The checkpoint of step {good} is whole: --resume-from previous goes on "
                "from there"
            ) from error
        warnings.warn(f"{error}; going on from step {good}", stacklevel=3)
        return good
    if resume_from == "previous":
        earlier = f"; an earlier one is chosen by --resume-from {found[-2]}" if found[1:] else ""
        warnings.warn(f"step {found[-1]} is undamaged: going on from it{earlier}", stacklevel=3)
    return found[-1]


def _newest_whole(folder: Path, found: list[int]) -> int | None:
    for step in reversed(found):
        try:
            verify(path(folder, step))
        except CheckpointError:
            continue  # named when it is asked for
        return step
    return None


def reason(error: BaseException, folder: Path) -> str:
    """Why writing failed, in a line; torch does not say that a disk is full."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    return f"{str(error).splitlines()[0]} ({free / 2**20:.1f} MiB free on the disk)"


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk (Windows cannot open folders)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
