"""Preparing an output: what is there already, whether it fits, and locks against other runs."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..distributed import Distributed
from ..errors import RunError
from .outputs import Outputs
from .parts import whole_file

_HASHES = {"inputs", "paths"}  # settings that identify the images
_IN_USE = "another process is writing '{}' now: wait for it, or choose another output"
_OWN_FILE = re.compile(r"(\d{6}\.(rows|json)|settings\.json|merged)(\.tmp)?")


def claim(
    outputs: Outputs, settings: dict[str, Any], overwrite: bool, distributed: Distributed
) -> bool:
    """Make the output ready for a run with these settings; rank 0 does so for all.

    Returns:
        Whether such a run is finished already.

    Raises:
        RunError: Other results are in the way, or another process is at work; on every rank.
    """
    refusal, finished = None, False
    if distributed.is_main:
        try:
            finished = _prepare(outputs, settings, overwrite)
        except RunError as error:
            refusal = str(error)
    refusal, finished, first = distributed.broadcast_object((refusal, finished, settings))
    if refusal is not None:
        raise RunError(refusal)
    if first != settings:
        raise RunError(
            f"rank {distributed.rank} does not do the same as rank 0: "
            + _differences(first, settings)
        )
    return bool(finished)


@contextmanager
def lock_rank(outputs: Outputs, rank: int) -> Iterator[None]:
    """Keep other runs from the output while this process works on its share.

    Raises:
        RunError: Another run is at work.
    """
    try:
        with FileLock(outputs.parts / f"rank{rank}.lock", timeout=0):
            yield
    except Timeout:
        raise RunError(_IN_USE.format(outputs.features)) from None


def _prepare(outputs: Outputs, settings: dict[str, Any], overwrite: bool) -> bool:
    """Check what is there and prepare the folder of parts; True if nothing is left to do."""
    made = outputs.parts / "settings.json"
    if not overwrite:
        if _finished(outputs, settings):
            remove_parts(outputs)  # of a run that was killed while it removed them
            return True
        if not made.exists():
            _refuse_old_results(outputs, settings)
    outputs.parts.mkdir(parents=True, exist_ok=True)
    _refuse_other_runs(outputs)
    before = _settings(made) if made.exists() else None
    if before not in (None, settings) and not overwrite:
        raise RunError(
            f"'{outputs.parts}' holds an unfinished run with other settings "
            f"({_differences(before, settings)}): use those settings to resume it, or --overwrite "
            "(overwrite=True) to start anew"
        )
    if before != settings:
        _empty(outputs.parts)
    outputs.record.unlink(missing_ok=True)  # from here on the old files are no finished run
    if before == settings:
        return False
    with whole_file(made) as file:
        file.write(json.dumps(settings).encode())
    return False


def _refuse_other_runs(outputs: Outputs) -> None:
    for lock in outputs.parts.glob("rank*.lock"):
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            raise RunError(_IN_USE.format(outputs.features)) from None


def _empty(folder: Path) -> None:
    """Remove the parts of an earlier run; a folder with other files is left alone."""
    files = [file for file in folder.iterdir() if file.suffix != ".lock"]
    for file in files:
        if not _OWN_FILE.fullmatch(file.name):
            raise RunError(
                f"'{folder}' is needed for unfinished work but holds '{file.name}': move it away "
                "or choose another output"
            )
    for file in files:
        file.unlink()


def remove_parts(outputs: Outputs) -> None:
    """Remove the folder of a finished run, which another process may be removing too."""
    with suppress(OSError):  # gone already, or another process has just opened a lock in it
        for name in os.listdir(outputs.parts):
            if _OWN_FILE.fullmatch(name) or name.endswith(".lock"):
                (outputs.parts / name).unlink(missing_ok=True)
        outputs.parts.rmdir()


def _finished(outputs: Outputs, settings: dict[str, Any]) -> bool:
    if not all(p.exists() for p in (outputs.features, outputs.index, outputs.record)):
        return False
    return _settings(outputs.record, "settings") == settings


def _refuse_old_results(outputs: Outputs, settings: dict[str, Any]) -> None:
    found = [p for p in (outputs.features, outputs.index, outputs.record) if p.exists()]
    if not found:
        return
    why = "it is not from a finished run"
    if outputs.record.exists():
        before = _settings(outputs.record, "settings")
        if before != settings:
            why = f"it was made with other settings ({_differences(before, settings)})"
    raise RunError(
        f"'{found[0]}' exists: {why}. Choose another output, or --overwrite (overwrite=True) to "
        "replace it"
    )


def _settings(path: Path, key: str | None = None) -> dict[str, Any]:
    """Settings that a file holds; none where it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return {}
    found = content.get(key) if key and isinstance(content, dict) else content
    return found if isinstance(found, dict) else {}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    if not before:
        return "the file that names them is damaged"
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    found = [
        f"{key}: {before.get(key)} then, {now.get(key)} now"
        for key in changed
        if key not in _HASHES
    ]
    return "; ".join([*found, *(["other images"] if _HASHES & {*changed} else [])])
