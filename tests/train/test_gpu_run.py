"""Training on a CUDA GPU: run with `python -m pytest -m gpu`."""

import signal

import pytest
import torch
from small_run import CONFIG, after_updates, change, pictures, rows

from ijepa_zoo.train import Interrupted, dry_run, pretrain
from ijepa_zoo.train.checkpoint import read_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
IMAGES = pictures()
# head widths of 16 and 8, which the fast attention kernels take
GPU = change(
    CONFIG,
    model={"embed_dim": 64, "num_heads": 4, "predictor_embed_dim": 32},
    machine={"device": "cuda"},
)


def losses(folder, config):
    pretrain(config, IMAGES, folder, progress=False)
    return [float(row["loss"]) for row in rows(folder)]


def test_same_losses_as_the_cpu(tmp_path):
    on_gpu = losses(tmp_path / "gpu", GPU)
    on_cpu = losses(tmp_path / "cpu", change(GPU, machine={"device": "cpu"}))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-2)


@pytest.mark.parametrize(
    "machine",
    [
        {"compile": True},
        {"activation_checkpointing": True},
        {"compile": True, "activation_checkpointing": True, "workers": 2},
    ],
)
def test_bf16_with_every_machine_setting_stays_close(tmp_path, machine):
    bf16 = change(GPU, optim={"precision": "bf16"})
    plain = losses(tmp_path / "plain", bf16)
    assert losses(tmp_path / "other", change(bf16, machine=machine)) == pytest.approx(
        plain, rel=0.03
    )


def test_stopped_and_resumed_goes_on(tmp_path, monkeypatch):
    whole = losses(tmp_path / "whole", GPU)
    with monkeypatch.context() as patch:
        after_updates(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            losses(tmp_path / "parts", GPU)
    assert losses(tmp_path / "parts", GPU) == pytest.approx(whole, rel=1e-4)
    tensors, _ = read_checkpoint(tmp_path / "parts" / "checkpoints")
    assert all(value.isfinite().all() for value in tensors.values())


def test_dry_run_reports_gpu_memory():
    report = dry_run(GPU, IMAGES)
    assert report is not None
    assert 0 < report.memory < report.memory_limit
