"""Write weights so that timm, transformers or the published code loads them without this package.

Every layout is a folder, written under a temporary name and renamed when it is whole.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..errors import RunError, SettingsError
from ..models.encoder import IJepaEncoder
from ..models.jepa import IJepa
from . import writers
from .bundle import Bundle, from_module, from_source, local_source
from .layouts import some

WRITERS = {
    "native": writers.write_native,
    "timm": writers.write_timm,
    "transformers": writers.write_transformers,
    "official": writers.write_official,
}
# Of a temporary folder: the end of its name, the lock of its process, the folder being replaced.
_PLACE, _LOCK, _OLD = ".part", "lock", "old"


def export(
    model: IJepa | IJepaEncoder | Bundle | str | Path,
    folder: str | Path,
    to: str = "native",
    *,
    network: str | None = None,
    dtype: torch.dtype | None = None,
    license: str | None = None,
    overwrite: bool = False,
    push_to: str | None = None,
    **source_kwargs: Any,
) -> Path:
    """Write a folder that another library loads.

    Args:
        model: A model in memory; or a name of released weights, a checkpoint file or folder, whose
            tensors are then copied without being changed.
        folder: Where to write; must not exist, unless ``overwrite``.
        to: 'native' (all networks at hand, also a timm folder), 'timm' (``timm.create_model(
            'local-dir:FOLDER')``), 'transformers' (``IJepaModel.from_pretrained``) or 'official'
            (the published code's .pth.tar; needs all three networks).
        network: Which network a single-network layout gets; default 'target_encoder'. For a single
            encoder in memory and for a file that does not say it: which network it is.
        dtype: Store tensors in this data type; None keeps theirs.
        license: Licence of the weights (SPDX), for the model card; default: what the source says.
        overwrite: Replace an existing folder, once the new one is whole.
        push_to: Also upload the folder to this repository of the Hugging Face Hub.
        **source_kwargs: For a checkpoint: ``model_name``, ``cache_dir`` and timm arguments of the
            encoder, see :func:`ijepa_zoo.weights.bundle.from_source`.

    Returns:
        The folder.

    Raises:
        ijepa_zoo.weights.layouts.CheckpointError: If the networks that the layout needs are not
            there, or cannot be expressed in it.
        RunError: If ``folder`` exists and ``overwrite`` is false, if it is not an export or holds
            the source, or if it cannot be written; an existing folder is as it was.
    """
    if to not in WRITERS:
        raise SettingsError(f"to must be one of {', '.join(WRITERS)}, got {to!r}")
    if network not in (None, "target_encoder", "encoder"):
        raise SettingsError(f"network must be 'target_encoder' or 'encoder', got {network!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise SettingsError(f"dtype must be a floating-point type, got {dtype}")
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise RunError(
            f"{folder} exists: choose another name, or replace it, overwrite=True (--overwrite)"
        )
    if folder.exists():
        refuse_foreign(folder)
    if isinstance(model, Bundle):
        bundle = model
    elif isinstance(model, str | Path):
        _refuse_source(model, folder)
        name, single = source_kwargs.pop("model_name", None), to in ("timm", "transformers")
        bundle = from_source(model, name, network, single, **source_kwargs)
    else:
        if source_kwargs:
            raise SettingsError(
                f"only for a checkpoint, not for a model: {', '.join(source_kwargs)}"
            )
        bundle = from_module(model, network)
    if license is not None:
        bundle = replace(bundle, license=license)
    write = WRITERS[to]
    write_whole(folder, lambda part: write(bundle, part, network, dtype))
    if push_to is not None:
        push(folder, push_to)
    return folder


def refuse_foreign(folder: Path) -> None:
    """Overwriting replaces a whole folder, so it must hold nothing but an earlier export.

    Raises:
        RunError: It holds something else.
    """
    foreign = (
        {item.name for item in folder.iterdir()} - writers.WRITTEN
        if folder.is_dir()
        else {"a file"}
    )
    if foreign:
        raise RunError(
            f"{folder} is no export of this package, it holds {some(foreign)}: it is not "
            "overwritten, choose another name"
        )


def _refuse_source(source: str | Path, folder: Path) -> None:
    """The folder that is replaced must not hold what is being copied."""
    place = local_source(source)
    if place is not None and folder.exists():
        place, target = place.resolve(), folder.resolve()
        if place == target or target in place.parents:
            raise RunError(
                f"{folder} holds the source {source} itself: it is not overwritten, choose another "
                "name"
            )


def push(folder: Path, repo_id: str) -> None:
    """Upload a folder to the Hugging Face Hub, creating the repository if need be."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder)


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder, then put it in the place of ``folder``.

    What a killed process left of an earlier try is removed first.

    Raises:
        RunError: It cannot be written; the message names ``folder``, not the temporary one.
        OSError: Another file cannot be read.
    """
    place: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=_PLACE, dir=folder.parent))
        _write_in(place, folder, write)
    except OSError as error:
        named = _named(error, folder, place)
        if named is error:
            raise
        raise named from error


def _write_in(place: Path, folder: Path, write: Callable[[Path], None]) -> None:
    part, aside = place / folder.name, place / _OLD / folder.name
    lock = None
    try:
        lock = _lock(place)
        part.mkdir()  # only now may others take the place for a leftover, if it is not locked
        write(part)
        part.chmod(0o755)
        for item in part.rglob("*"):  # safetensors makes files that only their owner reads
            item.chmod(0o755 if item.is_dir() else 0o644)
        _put(part, folder, aside)
    finally:
        for item in (part, aside.parent):
            if item.exists():
                shutil.rmtree(item)
        if lock is not None:
            lock.release()
        shutil.rmtree(place)


def _put(part: Path, folder: Path, aside: Path) -> None:
    """Replace a folder; one of the two is always at its place or restored to it."""
    if not folder.exists():
        os.replace(part, folder)
        return
    aside.parent.mkdir()
    try:
        os.replace(folder, aside)
        os.replace(part, folder)
    finally:  # also after Ctrl-C: one of the two is at its place before anything is removed
        if aside.exists() and not folder.exists():
            os.replace(aside, folder)


def _lock(place: Path) -> FileLock | None:
    """Lock a temporary folder for as long as this process lives; None: not to be had."""
    lock = FileLock(place / _LOCK, timeout=0)
    try:
        lock.acquire()
    except (Timeout, NotImplementedError):  # somebody writes there; or a disk without locks
        return None
    return lock


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of killed processes: those whose lock nobody holds."""
    start = f".{folder.name}."
    for place in sorted(folder.parent.iterdir()):
        if not (place.name.startswith(start) and place.name.endswith(_PLACE)):
            continue
        if place.is_symlink() or not os.access(place, os.R_OK | os.W_OK | os.X_OK):
            continue  # of another user
        aside = place / _OLD / folder.name
        if not (place / _LOCK).is_file() or not (aside.exists() or (place / folder.name).exists()):
            continue
        lock = _lock(place)
        if lock is None:
            continue
        try:
            if aside.exists() and not folder.exists():  # killed while the folders changed places
                os.replace(aside, folder)
            shutil.rmtree(place)
        finally:
            lock.release()


def _named(error: OSError, folder: Path, place: Path | None) -> Exception:
    """The error in the caller's words: with the folder, not the temporary one."""
    hidden = str(place / folder.name) if place else str(folder)
    file = error.filename
    if error.strerror is None:  # a message of ours
        text = str(error)
        if hidden in text:
            return RunError(text.replace(hidden, str(folder)))
    elif file is None or f".{folder.name}." in str(file) or Path(str(file)) == folder.parent:
        text = error.strerror
    else:  # of another file, such as the weights that are read
        return error
    return RunError(
        f"{folder} cannot be written ({text}): check the space, limits and permissions there, or "
        "choose another folder"
    )
