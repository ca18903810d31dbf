"""A dry run counts, measures and leaves nothing behind."""

import sys

import numpy as np
import pytest
import torch
from small_run import CONFIG, change, pictures

from ijepa_zoo.cli import main
from ijepa_zoo.errors import SettingsError
from ijepa_zoo.train import describe_config, load_config
from ijepa_zoo.train.dry_run import dry_run
from ijepa_zoo.train.flops import flops_per_image, peak_flops


def test_dry_run_measures_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "images.npy", pictures())
    (tmp_path / "own.yaml").write_text(describe_config(CONFIG))
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--config", "own.yaml", "--data", "images.npy", "--dry-run"]) == 0
    assert "32 training images, 9 updates of 8 images" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"images.npy", "own.yaml"}
    report = dry_run(CONFIG, pictures())
    assert "(1 processes, 2 micro-batches each)" in str(report)
    assert 1e8 < report.memory < 1e11
    assert report.step_seconds > 0
    with pytest.raises(SettingsError, match=r"optim\.batch_size=8"):
        dry_run(CONFIG, pictures(10))


@pytest.mark.parametrize(
    ("workers", "duration"),
    [
        (0, "68 days, 1:20:00 for the run, limited by"),
        (5, "12 days, 12:00:00 for the run, without"),
    ],
)
def test_report_has_totals_that_count_the_optimizer_once(monkeypatch, workers, duration):
    seconds = iter([100.0, 1.2, 1.7, 9.0])  # largest masks, one part, two parts, reading
    module = sys.modules[dry_run.__module__]  # its package has the function under this name
    monkeypatch.setattr(module, "_seconds", lambda work, device: next(seconds))
    optim = {"batch_size": 16, "duration": "4e5 steps"}
    runtime = {"micro_batch_size": 4, "workers": workers}
    report = dry_run(change(CONFIG, runtime=runtime, optim=optim), pictures())
    assert report.step_seconds == pytest.approx(1.2 + 3 * (1.7 - 1.2))
    lines = dict(line.split(maxsplit=1) for line in str(report).splitlines())
    assert lines["speed"].startswith("5.926 images/s")
    assert "needs runtime.workers=5" in lines["loader"]  # 4 images in 3 seconds
    assert lines["time"].startswith(duration)


def test_flops_of_a_published_recipe():
    assert flops_per_image(load_config("vitb16_in1k")) == pytest.approx(82.6e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
    ],
)
def test_peaks_of_known_gpus(monkeypatch, name, precision, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if tflops is None else pytest.approx(tflops * 1e12)
    assert peak_flops(torch.device("cuda", 0), precision) == expected
    assert peak_flops(torch.device("cpu"), precision) is None
