"""A run of a few seconds, shared by the tests of the trainer."""

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from ijepa_zoo.models.jepa import IJepa
from ijepa_zoo.train import Interrupted, pretrain
from ijepa_zoo.train.checkpoint import checkpoint_path, checkpoint_steps, read_checkpoint
from ijepa_zoo.train.config import PretrainConfig

CONFIG = PretrainConfig(
    model={"name": "vit_nano8_64_ijepa", "embed_dim": 24, "depth": 2, "num_heads": 2,
           "predictor_embed_dim": 12, "predictor_depth": 1},
    data={"held_out": 8, "mean": (0.4, 0.5, 0.6)},
    mask={"group_size": 4, "min_keep": 4, "per_image": 2},
    optim={"batch_size": 8, "duration": "9 steps", "warmup": "3 steps", "momentum": 0.9,
           "regularizer_weight": 0.1, "precision": "fp32"},
    log={"log_every": 1, "monitor_every": 4, "save_every": "4 steps"},
    runtime={"device": "cpu", "workers": 0, "timeout": 60},
)  # fmt: skip
PLAIN = {"regularizer_weight": 0.0}


def change(config, **sections):
    """`change(CONFIG, optim={"lr": 1})`: the settings with some values replaced."""
    tree = config.model_dump()
    for name, values in sections.items():
        tree[name] = {**tree[name], **values} if isinstance(values, dict) else values
    return PretrainConfig(**tree)


def pictures(count=40, size=64):
    """Smooth random pictures, uint8 `[count, size, size, 3]`."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(size // 8, axis=1).repeat(size // 8, axis=2)


def step_batches(data, step):
    """The micro-batches of a step of `TrainBatches`."""
    return [data[number] for number in range(step * data.per_step, (step + 1) * data.per_step)]


def saved_tensors(checkpoint):
    """Whole tensors of a checkpoint by name."""
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
    }
    read_checkpoint(checkpoint, tensors)
    return tensors


def state(folder):
    """Tensors and extra values of a run's newest checkpoint."""
    checkpoints = Path(folder) / "checkpoints"
    newest = checkpoint_path(checkpoints, checkpoint_steps(checkpoints)[-1])
    return saved_tensors(newest), json.loads((newest / "state.json").read_text())["extra"]


def same_state(one, other):
    """Whether two runs have the same networks and optimizer, to the bit."""
    (a, _), (b, _) = state(one), state(other)
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])] == []


def rows(folder):
    """Rows of the steps of a run's log, without what depends on the clock."""
    clock = ("time (ms)", "images_per_second", "data_wait")
    with (folder / "log.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["step"] != "-1"]
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


def after_updates(monkeypatch, updates, action):
    """Run `action` at the end of update number `updates`."""
    done, original = [], IJepa.update_target

    def update_target(self, momentum):
        original(self, momentum)
        done.append(momentum)
        if len(done) == updates:
            action()

    monkeypatch.setattr(IJepa, "update_target", update_target)


def train(folder, config=CONFIG, images=None, **options):
    """Pretrain on `pictures()`, or resume."""
    images = pictures() if images is None else images
    return pretrain(config, images, folder, progress=False, **options)


def stop_after(monkeypatch, updates, folder, config=CONFIG, number=signal.SIGTERM, **options):
    """Train until update number `updates`, and be stopped there by a signal."""
    with monkeypatch.context() as patch:
        after_updates(patch, updates, lambda: signal.raise_signal(number))
        with pytest.raises(Interrupted, match="stopped after step") as stop:
            train(folder, config, **options)
    assert stop.value.signal == number
