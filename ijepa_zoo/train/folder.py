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
from .config import (
    OptimConfig,
    PretrainConfig,
    differences,
    dump_config,
    override,
    parse_config,
    steps_of,
)
from .logger import read_log
from .precision import resolve_precision

_SETTINGS, _DATA = "config.yaml", "data.json"
_OLD = re.compile(r"^(machine:|  cut:)", re.MULTILINE)  # names of settings in version 0.1
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
    out: Path,
    config: PretrainConfig,
    images: ImageDataset,
    distributed: Distributed,
    source: Path | None = None,
) -> PretrainConfig:
    """Write settings and data into the folder, or refuse others than those of its checkpoints.

    Args:
        out: The run's folder.
        config: Settings.
        images: What to train on.
        distributed: The processes of the run.
        source: The run that a new one branches from.

    Returns:
        The settings of the run, in which `optim.precision=auto` is resolved: by the folder where
        it has checkpoints, else by the device of rank 0. `optim.extended_from` is that of the
        folder or of `source`, completed where the run grows.
    """
    refusal = None
    if distributed.rank == 0:
        try:
            resumed = any((out / "checkpoints").glob("step-*"))
            before = read_settings(out) if resumed else None
            config = resolve_precision(config, distributed.device, before)
            start = before or (read_settings(source) if source else config)
            config = _extended(config, start, images)
            refusal = _refusal(out, config, before, images)
            if refusal is None:
                _write(out, config, images)
        except (RunError, FileExistsError) as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"the run's folder {out} cannot be used: {error.strerror} ({error.filename})"
    refusal, config = distributed.broadcast_object((refusal, config))
    if refusal is not None:
        raise RunError(refusal)
    return config


def read_settings(run: Path) -> PretrainConfig:
    """Settings of a run.

    Raises:
        RunError: `config.yaml` is missing, damaged or of version 0.1.
    """
    path = run / _SETTINGS
    try:
        text = path.read_text(encoding="utf-8")
        if _OLD.search(text):
            raise RunError(
                f"{run} is a run of ijepa-zoo 0.1, which has other settings: resume, export or "
                "plot it with that version (pip install 'ijepa-zoo<0.2')"
            )
        config = parse_config(text, str(path))
    except FileNotFoundError as error:
        raise RunError(
            f"{run} is not a run of ijepa-zoo pretrain: it has no {_SETTINGS}"
        ) from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error
    if not text.strip():
        raise RunError(f"{path} is damaged: it is empty")
    return config


def named_broken(path: Path) -> set[str]:
    """Images that a `broken-*.jsonl` names already."""
    if not path.exists():
        return set()
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    return {json.loads(found[1]) for line in lines if (found := _BROKEN.match(line))}


def _write(out: Path, config: PretrainConfig, images: ImageDataset) -> None:
    data = {"images": len(images), "fingerprint": images.fingerprint()}
    for name, text in ((_SETTINGS, dump_config(config)), (_DATA, json.dumps(data))):
        whole = out / f"{name}.partial"
        try:
            whole.write_text(text, encoding="utf-8")
            whole.replace(out / name)
        except OSError as error:
            whole.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(out / name)) from error


def _steps(config: PretrainConfig, images: ImageDataset) -> int:
    count = len(images) - config.data.held_out
    return steps_of(config.optim.duration, batch_size=config.optim.batch_size, images=count)


def _extended_from(optim: OptimConfig) -> tuple[str, ...]:
    """`optim.extended_from` of a run that is extended from these settings."""
    last = f"{optim.duration} {optim.extend}" if optim.extended_from else optim.duration
    return (*optim.extended_from, last)


def _extended(
    config: PretrainConfig, before: PretrainConfig, images: ImageDataset
) -> PretrainConfig:
    """Complete `optim.extended_from`; `optim.extend` is dropped where nothing is extended."""
    extend, ends = config.optim.extend, config.optim.extended_from
    if extend and ends in ((), before.optim.extended_from):
        longer = _steps(config, images) > _steps(before, images)
        ends = _extended_from(before.optim) if longer else before.optim.extended_from
    changes = {"optim.extended_from": ends, "optim.extend": extend if ends else None}
    return override(config, **changes)


def _other_settings(
    out: Path, config: PretrainConfig, before: PretrainConfig, images: ImageDataset
) -> str | None:
    """Refuse changes of what the result depends on, except a longer run with `optim.extend`."""
    longer, advice = _steps(config, images) > _steps(before, images), ""
    if longer and config.optim.extended_from == _extended_from(before.optim):
        length = ("duration", "extend", "extended_from")
        before = override(before, **{f"optim.{n}": getattr(config.optim, n) for n in length})
    elif longer and config.optim.extend is None:
        advice = ", optim.extend=constant or optim.extend=cosine to extend it"
    differing = differences(before, config)
    if not differing:
        return None
    return (
        f"{out} holds a run with other settings ({'; '.join(differing)}): use those settings "
        f"to go on with it{advice}, or another folder for a new run"
    )


def _lost_checkpoints(out: Path) -> str | None:
    """Refuse to start over in the folder of a run whose checkpoints are elsewhere."""
    found = "an export"
    if not (out / "export" / "config.json").exists():
        logged = read_log(out)
        if not logged or not (out / _DATA).exists():
            return None
        before = read_settings(out)
        data = json.loads((out / _DATA).read_text(encoding="utf-8"))
        images = data["images"] - before.data.held_out
        saved = steps_of(before.log.save_every, batch_size=before.optim.batch_size, images=images)
        # one checkpoint may have been under way when the run was killed
        if logged[-1]["step"] < 2 * saved:
            return None
        found = f"the log of {logged[-1]['step']:.0f} steps"
    return (
        f"{out} has {found} but no checkpoints: move them back into {out / 'checkpoints'}, mount "
        "their disk, or use another folder for a new run"
    )


def _refusal(
    out: Path, config: PretrainConfig, before: PretrainConfig | None, images: ImageDataset
) -> str | None:
    check_destination(out / "export", WRITTEN, overwrite=True)
    if before is None:
        return _lost_checkpoints(out)
    if refusal := _other_settings(out, config, before, images):
        return refusal
    try:
        data = json.loads((out / _DATA).read_text(encoding="utf-8"))
        count, fingerprint = data["images"], data["fingerprint"]
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
