"""The published code, imported at run time from a clone that the user has.

It is CC-BY-NC: nothing of it is in this package.
"""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

PUBLISHED = "published"
_CLONE = "https://github.com/facebookresearch/ijepa"
_MODULES = {
    "helper": "src.helper",
    "networks": "src.models.vision_transformer",
    "masks": "src.masks.utils",
    "multiblock": "src.masks.multiblock",
    "transforms": "src.transforms",
    "logs": "src.utils.logging",
}
_NEEDED = {
    "helper": ("init_opt",),
    "networks": ("VisionTransformer", "VisionTransformerPredictor"),
    "masks": ("apply_masks",),
    "multiblock": ("MaskCollator",),
    "transforms": ("make_transforms",),
    "logs": ("grad_logger",),
}
# What importing a changed or half copied file raises: its top level runs, so whole families.
_IMPORT_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(OSError, RuntimeError, SyntaxError, TypeError, ValueError),
)


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


def chosen_code(
    bench: str, vs: Sequence[str], path: str | Path | None, others: Sequence[str] = ()
) -> PublishedCode | None:
    """The published code if it is a contender, None if there is none.

    Args:
        bench: Name of the bench.
        vs: The contenders asked for.
        path: A clone of it.
        others: The contenders that the bench has beside it.

    Raises:
        ValueError: A contender is unknown, or path and contenders do not go together.
    """
    known = [PUBLISHED, *others]
    if unknown := set(vs) - set(known):
        raise ValueError(
            f"bench {bench} has no contender {', '.join(unknown)}: use {' or '.join(known)}"
        )
    if PUBLISHED in vs:
        return published_code(path)
    if path is not None:
        raise ValueError(
            f"--published-path {path} is used with --vs {PUBLISHED} only: add that, or leave the "
            "path out"
        )
    return None


def published_code(path: str | Path | None) -> PublishedCode:
    """Import the published code from a clone of it.

    Search path, imported modules and log settings of this process are put back afterwards.

    Args:
        path: Folder of a clone of github.com/facebookresearch/ijepa.

    Raises:
        ValueError: `path` is missing, no such clone, or a broken one.
        ImportError: A package that it imports is not installed.
    """
    if path is None:
        raise ValueError(
            "published needs a clone of the published code: git clone "
            f"{_CLONE}, and --published-path ijepa"
        )
    folder = Path(path).expanduser().resolve()
    missing = [name for name in _MODULES.values() if not (folder / _file_of(name)).is_file()]
    if missing:
        raise ValueError(
            f"--published-path {path} is no clone of github.com/facebookresearch/ijepa: it has no "
            f"{_file_of(missing[0])}"
        )
    with _elsewhere(folder):
        return PublishedCode(**{part: _import(part, folder, path) for part in _MODULES})


def _import(part: str, folder: Path, path: str | Path) -> ModuleType:
    """One of its modules, with the names that are used."""
    name = _MODULES[part]
    try:
        module = importlib.import_module(name)
    except _IMPORT_ERRORS as error:
        package = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if package and package.partition(".")[0] != "src":
            package = package.partition(".")[0]
            raise ImportError(
                f"{path} needs the package {package}, which is not installed: pip install {package}"
            ) from error
        reason = f"{type(error).__name__}: {error}"
        raise _unusable(path, _place_of(error, folder) or _file_of(name), reason) from error
    for needed in _NEEDED[part]:
        if not hasattr(module, needed):
            raise _unusable(path, _file_of(name), f"it has no {needed}")
    return module


def _unusable(path: str | Path, file: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: this clone cannot be used ({file}: {reason}): clone {_CLONE} again")


def _place_of(error: BaseException, folder: Path) -> Path | None:
    """The file of the clone that an error came from, below its folder."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [Path(frame.filename) for frame in frames]
    if isinstance(error, SyntaxError) and error.filename:
        files.append(Path(error.filename))
    inside = [file.relative_to(folder) for file in files if file.is_relative_to(folder)]
    return inside[-1] if inside else None


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
