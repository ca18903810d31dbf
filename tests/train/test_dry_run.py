"""A dry run counts, measures and leaves nothing behind."""

import sys

import numpy as np
import pytest
import several_processes
import torch
from small_run import CONFIG, change, pictures

from ijepa_zoo.errors import SettingsError
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.train.dry_run import dry_run
from ijepa_zoo.train.flops import flops_per_image, peak_flops, typical_and_largest
from ijepa_zoo.train.networks import build_networks


def test_dry_run_measures_and_leaves_nothing_behind(tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", pictures())
    monkeypatch.chdir(tmp_path)
    report = dry_run(CONFIG, tmp_path / "images.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["images.npy"]
    assert report.parameters["encoder"] == report.parameters["target_encoder"]
    assert (report.images, report.steps, report.batch_size) == (32, 9, 8)
    assert (report.world_size, report.parts) == (1, 2)
    assert 1e8 < report.memory < 1e11
    assert min(report.step_seconds, report.read_rate) > 0
    with pytest.raises(SettingsError, match=r"optim\.batch_size=8"):
        dry_run(CONFIG, pictures(10))


def test_report_has_totals_that_count_the_optimizer_once(monkeypatch):
    seconds = iter([100.0, 1.2, 1.7, 9.0])  # largest masks, one part, two parts, reading
    module = sys.modules[dry_run.__module__]  # its package has the function under this name
    monkeypatch.setattr(module, "_seconds", lambda work, device: next(seconds))
    optim = {"batch_size": 16, "duration": "4e5 steps"}
    report = dry_run(change(CONFIG, runtime={"micro_batch_size": 4}, optim=optim), pictures())
    assert report.step_seconds == pytest.approx(1.2 + 3 * (1.7 - 1.2))
    lines = dict(line.split(maxsplit=1) for line in str(report).splitlines())
    assert lines["speed"].startswith("5.926 images/s")
    assert "needs runtime.workers=5" in lines["loader"]  # 4 images in 3 seconds
    assert lines["time"].startswith("12.5 days")


TWO = """
    import os
    from train.small_run import CONFIG, change, pictures
    from ijepa_zoo.train.dry_run import dry_run

    report = dry_run(change(CONFIG, runtime={"parallel": "fsdp2"}), pictures())
    if os.environ["RANK"] == "0":
        assert (report.world_size, report.parts) == (2, 1)
    else:
        assert report is None
"""


def test_two_processes_share_the_dry_run():
    several_processes.run(TWO, 2)


def blocks(tokens, width, depth):
    """FLOPs of the forward pass of `depth` blocks: two for each multiplication."""
    return 2 * depth * (12 * tokens * width**2 + 2 * tokens**2 * width)


def test_flops_are_those_of_the_closed_formula():
    sizes = {"embed_dim": 24, "depth": 2, "predictor_embed_dim": 12, "predictor_depth": 3}
    config = change(CONFIG, model=sizes, mask={"per_image": 2, "num_targets": 3})
    with torch.device("meta"):
        model = build_networks(config)
    masks = MultiBlockMasks((8, 8), num_targets=3, min_keep=4)
    (context, targets), _ = typical_and_largest(masks, 8, seed=0)
    seen, length, patches = context.shape[1], targets.shape[2], 64
    embed = 2 * patches * model.encoder.patch_embed.proj.weight.numel()
    target = embed + blocks(patches, 24, 2)
    encoder = 2 * embed + 2 * 3 * blocks(seen, 24, 2)  # pixels need no gradient
    both = seen + length
    # the first block reads a context once and every position once, the last writes targets only
    read = 2 * 3 * 12**2 * (2 * (seen - 3 * both) + patches)
    written = 2 * 3 * seen * (2 * 10 * 12**2 + 4 * both * 12)
    projections = 2 * 2 * (seen * 24 * 12 + 3 * length * 12 * 24)
    predictor = 2 * 3 * blocks(both, 12, 3) + read - written + projections
    assert flops_per_image(config) == pytest.approx(target + encoder + 3 * predictor, rel=0.01)


def test_typical_masks_are_the_median_and_few_are_larger_than_the_largest():
    masks = MultiBlockMasks((16, 16))
    typical, largest = typical_and_largest(masks, 16, seed=0)
    drawn = [masks.sample(16, seed=3, step=step) for step in range(300)]
    for number, axis in ((0, 1), (1, 2)):
        lengths = np.array([masks[number].shape[axis] for masks in drawn])
        assert typical[number].shape[axis] == pytest.approx(np.median(lengths), abs=8)
        assert (lengths > largest[number].shape[axis]).mean() < 0.03


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 NVL", "fp32", 417.5),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
    ],
)
def test_peaks_of_known_gpus(monkeypatch, name, precision, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if tflops is None else pytest.approx(tflops * 1e12)
    assert peak_flops(torch.device("cuda", 0), precision) == expected
    assert peak_flops(torch.device("cpu"), precision) is None
