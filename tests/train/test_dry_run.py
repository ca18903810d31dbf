"""A dry run counts, measures and leaves nothing behind."""

import sys

import numpy as np
import pytest
import several_processes
import torch
from small_run import CONFIG, change, pictures

from ijepa_zoo.train.dry_run import DryRunReport, dry_run
from ijepa_zoo.train.flops import Flops, flops_per_image
from ijepa_zoo.train.networks import build_networks


def test_dry_run_measures_and_leaves_nothing_behind(tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", pictures())
    monkeypatch.chdir(tmp_path)
    report = dry_run(CONFIG, tmp_path / "images.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["images.npy"]
    assert report.parameters["encoder"] == report.parameters["target_encoder"]
    assert (report.images, report.steps, report.batch_size) == (32, 9, 8)
    assert (report.world_size, report.parts) == (1, 2)
    assert report.largest[0] > report.typical[0]
    assert report.largest[1] >= report.typical[1]
    assert 1e8 < report.memory < 1e11
    assert min(report.step_seconds, report.read_rate) > 0
    with torch.device("meta"):
        model = build_networks(CONFIG)
    assert report.parameters["predictor"] == sum(p.numel() for p in model.predictor.parameters())
    assert report.flops == flops_per_image(model, report.typical[0], 4, report.typical[1])


def test_further_parts_do_not_count_the_optimizer_again(monkeypatch):
    seconds = iter([9.0, 1.0, 5.0, 1.2, 1.4, 1.7, 8.0])  # warm-up, one part, two parts
    done = []

    def timed(trainer, batch, masks, parts):
        done.append((masks[0].shape[1], parts))
        return next(seconds) if len(done) > 2 else 100.0

    module = sys.modules[dry_run.__module__]  # its package has the function under this name
    monkeypatch.setattr(module, "_timed_update", timed)
    optim = {"batch_size": 16, "duration": "4 steps"}
    report = dry_run(change(CONFIG, runtime={"micro_batch_size": 4}, optim=optim), pictures())
    assert report.parts == 4
    assert report.step_seconds == pytest.approx(1.2 + 3 * (1.7 - 1.2))
    largest, typical = report.largest[0], report.typical[0]
    assert done == [*2 * [(largest, 2)], *4 * [(typical, 1)], *3 * [(typical, 2)]]


def test_threads_are_those_of_the_run(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    dry_run(change(CONFIG, runtime={"threads": 1}), pictures())
    assert chosen[0] == 1


def test_report_has_totals():
    report = DryRunReport(
        parameters={"encoder": 630_000_000, "predictor": 22_000_000, "target_encoder": 630_000_000},
        flops=Flops(333 * 10**9, 87 * 10**9, 173 * 10**9, 61 * 10**9),
        images=1_280_655, steps=187_500, batch_size=2048, parts=8, world_size=2, device="GPU X",
        largest=(101, 54), typical=(70, 42), memory=70 * 2**30, memory_limit=80 * 2**30,
        step_seconds=2.048, read_rate=300.0,
    )  # fmt: skip
    lines = dict(line.split(maxsplit=1) for line in str(report).splitlines())
    assert lines["GFLOP/image"].startswith("654:")
    assert "70.00 of 80.0 GiB" in lines["memory"]
    assert lines["speed"].startswith("1000 images/s, 327 TFLOP/s")
    assert "runtime.workers=2" in lines["loader"]
    assert lines["time"].startswith("4.4 days")


def test_settings_that_do_not_fit_are_refused_as_in_a_run():
    with pytest.raises(ValueError, match=r"optim\.batch_size=8"):
        dry_run(CONFIG, pictures(10))


TWO = """
    import os, torch
    from train.small_run import CONFIG, change, pictures
    from ijepa_zoo.train.dry_run import dry_run
    from ijepa_zoo.train.networks import build_networks

    report = dry_run(change(CONFIG, runtime={"parallel": "fsdp2"}), pictures())
    if os.environ["RANK"] == "0":
        with torch.device("meta"):
            encoder = build_networks(CONFIG).encoder
        assert (report.world_size, report.parts) == (2, 1)
        assert report.parameters["encoder"] == sum(p.numel() for p in encoder.parameters())
    else:
        assert report is None
"""


def test_two_processes_share_the_dry_run():
    several_processes.run(TWO, 2)
