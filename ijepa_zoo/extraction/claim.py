"""Owning an output: what is there already, whether it fits, and a lock against others."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import RunError
from .outputs import Outputs
from .parts import whole_file
from .ranks import Ranks


@contextmanager
def claim(
    outputs: Outputs, settings: dict[str, Any], overwrite: bool, ranks: Ranks
) -> Iterator[bool]:
    """Own the output while the run works on it.

    Rank 0 checks and locks for all ranks; an error of its is raised on every rank.

    Yields:
        Whether a run with these settings is finished already.

    Raises:
        RunError: If other results are in the way or another process is at work.
    """
    with ExitStack() as stack:
        state: tuple[str | None, bool, dict[str, Any]] = (None, False, settings)
        if ranks.rank == 0:
            try:
                state = (None, _prepare(outputs, settings, overwrite, stack), settings)
            except RunError as error:
                state = (str(error), False, settings)
        refusal, finished, first = ranks.share(state)
        if refusal is not None:
            raise RunError(refusal)
        if first != settings:
            raise RunError(
                f"rank {ranks.rank} does not do the same as rank 0: {_differences(first, settings)}"
            )
        yield finished


def _prepare(outputs: Outputs, settings: dict[str, Any], overwrite: bool, stack: ExitStack) -> bool:
    """Check what is there and lock the folder of parts; True if nothing is left to do."""
    made = outputs.parts / "settings.json"
    if not overwrite and not made.exists():
        if _finished(outputs, settings):
            return True
        _refuse_old_results(outputs, settings)
    _lock(outputs, stack)
    before = _settings(made) if made.exists() else None
    if before == settings:
        return False
    if before is not None and not overwrite:
        raise RunError(
            f"'{outputs.parts}' holds an unfinished run with other settings "
            f"({_differences(before, settings)}). Use the settings of then to go on with it, "
            "or --overwrite (overwrite=True) to start anew"
        )
    _empty(outputs.parts, ours=before is not None)
    outputs.record.unlink(missing_ok=True)  # from here on the old files are no finished run
    with whole_file(made) as file:
        file.write(json.dumps(settings).encode())
    return False


def _lock(outputs: Outputs, stack: ExitStack) -> None:
    outputs.parts.mkdir(parents=True, exist_ok=True)
    lock = FileLock(outputs.parts / "lock", timeout=0)
    try:
        stack.enter_context(lock)
    except Timeout:
        raise RunError(
            f"another process is writing '{outputs.features}' now; wait for it, or choose another "
            "output"
        ) from None


def _empty(folder: Path, ours: bool) -> None:
    """Remove the parts of a run with other settings; a folder that is no run's is left alone."""
    for file in folder.iterdir():
        if file.name == "lock":
            continue
        if not ours and file.name != "settings.json.tmp":
            raise RunError(
                f"'{folder}' is the place for unfinished work but holds other files, such as "
                f"'{file.name}'; move them away or choose another output"
            )
        file.unlink()


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
    return "; ".join(
        f"{key}: {before.get(key)} then, {now.get(key)} now"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    )
