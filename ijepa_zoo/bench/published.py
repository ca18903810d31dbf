"""The published code, imported at run time from a clone that the user has.

It is CC-BY-NC: nothing of it is in this package.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_MODULES = {
    "helper": "src.helper",
    "networks": "src.models.vision_transformer",
    "masks": "src.masks.utils",
    "multiblock": "src.masks.multiblock",
    "transforms": "src.transforms",
    "logs": "src.utils.logging",
}


@dataclass(frozen=True)
class PublishedCode:
    """Modules of the published code.

    Attributes:
        helper: Optimizer and schedules.
        networks: Encoder and predictor.
        masks: How masks choose tokens.
        multiblock: The collator that samples masks.
        transforms: Crops and normalisation.
        logs: Statistics of gradients, which its loop takes in every step.
    """

    helper: ModuleType
    networks: ModuleType
    masks: ModuleType
    multiblock: ModuleType
    transforms: ModuleType
    logs: ModuleType


def published_code(path: str | Path | None) -> PublishedCode:
    """Import the published code from a clone of it.

    Search path, imported modules and log settings of this process are put back afterwards.

    Args:
        path: Folder of a clone of github.com/facebookresearch/ijepa.

    Raises:
        ValueError: `path` is missing or no such clone.
    """
    if path is None:
        raise ValueError(
            "published needs a clone of the published code: git clone "
            "https://github.com/facebookresearch/ijepa, and --published-path ijepa"
        )
    folder = Path(path).expanduser().resolve()
    missing = [name for name in _MODULES.values() if not (folder / _file_of(name)).is_file()]
    if missing:
        raise ValueError(
            f"--published-path {path} is no clone of github.com/facebookresearch/ijepa: it has no "
            f"{_file_of(missing[0])}"
        )
    with _elsewhere(folder):
        return PublishedCode(**{k: importlib.import_module(name) for k, name in _MODULES.items()})


def _file_of(module: str) -> Path:
    return Path(*module.split(".")).with_suffix(".py")


@contextmanager
def _elsewhere(folder: Path) -> Iterator[None]:
    """Import `src` from a folder, whatever else is called so, and leave no trace."""
    root = logging.getLogger()
    handlers, level, path = root.handlers[:], root.level, sys.path[:]
    others = {name: sys.modules.pop(name) for name in _source_modules()}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        for name in _source_modules():
            del sys.modules[name]
        sys.modules.update(others)
        sys.path[:] = path
        root.handlers[:] = handlers
        root.setLevel(level)


def _source_modules() -> list[str]:
    return [name for name in sys.modules if name == "src" or name.startswith("src.")]
