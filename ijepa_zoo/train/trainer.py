"""The pretraining loop: single process, no hidden state.

Data order, crops, masks and rates are functions of (seed, step). A checkpoint is therefore tensors
plus `step`, and a run that was stopped and resumed equals one that was not, bit for bit.
"""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ..masks import MultiBlockMasks
from ..models.factory import create_ijepa
from ..models.jepa import IJepa
from ..seeds import Stream, fold
from ..weights.layouts import CheckpointError
from .batches import batch_indices, crop_and_resize, crop_boxes, normalise
from .checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from .config import PretrainConfig
from .monitor import rankme, spread
from .optim import make_optimizer, set_rates
from .regularizers import VarianceCovariance

_COLUMNS = (
    "step", "loss", "lr", "weight_decay", "momentum", "context_tokens", "target_tokens",
    "rankme", "spread", "images_per_second",
)  # fmt: skip
Images = npt.NDArray[np.uint8]


class Trainer:
    """One run: networks, optimizer and the number of updates done.

    Args:
        config: Settings.
        images: uint8 `[n, H, W, 3]`, in memory or memory-mapped.
        device: Where the networks live.

    Raises:
        ValueError: `images` or the settings do not fit the model.
    """

    def __init__(self, config: PretrainConfig, images: Images, device: str = "cpu") -> None:
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not len(images):
            raise ValueError(
                f"images are {images.dtype} {images.shape}; they must be uint8 [n, H, W, 3]"
            )
        if len(images) < 2:
            raise ValueError("one image is no data set: RankMe and spread need at least two")
        try:
            json.dumps(asdict(config))
        except TypeError as error:  # a checkpoint could not be written, hours from now
            raise ValueError(f"settings must be plain numbers, texts and lists: {error}") from error
        self.config, self.images, self.device = config, images, torch.device(device)
        self.step = 0
        regularizer = None
        if config.regularizer_weight:
            regularizer = VarianceCovariance(config.regularizer_weight, config.regularizer_over)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold(config.seed, Stream.INIT))
            self.model: IJepa = create_ijepa(
                config.model, pretrained=False, regularizer=regularizer, **config.network
            )
        self.model.to(self.device).train()
        embed = self.model.encoder.patch_embed
        self.image_size: tuple[int, int] = embed.img_size
        self.masks = MultiBlockMasks(
            grid_size=embed.grid_size,
            num_targets=config.num_targets,
            target_scale=config.target_scale,
            target_aspect=config.target_aspect,
            context_scale=config.context_scale,
            min_keep=config.min_keep,
            mode=config.mask_mode,
        )
        self.optimizer = make_optimizer(self.model.encoder, self.model.predictor)

    def batch(self) -> torch.Tensor:
        """Normalised images `[B, 3, H, W]` of the next step."""
        config = self.config
        chosen = batch_indices(
            len(self.images), config.batch_size, seed=config.seed, step=self.step
        )
        boxes = crop_boxes(
            config.batch_size,
            self.images.shape[1:3],
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            seed=config.seed,
            step=self.step,
        )
        pixels = torch.from_numpy(self.images[chosen]).to(self.device)
        return normalise(crop_and_resize(pixels, boxes, self.image_size), config.mean, config.std)

    def update(self) -> dict[str, float]:
        """Do one update.

        Returns:
            The log values of the step.

        Raises:
            FloatingPointError: The loss is not finite. The weights are those before the update.
        """
        config, rates = self.config, self.config.rates(self.step)
        context, targets = self.masks.sample(config.batch_size, seed=config.seed, step=self.step)
        context, targets = context.to(self.device), targets.to(self.device)
        images = self.batch()
        bf16 = config.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = self.model(images, context, targets)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {self.step}; lower lr (now {rates['lr']:.2g}) "
                "or use precision='fp32'"
            )
        set_rates(self.optimizer, lr=rates["lr"], weight_decay=rates["weight_decay"])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.model.update_target(rates["momentum"])
        self.step += 1
        tokens = {"context_tokens": context.shape[1], "target_tokens": targets.shape[2]}
        return {"loss": value, **rates, **tokens}

    @torch.no_grad()
    def monitor(self, count: int = 512) -> dict[str, float]:
        """RankMe and spread of the target encoder on the first `count` images, not cropped."""
        features = []
        for start in range(0, min(count, len(self.images)), 128):
            pixels = np.array(self.images[start : min(start + 128, count)])  # maps are read-only
            whole = np.tile([0, 0, *pixels.shape[1:3]], (len(pixels), 1))
            images = crop_and_resize(torch.from_numpy(pixels), whole, self.image_size)
            images = normalise(images, self.config.mean, self.config.std).to(self.device)
            features.append(self.model.target_encoder.encode(images).mean(dim=1))
        pooled = torch.cat(features)
        return {"rankme": rankme(pooled), "spread": spread(pooled)}

    def checkpoint(self) -> Checkpoint:
        """The state of the run, sharing memory with it."""
        tensors = {
            f"{network}.{name}": value
            for network in ("encoder", "predictor", "target_encoder")
            for name, value in getattr(self.model, network).state_dict().items()
        }
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return Checkpoint(self.step, asdict(self.config), tensors)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same settings.

        Raises:
            CheckpointError: The settings differ; names each one.
        """
        mine = _jsonable(asdict(self.config))
        differing = [
            f"{key}: {checkpoint.config.get(key)!r} there, {mine.get(key)!r} now"
            for key in mine.keys() | checkpoint.config.keys()
            if mine.get(key) != checkpoint.config.get(key)
        ]
        if differing:
            raise CheckpointError(
                "the checkpoint belongs to a run with other settings ("
                + "; ".join(sorted(differing))
                + "): use those settings or another folder"
            )
        for network in ("encoder", "predictor", "target_encoder"):
            getattr(self.model, network).load_state_dict(checkpoint.network(network))
        for name, parameter in self.model.named_parameters():
            start = f"optimizer.{name}."
            state = {
                key.removeprefix(start): value.to(self.device).clone()
                for key, value in checkpoint.tensors.items()
                if key.startswith(start)
            }
            if state:
                self.optimizer.state[parameter] = state
        self.step = checkpoint.step


def pretrain(
    config: PretrainConfig,
    images: Images,
    folder: str | Path,
    *,
    device: str = "cpu",
    log_every: int = 10,
    monitor_every: int = 200,
    checkpoint_every: int = 200,
    progress: bool = True,
) -> IJepa:
    """Pretrain without labels, or go on with the newest checkpoint of `folder`.

    `folder` receives `checkpoint-<step>.safetensors` (the newest two) and `log.csv`. Ctrl-C and
    SIGTERM end the run after the current step, with a checkpoint; the same call goes on from there.

    Args:
        config: Everything that decides the result.
        images: uint8 `[n, H, W, 3]`.
        folder: The run's folder; made if it does not exist.
        device: Where to train.
        log_every: Steps between rows of the log.
        monitor_every: Steps between measurements of RankMe and spread.
        checkpoint_every: Steps between checkpoints; the last step is always saved.
        progress: Show a progress bar.

    Returns:
        The trained networks.

    Raises:
        CheckpointError: The newest checkpoint is broken or has other settings.
        KeyboardInterrupt: The run was stopped; its message says how to go on.
    """
    if min(log_every, monitor_every, checkpoint_every) < 1:
        raise ValueError("log_every, monitor_every and checkpoint_every must be at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, images, device)
    if list_checkpoints(folder):
        trainer.restore(load_checkpoint(folder))
    bar = tqdm(total=config.steps, initial=trainer.step, disable=not progress, unit="step")
    with _stop_signal() as stopped, _log(folder / "log.csv", trainer.step) as log, bar:
        while trainer.step < config.steps and not stopped:
            start = time.perf_counter()
            row: dict[str, float] = {"step": trainer.step, **trainer.update()}
            row["images_per_second"] = config.batch_size / (time.perf_counter() - start)
            last = trainer.step == config.steps
            if trainer.step % monitor_every == 0 or last:
                row |= trainer.monitor()
            if (trainer.step % log_every == 0) or "rankme" in row:
                log.writerow({key: f"{value:.6g}" for key, value in row.items()})
                bar.set_postfix({"loss": f"{row['loss']:.4f}", "lr": f"{row['lr']:.2g}"})
            bar.update()
            if trainer.step % checkpoint_every == 0 or last or stopped:
                save_checkpoint(folder, trainer.checkpoint())
    if stopped and trainer.step < config.steps:
        raise KeyboardInterrupt(
            f"stopped after step {trainer.step} of {config.steps}, saved in {folder}; "
            "run the same command again to go on"
        )
    return trainer.model


@contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of ending in the middle of an update."""
    received: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def _log(path: Path, step: int) -> Iterator[csv.DictWriter[str]]:
    """Open the CSV log to append rows from `step` on; rows after a lost checkpoint are dropped."""
    rows: list[dict[str, str]] = []
    if path.exists():
        try:
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is no log of a run ({error}): move it away to go on without its rows"
            ) from error
    whole = path.with_suffix(".partial")  # a full disk must not cost the rows that are there
    with whole.open("w", newline="") as file:
        log = csv.DictWriter(file, _COLUMNS)
        log.writeheader()
        log.writerows(rows)
    os.replace(whole, path)
    with path.open("a", newline="", buffering=1) as file:
        yield csv.DictWriter(file, _COLUMNS)


def _jsonable(value: Any) -> Any:
    """`value` as it looks after a trip through JSON: tuples become lists."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value
