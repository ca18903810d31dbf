"""Prepare an output: resume, refuse or replace what exists, and lock it against other runs."""

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
_OWN_FILE = re.compile(r"(\d{6}\.(rows|json)|settings\.json|merged)(\.tmp)?")


def claim(
    outputs: Outputs, settings: dict[str, Any], overwrite: bool, distributed: Distributed
) -> bool:
    """Prepare the output for a run with these settings, on rank 0.

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
def lock_rank(outputs: Outputs, rank: int | str) -> Iterator[None]:
    """Keep other runs from the output while this process works on its images.

    Raises:
        RunError: Another run is at work.
    """
    try:
        with FileLock(outputs.parts / f"rank{rank}.lock", timeout=0):
            yield
    except Timeout:
        raise RunError(
            f"another process is writing '{outputs.features}' now: wait for it, or choose another "
            "output"
        ) from None


def _prepare(outputs: Outputs, settings: dict[str, Any], overwrite: bool) -> bool:
    """Check what is there and prepare the folder of parts; True if nothing is left to do."""
    made = outputs.parts / "settings.json"
    may_be_finished = outputs.record.exists() or not made.exists()
    if not overwrite and may_be_finished and _finished(outputs, settings):
        remove_parts(outputs)  # of a run that was killed while it removed them
        return True
    outputs.parts.mkdir(parents=True, exist_ok=True)
    for lock in outputs.parts.glob("rank*.lock"):
        with lock_rank(outputs, lock.stem.removeprefix("rank")):
            pass
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
    """Whether the files are those of such a run; other files are refused."""
    files = (outputs.features, outputs.index, outputs.record)
    found = [path for path in files if path.exists()]
    before = _settings(outputs.record, "settings") if outputs.record in found else settings
    if not found:
        return False
    if before == settings and len(found) == len(files):
        return True
    why = "it is not from a finished run"
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
