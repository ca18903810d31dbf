"""A run's folder: one owner at a time, one set of settings and images for its whole life."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock, Timeout

from ..data.image_sets import ImageSet
from ..processes import Processes
from .config import PretrainConfig
from .settings import differences, dump, parse


class RunError(RuntimeError):
    """The run's folder is in use or belongs to another run."""


def claim_folder(out: Path, processes: Processes, stack: ExitStack) -> None:
    """Keep other runs out of the folder; rank 0 holds the lock for all."""
    refusal = None
    if processes.rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(out / ".lock", timeout=0))
        except Timeout:
            refusal = f"another process is training in {out} now: wait for it, or choose another"
        except OSError as error:
            refusal = f"the run's folder {out} cannot be used: {error.strerror or error}"
    if (refusal := processes.share(refusal)) is not None:
        raise RunError(refusal)


def settle_folder(
    out: Path, config: PretrainConfig, images: ImageSet, processes: Processes
) -> None:
    """Write settings and data into the folder, or refuse others than those of its checkpoints."""
    refusal = _refusal(out, config, images) if processes.rank == 0 else None
    if (refusal := processes.share(refusal)) is not None:
        raise RunError(refusal)
    if processes.rank == 0:
        data = {"images": len(images), "fingerprint": images.fingerprint()}
        for name, text in (("config.yaml", dump(config)), ("data.json", json.dumps(data))):
            whole = out / f"{name}.partial"
            whole.write_text(text, encoding="utf-8")
            whole.replace(out / name)


def _refusal(out: Path, config: PretrainConfig, images: ImageSet) -> str | None:
    if not any((out / "checkpoints").glob("step-*")) or not (out / "config.yaml").exists():
        return None
    origin = out / "config.yaml"
    differing = differences(parse(origin.read_text(encoding="utf-8"), str(origin)), config)
    if differing:
        return (
            f"{out} holds a run with other settings ({'; '.join(differing)}): use those settings "
            "to go on with it, or another folder for a new run"
        )
    before = json.loads((out / "data.json").read_text(encoding="utf-8"))
    if before["fingerprint"] != images.fingerprint():
        return (
            f"{out} was trained on other images: {before['images']} then, {len(images)} now, or "
            "other names. Name the same data to go on, or another folder for a new run"
        )
    return None
