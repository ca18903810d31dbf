"""Training on a CUDA GPU: run with `python -m pytest -m gpu`.

Tests that take `device` run on the CPU otherwise.
"""

import signal
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from small_run import CONFIG, after_updates, change, pictures, rows, state, step_batches

from ijepa_zoo.data import open_images
from ijepa_zoo.distributed import Distributed, choose_device
from ijepa_zoo.train import Interrupted, Trainer, dry_run, pretrain

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
IMAGES = pictures()
# head widths of 16 and 8, which the fast attention kernels take
SMALL = change(
    CONFIG, model={"embed_dim": 64, "num_heads": 4, "predictor_embed_dim": 32, "predictor_depth": 2}
)
GPU = change(SMALL, runtime={"device": "cuda"})


def losses(folder, config):
    pretrain(config, IMAGES, folder, progress=False)
    return [float(row["loss"]) for row in rows(folder)]


def trainer_on(device, **sections):
    config = change(SMALL, **sections)
    return Trainer(config, open_images(IMAGES), Distributed(device=choose_device(device)))


@contextmanager
def group_of_one(device):
    """A process group of this process alone, as torchrun would make it for one GPU."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.01), ("bf16", 0.03)])
def test_same_losses_as_the_cpu(tmp_path, precision, tolerance):
    config = change(GPU, optim={"precision": precision})
    on_cpu = losses(tmp_path / "cpu", SMALL)
    assert losses(tmp_path / "gpu", config) == pytest.approx(on_cpu, rel=tolerance)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize(
    "runtime",
    [
        {"compile": True},
        {"activation_checkpointing": True, "workers": 2},
        {"compile": True, "activation_checkpointing": True},
    ],
)
def test_bf16_with_every_runtime_setting_stays_close(tmp_path, runtime):
    bf16 = change(GPU, optim={"precision": "bf16"})
    plain = losses(tmp_path / "plain", bf16)
    assert losses(tmp_path / "other", change(bf16, runtime=runtime)) == pytest.approx(
        plain, rel=0.03
    )


@pytest.mark.gpu
@no_gpu
def test_stopped_and_resumed_goes_on(tmp_path, monkeypatch):
    whole = losses(tmp_path / "whole", GPU)
    with monkeypatch.context() as patch:
        after_updates(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            losses(tmp_path / "parts", GPU)
    assert losses(tmp_path / "parts", GPU) == pytest.approx(whole, rel=1e-4)
    tensors, _ = state(tmp_path / "parts")
    assert all(value.isfinite().all() for value in tensors.values())


@pytest.mark.gpu
@no_gpu
def test_dry_run_reports_gpu_memory():
    report = dry_run(GPU, IMAGES)
    assert report is not None
    assert 0 < report.memory < report.memory_limit


def test_kernels_are_chosen_on_a_gpu_only(device):
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    trainer = trainer_on(device)
    after = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    assert after == ((False, "high") if device == "cuda" else before)
    assert ("(TF32 products)" in str(trainer)) == (device == "cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_micro_batches_equal_one_batch(device, precision):
    found = []
    for size in (8, 4):
        trainer = trainer_on(
            device,
            mask={"group_size": 8},
            optim={"regularizer_weight": 0.0, "precision": precision},
            runtime={"micro_batch_size": size},
        )
        steps = list(trainer.batches())
        assert {len(step) for step in steps} == {8 // size}
        found.append([trainer.train_step(step).metrics["loss"] for step in steps])
    assert found[1] == pytest.approx(
        found[0], rel=1e-5 if (device, precision) == ("cpu", "fp32") else 0.01
    )


@pytest.mark.parametrize(("parallel", "precision"), [("ddp", "bf16"), ("fsdp2", "fp32")])
def test_a_group_of_one_process_equals_none(
    tmp_path, monkeypatch, capsys, device, parallel, precision
):
    """Wrapped or sharded, stopped and resumed, with checkpoints of sharded tensors."""
    config = change(
        SMALL,
        optim={"precision": precision},
        runtime={"device": device, "parallel": parallel},
    )
    whole = losses(tmp_path / "alone", config)
    assert parallel not in capsys.readouterr().err
    with group_of_one(device):
        with monkeypatch.context() as patch:
            after_updates(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Interrupted):
                losses(tmp_path / "group", config)
        resumed = losses(tmp_path / "group", config)
    assert f", {parallel}, " in capsys.readouterr().err
    assert resumed == pytest.approx(whole, rel=1e-6 if device == "cpu" else 0.03)
    expected, found = (state(tmp_path / name)[0] for name in ("alone", "group"))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}


@pytest.mark.gpu
@no_gpu
def test_the_host_waits_for_nothing_in_an_ordinary_step():
    trainer = trainer_on(
        "cuda",
        optim={
            "precision": "bf16",
            "position_noise": 0.1,
        },
    )
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
