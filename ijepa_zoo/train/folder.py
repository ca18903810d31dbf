"""The folder of a run: its lock, and checks that settings and images stay the same."""

from __future__ import annotations

import json
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..data.datasets import ImageDataset
from ..distributed import Distributed
from ..errors import RunError, SettingsError
from ..weights.export import check_destination
from ..weights.writers import WRITTEN
from .checkpoint import LAST_SAVED, checkpoint_steps
from .config import (
    OptimConfig,
    PretrainConfig,
    differences,
    dump_config,
    override,
    parse_config,
    steps_of,
)
from .precision import resolve_precision

_SETTINGS, _DATA = "config.yaml", "data.json"
_OLD = re.compile(r"^(machine:|  cut:)", re.MULTILINE)  # names of settings in version 0.1


def open_folder(out: str | Path, data: Any, distributed: Distributed, stack: ExitStack) -> Path:
    """Create a run's folder and lock it; rank 0 holds the lock for all."""
    if not str(out):
        raise SettingsError("the run's folder has no name: give one, for example runs/first")
    folder = Path(out)
    for source in data if isinstance(data, list | tuple) else [data]:
        is_path = isinstance(source, str | os.PathLike)
        if is_path and Path(source).resolve() in folder.resolve().parents:
            raise SettingsError(
                f"the run's folder {folder} is inside its images, {source}: choose another"
            )

    def lock() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / ".lock", timeout=0))
        except Timeout:
            raise RunError(
                f"another process is training in {folder}: wait for it, or choose another folder"
            ) from None

    distributed.run_on_main(lock)
    return folder


def reconcile_settings(
    out: Path, config: PretrainConfig, images: ImageDataset, source: Path | None
) -> PretrainConfig:
    """Compare settings and images with those of the checkpoints in the folder, if there are any."""
    check_destination(out / "export", WRITTEN, overwrite=True)
    if checkpoint_steps(out / "checkpoints"):
        before = read_settings(out)
        _check_images(out, _identity(images))
        before_steps = _steps(before, len(images))
        config = _extended(config, before, before_steps, len(images))
        _check_settings(out, config, before, before_steps, len(images))
    else:
        _check_not_lost(out)
        before, count = config, len(images)
        if source is not None:
            before = read_settings(source)
            count = _read_identity(source)["images"] if config.optim.extend else count
        config = _extended(config, before, _steps(before, count), len(images))
    return config


def write_settings(out: Path, config: PretrainConfig, images: ImageDataset) -> None:
    """Write the settings and what identifies the images into a run's folder."""
    _write(out / _SETTINGS, dump_config(config))
    _write(out / _DATA, json.dumps(_identity(images)))


def same_images(one: Path, other: Path) -> bool:
    """Whether two runs have the same images."""
    try:
        return (one / _DATA).read_bytes() == (other / _DATA).read_bytes()
    except OSError:  # lost
        return False


def run_precision(out: Path, config: PretrainConfig, distributed: Distributed) -> PretrainConfig:
    """Resolve `optim.precision=auto`: that of the run in the folder, else by the device."""
    resumed = checkpoint_steps(out / "checkpoints")
    return resolve_precision(config, distributed.device, read_settings(out) if resumed else None)


def read_settings(run: Path) -> PretrainConfig:
    """Settings of a run."""
    path = run / _SETTINGS
    try:
        text = path.read_text(encoding="utf-8")
        if _OLD.search(text):
            raise RunError(
                f"{run} is a run of ijepa-zoo 0.1, which has other settings: resume, export or "
                "plot it with that version"
            )
        missing = [name for name in PretrainConfig.model_fields if f"\n{name}:" not in f"\n{text}"]
        if missing:  # truncated
            raise RunError(f"{path} is damaged: it has no {', '.join(missing)}")
        return parse_config(text, str(path))
    except FileNotFoundError:
        raise RunError(f"{run} is not a pretraining run: it has no {_SETTINGS}") from None
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error


def _write(path: Path, text: str) -> None:
    """Write a file atomically."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _check_not_lost(out: Path) -> None:
    """Refuse to start over in the folder of a run whose checkpoints were moved away."""
    if (out / _SETTINGS).exists():
        read_settings(out)  # runs of 0.1 are refused
    found = "an export" if (out / "export").exists() else None
    if (out / LAST_SAVED).exists():
        step = (out / LAST_SAVED).read_text(encoding="utf-8", errors="replace")
        found = f"a checkpoint of step {step}"
    if found is not None:
        raise RunError(
            f"{out} had {found} but has no checkpoints: move them back to {out / 'checkpoints'}, "
            "mount their disk, or use another folder for a new run"
        )


def _check_settings(
    out: Path, config: PretrainConfig, before: PretrainConfig, before_steps: int, images: int
) -> None:
    """Refuse changes that affect the result, except a longer run with `optim.extend`."""
    longer, advice = _steps(config, images) > before_steps, ""
    if longer and config.optim.extended_from == _extended_from(before.optim, before_steps):
        length = ("duration", "extend", "extended_from")
        before = override(before, **{f"optim.{n}": getattr(config.optim, n) for n in length})
    elif longer and config.optim.extend is None:
        advice = ", optim.extend=constant or optim.extend=cosine to extend it"
    differing = differences(before, config)
    if not config.optim.extended_from and before.optim.extended_from:
        advice = f", with optim.extend={before.optim.extend}"
        differing = [text for text in differing if not text.startswith("optim.extended_from")]
    if differing:
        raise RunError(
            f"{out} has a run with other settings ({'; '.join(differing)}): use those settings to "
            f"resume it{advice}, or another folder for a new run"
        )


def _identity(images: ImageDataset) -> dict[str, Any]:
    return {"images": len(images), "fingerprint": images.fingerprint()}


def _read_identity(run: Path) -> dict[str, Any]:
    path = run / _DATA
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
        return {"images": int(identity["images"]), "fingerprint": str(identity["fingerprint"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}, which identifies the images of the run, is missing or damaged: restore it, "
            f"or continue the run in another folder with --init {run} --resume-optimizer"
        ) from error


def _check_images(out: Path, identity: dict[str, Any]) -> None:
    before = _read_identity(out)
    if before["fingerprint"] != identity["fingerprint"]:
        raise RunError(
            f"{out} was trained on other images ({before['images']} then, {identity['images']} "
            "now, or other names): use the same images to resume it, or another folder for a new "
            "run"
        )


def _steps(config: PretrainConfig, images: int) -> int:
    count = images - config.data.held_out
    return steps_of(config.optim.duration, batch_size=config.optim.batch_size, images=count)


def _extended_from(optim: OptimConfig, steps: int) -> tuple[str, ...]:
    """`optim.extended_from` of a run that is extended from these settings, after `steps` steps."""
    last = f"{steps} steps {optim.extend}" if optim.extended_from else f"{steps} steps"
    return (*optim.extended_from, last)


def _extended(
    config: PretrainConfig, before: PretrainConfig, before_steps: int, images: int
) -> PretrainConfig:
    """Complete `optim.extended_from`; drop `optim.extend` if nothing is extended."""
    extend, ends = config.optim.extend, config.optim.extended_from
    if extend and ends in ((), before.optim.extended_from):
        longer = _steps(config, images) > before_steps
        ends = _extended_from(before.optim, before_steps) if longer else before.optim.extended_from
    changes = {"optim.extended_from": ends, "optim.extend": extend if ends else None}
    return override(config, **changes)
