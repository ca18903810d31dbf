"""A trial counts, measures and leaves nothing behind."""

import sys

import numpy as np
import pytest
import several_processes
import torch
from small_run import CONFIG, change, pictures

from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.train import load_config
from ijepa_zoo.train.dry_run import DryRunReport, dry_run, largest_masks, typical_masks
from ijepa_zoo.train.flops import Flops, flops_per_image
from ijepa_zoo.train.networks import build_networks


def counted(name, context, targets, length):
    with torch.device("meta"):
        model = build_networks(load_config(name))
    return flops_per_image(model, context, targets, length)


def by_hand(tokens, width, depth, mlp=4.0):
    """Operations of the forward pass of `depth` blocks: two for each multiplication."""
    linear = tokens * width * width * (3 + 1 + 2 * mlp)
    attention = 2 * tokens * tokens * width
    return 2 * depth * (linear + attention)


@pytest.mark.parametrize(
    ("recipe", "patches", "patch", "width", "depth", "predictor_depth"),
    [
        ("vitb16_in1k", 196, 16, 768, 12, 6),
        ("nano_scenes", 64, 8, 128, 6, 3),
    ],
)
def test_operations_are_those_of_the_closed_formula(
    recipe, patches, patch, width, depth, predictor_depth
):
    context, targets, length = 20, 4, 9
    narrow = 64 if recipe == "nano_scenes" else 384
    embed = 2 * patches * 3 * patch**2 * width
    encoder = by_hand(context, width, depth)
    projections = 2 * (context * width * narrow + targets * length * narrow * width)
    both = context + length
    # the first block reads a context once and every position once, the last writes targets only
    read = 2 * (context + patches - targets * both) * 3 * narrow**2
    written = targets * context * (2 * (1 + 1 + 8) * narrow**2 + 4 * both * narrow)
    predictor = targets * by_hand(both, narrow, predictor_depth) + read - written + projections
    found = counted(recipe, context, targets, length)
    assert found.target == pytest.approx(embed + by_hand(patches, width, depth))
    assert found.context_forward == pytest.approx(embed + encoder)
    # pixels need no gradient, so the patch embedding has one product backward instead of two
    assert found.context_backward == pytest.approx(embed + 2 * encoder)
    assert found.predictor == pytest.approx(3 * predictor)
    assert found.total == sum((found.target, found.context_forward, found.context_backward,
                               found.predictor))  # fmt: skip


def test_vit_huge_needs_less_than_the_654_gflop_of_the_published_code():
    # 654 by the closed formula with all predictor blocks whole (61 of them the predictor's)
    assert counted("vith14_in1k", 68, 4, 44).total / 1e9 == pytest.approx(650, abs=1)


@pytest.mark.parametrize("mode", ["published", "unbiased"])
def test_no_step_draws_more_than_the_largest_masks(mode):
    masks = MultiBlockMasks((8, 8), mode=mode, min_keep=4)
    context, targets = largest_masks(masks, 4, seed=0)
    assert context.shape[0] == targets.shape[0] == 4
    assert targets.shape[1] == masks.num_targets
    drawn = [masks.sample(4, seed=1, step=step) for step in range(2000)]
    assert context.shape[1] >= max(tokens.shape[1] for tokens, _ in drawn)
    assert targets.shape[2] == max(tokens.shape[2] for _, tokens in drawn)


def test_typical_masks_are_the_median():
    masks = MultiBlockMasks((16, 16))
    context, targets = typical_masks(masks, 32, seed=0)
    drawn = [masks.sample(32, seed=3, step=step) for step in range(400)]
    assert context.shape[1] == pytest.approx(np.median([c.shape[1] for c, _ in drawn]), abs=3)
    assert targets.shape[2] == pytest.approx(np.median([t.shape[2] for _, t in drawn]), abs=3)


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
    assert report.step_seconds > 0
    assert report.read_rate > 0
    assert report.seconds == pytest.approx(9 * report.step_seconds)
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
    report = dry_run(change(CONFIG, runtime={"micro_batch_size": 4}, optim={
        "batch_size": 16, "duration": "4 steps"}), pictures())  # fmt: skip
    assert report.parts == 4
    assert report.step_seconds == pytest.approx(1.2 + 3 * (1.7 - 1.2))
    largest, typical = report.largest[0], report.typical[0]
    assert done == [*2 * [(largest, 2)], *4 * [(typical, 1)], *3 * [(typical, 2)]]


def test_threads_are_those_of_the_run(capsys, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    dry_run(change(CONFIG, runtime={"threads": 1}), pictures())
    assert chosen == [1]


def test_the_report_in_words():
    report = DryRunReport(
        parameters={"encoder": 630_000_000, "predictor": 22_000_000, "target_encoder": 630_000_000},
        flops=Flops(333 * 10**9, 87 * 10**9, 173 * 10**9, 61 * 10**9),
        images=1_280_655, steps=187_500, batch_size=2048, parts=8, world_size=2, device="GPU X",
        largest=(101, 54), typical=(70, 42), memory=70 * 2**30, memory_limit=80 * 2**30,
        step_seconds=2.048, read_rate=300.0,
    )  # fmt: skip
    assert str(report).splitlines() == [
        "parameters   encoder 630 M, predictor 22 M, target_encoder 630 M",
        "data         1,280,655 training images, 187,500 updates of 2048 images (processes: 2, "
        "parts for each: 8)",
        "masks        context 70 tokens, target blocks 42; largest 101 and 54",
        "GFLOP/image  654: target encoder 333, context encoder 87 forward and 173 backward, "
        "predictor 61",
        "memory       70.00 of 80.0 GiB at most for a process (GPU X)",
        "speed        1000 images/s, 327 TFLOP/s on each device, 2.05 s an update",
        "loader       300 images/s for one loader process; 2 for each process keep up "
        "(runtime.workers)",
        "time         4.4 days for the whole run, without monitors",
    ]


def test_settings_that_do_not_fit_are_refused_as_in_a_run(tmp_path):
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


def test_two_processes_share_the_trial():
    several_processes.run(TWO, 2)
