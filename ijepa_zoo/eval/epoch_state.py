"""State of an unfinished run, written after every epoch."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError, SettingsError
from ..extract import whole_file

# What putting back a state raises that is not of this run.
_UNFIT = (RuntimeError, LookupError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class EpochState:
    """A file with the state of a run, of which a kill leaves the last whole one.

    Args:
        path: The file.
        settings: Plain values that decide the numbers; a state of others is refused.
    """

    path: Path
    settings: dict[str, Any]

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state; tensors and plain values only.

        Raises:
            OSError: It cannot be written; the state before is still there.
        """
        whole = {**state, "settings": json.dumps(self.settings)}
        content = io.BytesIO()  # torch.save hides why a file cannot be written
        torch.save({**whole, "sha256": _digest(whole)}, content)
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path, temporary) as file:
                file.write(content.getbuffer())
        except OSError as error:
            _remove_if_possible(temporary)
            reason = (
                f"{error.strerror or error}: the state of this run cannot be written; make room "
                "and repeat the command, which goes on at the last epoch whose state was written"
            )
            raise OSError(error.errno, reason, str(self.path)) from error

    def load(self, epochs: int | None = None) -> dict[str, Any] | None:
        """The last state, its tensors on the CPU; None where there is none.

        Args:
            epochs: Epochs of the whole run; `epoch` in the state must be one of 0 to that, and
                `broken` the names of images that could not be decoded, with reasons.

        Raises:
            RunError: It is damaged, or of other settings.
        """
        if not self.path.exists():
            return None
        with self.path.open("rb") as file:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # damaged bytes: whatever pickle and zip stumble over
                raise self._damaged(f"{type(error).__name__} while reading it") from error
        if not isinstance(state, dict):
            raise self._damaged(f"it holds a {type(state).__name__}, not a dict")
        if state.pop("sha256", None) != _digest(state):
            raise self._damaged("its content does not have the SHA-256 that was written with it")
        before, now = self._settings_in(state), json.loads(json.dumps(self.settings))
        differences = [
            f"{key}: {before.get(key)} then, {now.get(key)} now"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if differences:
            raise RunError(
                f"'{self.path}' is of an unfinished run with other settings "
                f"({'; '.join(differences)}): use those of then to go on with it, or remove it"
            )
        if epochs is not None:
            self._check_progress(state, epochs)
        return state

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Around what puts a loaded state back: one that does not fit is a :class:`RunError`."""
        try:
            yield
        except (RunError, torch.OutOfMemoryError):
            raise
        except _UNFIT as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise self._damaged(reason) from error

    def remove(self) -> None:
        """The run is finished."""
        self.path.unlink(missing_ok=True)

    def _settings_in(self, state: dict[str, Any]) -> dict[str, Any]:
        try:
            settings = json.loads(state.pop("settings"))
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged("it does not say of which settings it is") from error
        if not isinstance(settings, dict):
            raise self._damaged("it does not say of which settings it is")
        return settings

    def _check_progress(self, state: dict[str, Any], epochs: int) -> None:
        epoch, seconds = state.get("epoch"), state.get("seconds")
        if type(epoch) is not int or not 0 <= epoch <= epochs:
            raise self._damaged(f"its epoch is {epoch!r}, not one of 0 to {epochs}")
        if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise self._damaged(f"its seconds are {seconds!r}")
        broken = state.get("broken")
        texts = [*broken, *broken.values()] if isinstance(broken, dict) else [broken]
        if not all(isinstance(text, str) for text in texts):
            raise self._damaged("its images that could not be decoded are no names with reasons")

    def _damaged(self, why: str) -> RunError:
        return RunError(
            f"'{self.path}', the state of an unfinished run, is damaged: remove it to start anew "
            f"({why})"
        )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put back an optimizer's state.

    Raises:
        ValueError: It is that of other parameters; torch alone would not notice all of these.
    """
    optimizer.load_state_dict(state)
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise SettingsError(
                    f"the optimizer's {name} has shape {tuple(value.shape)}, its parameter "
                    f"{tuple(parameter.shape)}"
                )


def checked_losses(losses: Any, heads: int) -> list[float]:
    """The losses of a state.

    Raises:
        ValueError: They are not one number for each head.
    """
    numbers = isinstance(losses, list) and all(isinstance(loss, int | float) for loss in losses)
    if not numbers or len(losses) != heads:
        raise SettingsError(f"its losses are not {heads} numbers, one for each head")
    return list(losses)


def _digest(state: Any) -> str:
    """SHA-256 of tensors and plain values, and of the order they are in."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(f"mapping {len(value)};".encode())
            for key, entry in value.items():
                add(key)
                add(entry)
        elif isinstance(value, list | tuple):
            digest.update(f"list {len(value)};".encode())
            for entry in value:
                add(entry)
        else:
            digest.update(f"{value!r};".encode("utf-8", "backslashreplace"))

    add(state)
    return digest.hexdigest()


def _remove_if_possible(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
