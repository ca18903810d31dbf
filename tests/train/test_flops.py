import numpy as np
import pytest
import torch
from small_run import CONFIG, change

from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.train import load_config
from ijepa_zoo.train.flops import (
    flops_per_image,
    largest_masks,
    peak_flops,
    training_flops,
    typical_masks,
)
from ijepa_zoo.train.networks import build_networks


def counted(name, context, targets, length):
    with torch.device("meta"):
        model = build_networks(load_config(name))
    return flops_per_image(model, context, targets, length)


def by_hand(tokens, width, depth, mlp=4.0):
    """FLOPs of the forward pass of `depth` blocks: two for each multiplication."""
    linear = tokens * width * width * (3 + 1 + 2 * mlp)
    attention = 2 * tokens * tokens * width
    return 2 * depth * (linear + attention)


@pytest.mark.parametrize(
    ("recipe", "patches", "patch", "width", "depth", "predictor_depth"),
    [("vitb16_in1k", 196, 16, 768, 12, 6), ("nano", 64, 8, 128, 6, 3)],
)
def test_flops_are_those_of_the_closed_formula(
    recipe, patches, patch, width, depth, predictor_depth
):
    context, targets, length = 20, 4, 9
    narrow = 64 if recipe == "nano" else 384
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
    passes = (found.target, found.context_forward, found.context_backward, found.predictor)
    assert found.total == sum(passes)


def test_vit_huge_needs_less_than_the_654_gflop_of_the_official_repository():
    # 654 by the closed formula with all predictor blocks whole (61 of them the predictor's)
    assert counted("vith14_in1k", 68, 4, 44).total / 1e9 == pytest.approx(650, abs=1)


def test_flops_of_a_run_are_those_with_typical_masks():
    config = change(CONFIG, mask={"per_image": 2, "num_targets": 3})
    with torch.device("meta"):
        model = build_networks(config)
    masks = MultiBlockMasks((8, 8), num_targets=3, min_keep=4)
    context, targets = typical_masks(masks, 8, seed=0)
    expected = flops_per_image(model, context.shape[1], 3, targets.shape[2], per_image=2)
    assert training_flops(config) == expected.total


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


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "fp8", 1979),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("Tesla T4", "fp32", 8.1),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
    ],
)
def test_peaks_of_known_gpus(monkeypatch, name, precision, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if tflops is None else pytest.approx(tflops * 1e12)
    assert peak_flops(torch.device("cuda", 0), precision) == expected


def test_peak_of_a_cpu_is_unknown():
    assert peak_flops(torch.device("cpu"), "fp32") is None
