"""Multi-block masks: recorded numbers of the official sampler, and laws of both modes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ijepa_zoo.errors import SettingsError
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.seeds import fold

GOLDEN = json.loads((Path(__file__).parent / "golden" / "masks.json").read_text())
MODES = pytest.mark.parametrize("mode", ["published", "unbiased"])


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
    context_shares, target_shares = np.zeros((2, seeds, batches, patches))
    lengths = []
    for seed, i in np.ndindex(seeds, batches):
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


@st.composite
def samplers(draw):
    """Samplers of any settings that are accepted."""
    try:
        return MultiBlockMasks(
            (draw(st.integers(4, 14)), draw(st.integers(4, 14))),
            num_targets=draw(st.integers(1, 5)),
            target_scale=(0.1, draw(st.sampled_from([0.1, 0.2, 0.5]))),
            target_aspect=draw(st.sampled_from([(0.75, 1.5), (1.0, 1.0), (0.3, 3.0)])),
            context_scale=(draw(st.sampled_from([0.5, 0.85])), 1.0),
            min_keep=draw(st.integers(0, 6)),
            allow_overlap=draw(st.booleans()),
            mode=draw(st.sampled_from(["published", "unbiased"])),
        )
    except SettingsError:
        assume(False)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(samplers(), st.integers(0, 2**40), st.integers(0, 10**6))
def test_every_sampler(masks, seed, step):
    def sample(**options):
        return masks.sample(12, seed=seed, step=step, **options)

    (height, width), (context_height, context_width) = masks.block_sizes(step)
    patches, columns = math.prod(masks.grid_size), masks.grid_size[1]
    context, targets = sample()
    assert targets.shape == (12, masks.num_targets, height * width)
    assert context.shape[1] > masks.min_keep
    assert (context.diff(dim=1) > 0).all()
    assert (context // columns).max() < masks.grid_size[0]
    for places, size in ((context // columns, context_height), (context % columns, context_width)):
        assert (places.amax(dim=1) - places.amin(dim=1) < size).all()
    for m in range(masks.num_targets):
        coverage(targets[:, m], patches)
        rows, places = targets[:, m] // columns, targets[:, m] % columns
        assert (rows.reshape(12, height, width).diff(dim=1) == 1).all()
        assert (places.reshape(12, height, width).diff(dim=2) == 1).all()
    if masks.mode == "published":  # never uses the last row and column
        for indices in (context, targets):
            assert (indices % columns).max() < columns - 1
            assert (indices // columns).max() < masks.grid_size[0] - 1
    # a part of a batch is a slice of it, and each group is cut to its own shortest context
    some_context, some_targets = sample(part=slice(5, 9))
    assert torch.equal(some_targets, targets[5:9])
    assert torch.equal(some_context, context[5:9])
    groups = [sample(part=slice(i, i + 4), group_size=4)[0] for i in (0, 4, 8)]
    assert min(group.shape[1] for group in groups) == context.shape[1]
    assert torch.equal(sample(part=slice(6, 8), group_size=4)[0], groups[1][2:])


def test_groups_have_lengths_of_their_own():
    masks = MultiBlockMasks((16, 16))
    lengths = set()
    for step, first in np.ndindex(6, 3):
        part = slice(4 * first, 4 * first + 4)
        lengths.add(masks.sample(12, seed=0, step=step, part=part, group_size=4)[0].shape[1])
    assert len(lengths) > 6
    for last in (3, 6):
        with pytest.raises(SettingsError, match=rf"3 to {last}.*group_size=4"):
            masks.sample(12, seed=0, step=0, part=slice(3, last), group_size=4)


@pytest.mark.parametrize(
    ("grid", "mode", "expected"),
    [
        ((8, 8), "published", 16074613985611943747),
        ((8, 8), "unbiased", 7966140067393764236),
        ((128, 128), "unbiased", 3879743423125583519),  # so many random keys are equal somewhere
    ],
)
def test_masks_are_the_recorded_ones_of_seed_and_step(grid, mode, expected):
    """A change would silently change every run."""
    full = grid == (8, 8)  # targets leave nothing, and are dropped from the constraint
    options = {"num_targets": 12, "target_scale": (0.3, 0.4)} if full else {}
    masks = MultiBlockMasks(grid, mode=mode, **options)
    size, step = (16, 0) if full else (64, 1)
    context, targets = masks.sample(size, seed=0, step=step)
    assert fold(*context.flatten().tolist(), *targets.flatten().tolist() * full) == expected
    kept = coverage(context, math.prod(grid))
    overlaps = [(coverage(m, math.prod(grid)) & kept).any() for m in targets.unbind(1)]
    assert any(overlaps) == full
    for other in ({"seed": 1, "step": step}, {"seed": 0, "step": step + 1}):
        assert masks.sample(size, **other)[1].tolist() != targets.tolist()


@MODES
def test_unbiased_has_none_of_the_three_biases_of_published(mode):
    large = MultiBlockMasks((64, 64), mode=mode)
    sizes = np.array([large.block_sizes(step)[0] for step in range(400)], float)
    correlation = np.corrcoef(sizes.prod(axis=1), sizes[:, 0] / sizes[:, 1])[0, 1]
    masks = MultiBlockMasks((16, 16), context_scale=(1.0, 1.0), mode=mode)
    drawn, kept = np.zeros((2, 16, 16))
    for step in range(40):
        context, targets = masks.sample(64, seed=2, step=step)
        drawn += np.bincount(targets.flatten(), minlength=256).reshape(16, 16)
        kept += np.bincount(context.flatten(), minlength=256).reshape(16, 16)
    rows, columns = kept.sum(axis=1), drawn.sum(axis=0)
    if mode == "published":  # one draw for both; long contexts cut at the bottom; no last column
        assert correlation > 0.95
        assert rows[-2] < 0.8 * rows[0]
        assert columns[-1] == 0
    else:
        assert abs(correlation) < 4 / math.sqrt(400)
        np.testing.assert_allclose(rows, rows[::-1], rtol=0.1)
        np.testing.assert_allclose(columns, columns[::-1], rtol=0.1)


def test_unbiased_blocks_may_fill_the_grid():
    whole = {"context_scale": (1.0, 1.0), "min_keep": 0}
    assert MultiBlockMasks((4, 9), **whole, mode="unbiased").block_sizes(0)[1] == (4, 9)
    assert max(MultiBlockMasks((4, 9), **whole).block_sizes(0)[1]) < 9
    # 24 patches; sides of 4.4 and 5.45 are rounded, and only one that does not fit sets the other
    for grid, aspect, size in (((4, 12), 4.4**2 / 24, (4, 5)), ((12, 4), 24 / 4.4**2, (5, 4))):
        options = {"target_scale": (0.5, 0.5), "target_aspect": (aspect, aspect), "min_keep": 0}
        assert MultiBlockMasks(grid, **options, mode="unbiased").block_sizes(0)[0] == size


# targets of 5 x 5 on the 6 x 6 that are used: 11 patches are left
FULL = {"grid_size": (7, 7), "target_scale": (0.52, 0.52), "target_aspect": (1.0, 1.0)}
# 11 x 11 on 12 x 12, of the largest scale and aspect alone
LARGEST = {"grid_size": (12, 12), "target_scale": (0.5, 0.7715), "target_aspect": (0.5, 1.0)}
LARGEST |= {"mode": "unbiased"}
SQUARE = {"target_scale": (0.9, 0.9), "target_aspect": (1.0, 1.0), "mode": "unbiased"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"grid_size": (8, 8)}, "min_keep=8 or less"),
        ({"grid_size": (2, 2), "min_keep": 0, "target_scale": (0.1, 0.1)}, "target_scale"),
        ({"grid_size": (3, 3), "min_keep": 1}, "min_keep=0 or less"),
        ({"grid_size": (1, 16), "min_keep": 0}, r"\(1, 16\)"),
        ({"mode": "fair"}, "fair"),
        ({"num_targets": 0}, "num_targets is 0"),
        ({"min_keep": -1}, "min_keep -1"),
        ({"target_scale": (0.2, 0.15)}, "target_scale"),
        ({"target_scale": (0.0, 0.15)}, "target_scale is .* <= 1$"),
        ({"target_aspect": (0.0, 1.0)}, "target_aspect is .* max$"),
        ({"target_scale": (1.0, 1.0)}, "target_scale"),
        ({"target_scale": (0.95, 0.95), "mode": "unbiased", "min_keep": 16}, "no context"),
        ({"context_scale": (0.5, 1.5)}, "context_scale"),
        ({**FULL, "min_keep": 11}, "no context"),
        ({**FULL, "min_keep": 11, "target_scale": (0.3, 0.4287)}, "no context"),  # 1 step in 200
        ({**LARGEST, "min_keep": 23}, "no context"),
        # accepted, at the bounds
        ({"grid_size": (8, 8), "min_keep": 8}, None),
        ({"target_scale": (0.95, 0.95), "mode": "unbiased"}, None),
        ({"grid_size": (12, 12), "min_keep": 120, "allow_overlap": True, **SQUARE}, None),
        (FULL, None),
        ({**LARGEST, "min_keep": 22}, None),
        ({**FULL, "min_keep": 11, "target_scale": (0.3, 0.428)}, None),  # at most 4 x 4
        ({"target_scale": (1.0, 1.0), "allow_overlap": True}, None),
        ({"num_targets": 1, "min_keep": 0, "target_scale": (0.2, 0.2)}, None),
    ],
)
def test_bounds_of_settings(changes, named):
    settings = {"grid_size": (16, 16), **changes}
    if named is not None:
        with pytest.raises(SettingsError, match=named):
            MultiBlockMasks(**settings)
        return
    masks = MultiBlockMasks(**settings)
    context, _ = masks.sample(4, seed=0, step=0)
    if masks.allow_overlap:
        assert context.shape == (4, math.prod(masks.block_sizes(0)[1]))
    with pytest.raises(SettingsError, match="batch_size is 0"):
        masks.sample(0, seed=0, step=0)
