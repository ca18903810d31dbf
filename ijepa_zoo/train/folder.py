"""A run's folder: one owner at a time, one set of settings and images for its whole life."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock, Timeout

from ..data.datasets import ImageDataset
from ..distributed import Distributed
from ..errors import RunError
from ..weights.export import check_destination
from ..weights.writers import WRITTEN
from .config import PretrainConfig
from .settings import differences, dump, parse
from .values import named_values

_SETTINGS, _DATA = "config.yaml", "data.json"
_BROKEN = re.compile(r'\{"image": ("(?:[^"\\]|\\.)*")')


def claim_folder(out: Path, distributed: Distributed, stack: ExitStack) -> None:
    """Keep other runs out of the folder; rank 0 holds the lock for all."""
    refusal = None
    if distributed.rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(out / ".lock", timeout=0))
        except Timeout:
            refusal = f"another process is training in {out} now: wait for it, or choose another"
        except OSError as error:
            refusal = f"the run's folder {out} cannot be used: {error.strerror or error}"
    if (refusal := distributed.broadcast_object(refusal)) is not None:
        raise RunError(refusal)


def settle_folder(
    out: Path, config: PretrainConfig, images: ImageDataset, distributed: Distributed
) -> None:
    """Write settings and data into the folder, or refuse others than those of its checkpoints."""
    refusal = None
    if distributed.rank == 0:
        try:
            refusal = _refusal(out, config, images)
            if refusal is None:
                _write(out, config, images)
        except (RunError, FileExistsError) as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"the run's folder {out} cannot be used: {error.strerror} ({error.filename})"
    if (refusal := distributed.broadcast_object(refusal)) is not None:
        raise RunError(refusal)


def read_settings(run: Path) -> PretrainConfig:
    """Settings of a run.

    Raises:
        RunError: `config.yaml` is missing or damaged.
    """
    path = run / _SETTINGS
    try:
        text = path.read_text(encoding="utf-8")
        config = parse(text, str(path))
    except FileNotFoundError as error:
        raise RunError(f"{run} is no run of ijepa-zoo pretrain: it has no {_SETTINGS}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error
    lacking = [name for name, _ in named_values(config) if f"{name.split('.')[-1]}:" not in text]
    if lacking:
        raise RunError(f"{path} is damaged: it has no {lacking[0]}")
    return config


def named_broken(path: Path) -> set[str]:
    """Images that a `broken-*.jsonl` names already."""
    if not path.exists():
        return set()
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    return {json.loads(found[1]) for line in lines if (found := _BROKEN.match(line))}


def _write(out: Path, config: PretrainConfig, images: ImageDataset) -> None:
    data = {"images": len(images), "fingerprint": images.fingerprint()}
    for name, text in ((_SETTINGS, dump(config)), (_DATA, json.dumps(data))):
        whole = out / f"{name}.partial"
        try:
            whole.write_text(text, encoding="utf-8")
            whole.replace(out / name)
        except OSError as error:
            whole.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(out / name)) from error


def _refusal(out: Path, config: PretrainConfig, images: ImageDataset) -> str | None:
    check_destination(out / "export", WRITTEN, overwrite=True)
    if not any((out / "checkpoints").glob("step-*")):
        return None
    differing = differences(read_settings(out), config)
    if differing:
        return (
            f"{out} holds a run with other settings ({'; '.join(differing)}): use those settings "
            "to go on with it, or another folder for a new run"
        )
    try:
        before = json.loads((out / _DATA).read_text(encoding="utf-8"))
        count, fingerprint = before["images"], before["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return (
            f"{out / _DATA}, which says what images the run had, is missing or damaged ({error}): "
            "use another folder for a new run"
        )
    if fingerprint != images.fingerprint():
        return (
            f"{out} was trained on other images: {count} then, {len(images)} now, or "
            "other names. Name the same data to go on, or another folder for a new run"
        )
    return None
