"""State of an unfinished run, written after every epoch and read by one process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed import Distributed
from ..errors import RunError, SettingsError
from ..extract import whole_file

# What restoring a state raises that is not of this run.
_UNFIT = (RuntimeError, LookupError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class EpochState:
    """A file with the state of a run; after a kill it is the last complete one.

    Args:
        path: The file.
        settings: Plain values that decide the numbers; a state of others is refused.
        distributed: The processes that load it together.
    """

    path: Path
    settings: dict[str, Any]
    distributed: Distributed = field(default_factory=Distributed)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state, in rank 0 alone; tensors and plain values only.

        Raises:
            OSError: It cannot be written; the state before is still there.
        """
        whole = {**state, "settings": json.dumps(self.settings)}
        whole["sha256"] = _digest(whole)
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path, temporary) as file:
                torch.save(whole, file)
        except (OSError, RuntimeError) as error:
            # torch.save raises an error of its own about the file that it could not write
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            reason = (
                f"{cause.strerror or cause}: the state of this run cannot be written; make room "
                "and repeat the command, which resumes at the last epoch whose state was written"
            )
            raise OSError(cause.errno, reason, str(self.path)) from cause

    def load(self, epochs: int | None = None) -> dict[str, Any] | None:
        """The last state, its tensors on the CPU; None where there is none.

        Rank 0 reads it and sends it to the others, tensor by tensor.

        Args:
            epochs: Epochs of the whole run.

        Raises:
            RunError: It is damaged, or of other settings.
        """
        tensors: list[Tensor] = []
        packed = self.distributed.run_on_main(lambda: _pack(self._read(epochs), tensors))
        if not self.distributed.is_main:
            tensors += [torch.empty(shape, dtype=dtype) for shape, dtype in packed[1]]
        tensors = [self.distributed.broadcast(tensor) for tensor in tensors]
        found: dict[str, Any] | None = _unpack(packed[0], tensors)
        return found

    def _read(self, epochs: int | None) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        with self.path.open("rb") as file:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # damaged bytes: whatever pickle and zip stumble over
                raise self._damaged(f"{type(error).__name__} while reading it") from error
        if not isinstance(state, dict) or state.pop("sha256", None) != _digest(state):
            raise self._damaged("its content does not have the SHA-256 that was written with it")
        before, now = json.loads(state.pop("settings")), json.loads(json.dumps(self.settings))
        differences = [
            f"{key}: {before.get(key)} then, {now.get(key)} now"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if differences:
            raise RunError(
                f"'{self.path}' is of an unfinished run with other settings "
                f"({'; '.join(differences)}): use the same settings to resume it, or remove it"
            )
        if epochs is not None and not 0 <= state.get("epoch", -1) <= epochs:
            raise self._damaged(f"its epoch is {state.get('epoch')}, not from 0 to {epochs}")
        return state

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Around what restores a loaded state: one that does not fit is a :class:`RunError`."""
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

    def _damaged(self, why: str) -> RunError:
        return RunError(
            f"'{self.path}', the state of an unfinished run, is damaged: remove it to start again "
            f"({why})"
        )


@dataclass(frozen=True)
class _Slot:
    """Takes the place of a tensor in a state that is sent."""

    number: int


def _pack(state: Any, tensors: list[Tensor]) -> tuple[Any, list[tuple[torch.Size, torch.dtype]]]:
    """The state with slots for its tensors, which are appended, and their shapes and types."""

    def strip(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return _Slot(len(tensors) - 1)
        if isinstance(value, Mapping):
            return {key: strip(entry) for key, entry in value.items()}
        return [strip(entry) for entry in value] if isinstance(value, list | tuple) else value

    stripped = strip(state)
    return stripped, [(tensor.shape, tensor.dtype) for tensor in tensors]


def _unpack(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, _Slot):
        return tensors[value.number]
    if isinstance(value, dict):
        return {key: _unpack(entry, tensors) for key, entry in value.items()}
    return [_unpack(entry, tensors) for entry in value] if isinstance(value, list) else value


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimizer's state.

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
