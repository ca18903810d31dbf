"""State of an unfinished run, written after every epoch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..extraction.parts import whole_file

# What torch.load raises on a file that is not whole.
_DAMAGED = (RuntimeError, EOFError, KeyError, ValueError, OSError)


class StateError(RuntimeError):
    """A state that cannot be gone on with; the text says why, and what to do."""


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
        """Replace the state; tensors and plain values only."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as file:
            torch.save({**state, "settings": json.dumps(self.settings)}, file)

    def load(self) -> dict[str, Any] | None:
        """The last state, its tensors on the CPU; None where there is none.

        Raises:
            StateError: It is damaged, or of other settings.
        """
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            before, now = json.loads(state.pop("settings")), json.loads(json.dumps(self.settings))
        except _DAMAGED as error:
            raise StateError(
                f"'{self.path}', the state of an unfinished run, is damaged: remove it to start "
                "anew"
            ) from error
        differences = [
            f"{key}: {before.get(key)} then, {now.get(key)} now"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if differences:
            raise StateError(
                f"'{self.path}' is of an unfinished run with other settings "
                f"({'; '.join(differences)}): use those of then to go on with it, or remove it"
            )
        return dict(state)

    def remove(self) -> None:
        """The run is finished."""
        self.path.unlink(missing_ok=True)
