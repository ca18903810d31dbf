import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa_zoo.masks import MultiBlockMasks

GOLDEN = json.loads((Path(__file__).parent / "golden" / "masks.json").read_text())
SMALL = {"grid_size": (8, 8), "min_keep": 4}


def coverage(index, patches):
    """Patches as booleans [B, patches]; fails on a repeated index within a row."""
    index = index.numpy()
    covered = np.zeros((len(index), patches), bool)
    np.put_along_axis(covered, index, True, axis=1)
    assert (covered.sum(axis=1) == index.shape[1]).all()
    return covered


def test_published_block_sizes_are_exact():
    masks = MultiBlockMasks((16, 16))
    for entry in GOLDEN["block_sizes"]:
        expected = tuple(entry["target"]), tuple(entry["context"])
        assert masks.block_sizes(entry["seed"]) == expected


@pytest.mark.parametrize(
    ("batch_size", "first", "batches"), [(1, 0, 200), (16, 200, 200), (32, 400, 40), (128, 440, 40)]
)
def test_published_statistics(batch_size, first, batches):
    """Token counts and coverage against the published sampler, at the same steps.

    The recorded numbers come from one sampler used for all batch sizes in turn, so the block sizes
    are the same and only positions are random. Their error is measured by sampling our positions
    under several seeds: the recorded side has it once, our mean over the seeds has it divided.
    """
    seeds, patches = 8, 256
    golden = GOLDEN["statistics"][str(batch_size)]
    masks = MultiBlockMasks((16, 16))
    tokens = np.zeros((seeds, batches))
    context_shares = np.zeros((seeds, batches, patches))
    target_shares = np.zeros((seeds, batches, patches))
    lengths = []
    for seed in range(seeds):
        for i in range(batches):
            context, targets = masks.sample(batch_size, seed=seed, step=first + i)
            tokens[seed, i] = context.shape[1]
            context_shares[seed, i] = coverage(context, patches).mean(axis=0)
            target_shares[seed, i] = coverage(targets.flatten(0, 1), patches).mean(axis=0)
            lengths.append(targets.shape[2])

    def z(ours, expected, resolution):
        variance = ours.var(axis=0, ddof=1).mean(axis=0) / batches * (1 + 1 / seeds)
        difference = ours.mean(axis=(0, 1)) - np.array(expected)
        return difference / np.sqrt(variance + resolution**2)

    assert np.mean(lengths) == pytest.approx(golden["mean_target_tokens"], abs=1e-9)
    assert abs(z(tokens, golden["mean_context_tokens"], 0)) < 4
    # Where every share is 0 or 1 the finest step of a recorded share, one image, is the error.
    one_image = 1 / (batch_size * batches)
    for ours, name in ((context_shares, "p_context"), (target_shares, "p_target")):
        scores = z(ours, golden[name], one_image)
        assert np.abs(scores).max() < 5
        assert 0.3 < np.sqrt((scores**2).mean()) < 1.4


@pytest.mark.parametrize("mode", ["published", "unbiased"])
@pytest.mark.parametrize("grid_size", [(8, 8), (6, 11), (16, 16)])
def test_properties(mode, grid_size):
    masks = MultiBlockMasks(grid_size, min_keep=4, mode=mode)
    patches = math.prod(grid_size)
    for step in range(30):
        (height, width), _ = masks.block_sizes(step)
        context, targets = masks.sample(9, seed=1, step=step)
        assert targets.shape == (9, 4, height * width)
        assert context.shape[1] > masks.min_keep
        in_context = coverage(context, patches)
        assert (context.diff(dim=1) > 0).all()
        for m in range(4):
            assert not (coverage(targets[:, m], patches) & in_context).any()
            rows, columns = targets[:, m] // grid_size[1], targets[:, m] % grid_size[1]
            block = rows.reshape(9, height, width), columns.reshape(9, height, width)
            assert (block[0].diff(dim=1) == 1).all()
            assert (block[1].diff(dim=2) == 1).all()


def test_function_of_seed_and_step():
    masks = MultiBlockMasks(**SMALL)

    def draw(**keys):
        return [t.tolist() for t in masks.sample(8, **{"seed": 0, "step": 5, **keys})]

    first = draw()
    draw(step=6)
    assert draw() == first
    for other in ({"seed": 1}, {"step": 6}):
        assert draw(**other) != first


@pytest.mark.parametrize("mode", ["published", "unbiased"])
def test_parts_of_a_batch_are_slices_of_it(mode):
    masks = MultiBlockMasks((8, 8), min_keep=4, mode=mode)
    context, targets = masks.sample(12, seed=3, step=2)
    for part in (slice(0, 4), slice(5, 12)):
        some_context, some_targets = masks.sample(12, seed=3, step=2, part=part)
        assert torch.equal(some_targets, targets[part])
        assert torch.equal(some_context, context[part])


@pytest.mark.parametrize("mode", ["published", "unbiased"])
def test_each_group_is_cut_to_its_own_shortest(mode):
    masks = MultiBlockMasks((8, 8), min_keep=4, mode=mode)
    lengths = set()
    for step in range(6):
        groups = [
            masks.sample(12, seed=0, step=step, part=slice(i, i + 4), group_size=4)[0]
            for i in (0, 4, 8)
        ]
        whole = masks.sample(12, seed=0, step=step)[0]
        assert min(group.shape[1] for group in groups) == whole.shape[1]
        half = masks.sample(12, seed=0, step=step, part=slice(6, 8), group_size=4)[0]
        assert torch.equal(half, groups[1][2:])
        lengths.add(len({group.shape[1] for group in groups}))
    assert max(lengths) > 1
    with pytest.raises(
        ValueError, match="3 to 6 of the batch are in several groups of group_size=4"
    ):
        masks.sample(12, seed=0, step=0, part=slice(3, 6), group_size=4)


def test_published_cut_keeps_the_first_indices():
    context, _ = MultiBlockMasks((16, 16)).sample(64, seed=0, step=1)
    assert context[:, -1].float().mean() < 0.75 * 255
    assert (context % 16 < 15).all()
    assert (context < 15 * 16).all()


def test_unbiased_cut_is_uniform():
    """Of the patches that could be context, late ones are kept as often as early ones."""
    masks = MultiBlockMasks((16, 16), context_scale=(1.0, 1.0), mode="unbiased")
    shares, cut = [], 0
    for step in range(20):
        context, targets = masks.sample(64, seed=2, step=step)
        kept = coverage(context, 256)
        # The whole grid is context here, so every patch outside the targets could be kept.
        free = np.ones((64, 256), bool)
        np.put_along_axis(free, targets.flatten(1).numpy(), False, axis=1)
        cut += (free & ~kept).sum()
        for row, chosen in zip(free, kept):
            shares.append(np.mean(np.flatnonzero(chosen[row]) + 0.5) / row.sum())
    assert cut > 10_000
    assert abs(np.mean(shares) - 0.5) < 4 * np.std(shares) / math.sqrt(len(shares))


def test_unbiased_covers_the_grid_evenly():
    """Corners of target blocks are uniform over all positions, the last row and column included."""
    masks = MultiBlockMasks((6, 7), num_targets=2, target_scale=(0.2, 0.2),
                            target_aspect=(1.0, 1.0), min_keep=4, mode="unbiased")  # fmt: skip
    (height, width), _ = masks.block_sizes(0)
    corners = np.concatenate(
        [masks.sample(200, seed=0, step=s)[1][:, :, 0].reshape(-1).numpy() for s in range(20)]
    )
    counts = np.bincount(corners, minlength=42).reshape(6, 7)
    possible = counts[: 6 - height + 1, : 7 - width + 1]
    assert counts.sum() == possible.sum()
    expected = counts.sum() / possible.size
    freedom = possible.size - 1
    chi_square = ((possible - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_scale_and_aspect_are_independent_only_in_unbiased_mode():
    def correlation(mode):
        masks = MultiBlockMasks((64, 64), mode=mode)
        sizes = np.array([masks.block_sizes(step)[0] for step in range(400)], float)
        area, aspect = sizes.prod(axis=1), sizes[:, 0] / sizes[:, 1]
        return np.corrcoef(area, aspect)[0, 1]

    assert correlation("published") > 0.95
    assert abs(correlation("unbiased")) < 4 / math.sqrt(400)


def test_unbiased_blocks_may_fill_the_grid():
    masks = MultiBlockMasks((4, 9), context_scale=(1.0, 1.0), min_keep=0, mode="unbiased")
    assert masks.block_sizes(0)[1] == (4, 9)
    published = MultiBlockMasks((4, 9), context_scale=(1.0, 1.0), min_keep=0)
    assert max(published.block_sizes(0)[1]) < 9


def test_targets_are_dropped_when_nothing_is_left():
    masks = MultiBlockMasks((8, 8), num_targets=12, target_scale=(0.3, 0.4), min_keep=10)
    overlaps = 0
    for step in range(20):
        context, targets = masks.sample(16, seed=0, step=step)
        assert context.shape[1] > 10
        hidden = coverage(context, 64)
        for m in range(12):
            overlaps += int((coverage(targets[:, m], 64) & hidden).any())
    assert overlaps > 0


def test_allow_overlap():
    masks = MultiBlockMasks((16, 16), allow_overlap=True)
    _, (height, width) = masks.block_sizes(0)
    assert masks.sample(4, seed=0, step=0)[0].shape == (4, height * width)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid_size": (8, 8)}, "min_keep=8 or less"),
        (
            {"grid_size": (2, 2), "min_keep": 0, "target_scale": (0.1, 0.1)},
            "0 patches: use a larger target_scale or a larger grid",
        ),
        ({"grid_size": (1, 16), "min_keep": 0}, "too small"),
        ({"grid_size": (16, 16), "mode": "fair"}, "'published' or 'unbiased'"),
        ({"grid_size": (16, 16), "num_targets": 0}, "num_targets is 0"),
        ({"grid_size": (16, 16), "target_scale": (0.2, 0.15)}, "target_scale"),
        ({"grid_size": (16, 16), "context_scale": (0.5, 1.5)}, "context_scale"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiBlockMasks(**settings)


def test_suggested_min_keep_works():
    MultiBlockMasks((8, 8), min_keep=8).sample(4, seed=0, step=0)


def test_refuses_empty_batch():
    with pytest.raises(ValueError, match="batch_size is 0"):
        MultiBlockMasks((16, 16)).sample(0, seed=0, step=0)
