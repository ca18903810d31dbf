"""Training on a CUDA GPU: run with `python -m pytest -m gpu`.

Tests that take `device` run on the CPU otherwise.
"""

import pytest
import torch
import torch.distributed as dist
from small_run import CONFIG, change, pictures, rows, state, step_batches, stop_after, train

from ijepa_zoo.data import open_images
from ijepa_zoo.distributed import Distributed, choose_device
from ijepa_zoo.train import Trainer

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
IMAGES = pictures()
# head widths of 16 and 8, which the fast attention kernels take
SMALL = change(
    CONFIG, model={"embed_dim": 64, "num_heads": 4, "predictor_embed_dim": 32, "predictor_depth": 2}
)
GPU = change(SMALL, runtime={"device": "cuda"})


def losses(folder, config):
    train(folder, config)
    return [float(row["loss"]) for row in rows(folder)]


def trainer_on(device, **sections):
    config = change(SMALL, **sections)
    return Trainer(config, open_images(IMAGES), Distributed(device=choose_device(device)))


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize(
    ("precision", "runtime"),
    [
        ("fp32", {}),
        ("bf16", {"compile": True}),
        ("bf16", {"compile": True, "activation_checkpointing": True}),
    ],
)
def test_same_losses_as_the_cpu(tmp_path, precision, runtime):
    config = change(GPU, optim={"precision": precision}, runtime=runtime)
    expected = pytest.approx(losses(tmp_path / "cpu", SMALL), rel=0.03)
    assert losses(tmp_path / "gpu", config) == expected


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_stopped_in_a_group_of_one_process_equals_none(tmp_path, monkeypatch, device, parallel):
    """Wrapped or sharded, with checkpoints of sharded tensors."""
    runtime = {"device": device, "parallel": parallel}
    config = change(SMALL, runtime=runtime, optim={"duration": "4 steps"})
    whole = losses(tmp_path / "alone", config)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        stop_after(monkeypatch, 1, tmp_path / "group", config)
        resumed = losses(tmp_path / "group", config)
    finally:
        dist.destroy_process_group()
    assert resumed == pytest.approx(whole, rel=1e-6 if device == "cpu" else 0.03)
    shapes = [
        {n: t.shape for n, t in state(tmp_path / name)[0].items()} for name in ("alone", "group")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.gpu
@no_gpu
def test_the_host_waits_for_nothing_in_an_ordinary_step():
    trainer = trainer_on("cuda", optim={"precision": "bf16"})
    steps = [step_batches(trainer.data, step) for step in range(4)]
    steps = [[part.pin_memory() for part in step] for step in steps]
    for step in steps[:2]:  # the first allocate, and copy what stays
        trainer.train_step(step)
    torch.cuda.set_sync_debug_mode("error")  # polling an event is allowed
    try:
        updates = [trainer.train_step(step) for step in steps[2:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(update.metrics["loss"] > 0 for update in updates)
