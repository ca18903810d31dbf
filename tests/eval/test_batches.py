"""Batches of a probe as functions of (seed, epoch, step), and their transforms."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from small_probe import SQUASH
from torchvision import transforms as tv1
from torchvision.transforms import InterpolationMode

from ijepa_zoo.data.datasets import ArrayDataset
from ijepa_zoo.data.decode import Decoder
from ijepa_zoo.data.loading import load_in_order
from ijepa_zoo.data.transforms import DRAWS, crop_box
from ijepa_zoo.errors import DataError, ImageError
from ijepa_zoo.eval.batches import OrderedBatches, TrainBatches, fixed_transform, random_pixels
from ijepa_zoo.eval.sets import EvalSet
from ijepa_zoo.eval.tasks import CROP, EvalTransform

SIZE = (16, 16)


class Images(ArrayDataset):
    """Images of one color, their index; every third one cannot be decoded if `broken`."""

    broken = False

    def read(self, index):
        if self.broken and index % 3 == 0:
            raise ImageError("truncated image")
        return super().read(index)


def numbered(n, pixels=None):
    """Images whose class is their index, and their color too if no pixels are given."""
    if pixels is None:
        pixels = np.tile(np.arange(n, dtype=np.uint8)[:, None, None, None], (1, 4, 4, 3))
    names = {k: str(k) for k in range(n)}
    return EvalSet(Images([pixels], Decoder(), "photos"), np.arange(n), names, "train")


def noise(n):
    """Images of noise, so that every crop is another."""
    return numbered(n, np.random.default_rng(0).integers(0, 256, (n, 20, 20, 3), np.uint8))


def broken(n):
    data = replace(numbered(n), skip_broken=True)
    data.images.broken = True
    return data


def train(data, batch_size=12, seed=7, **more):
    return TrainBatches(data, np.arange(len(data)), CROP, SIZE, batch_size, seed=seed, **more)


def equal(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("size", [(90, 70), (40, 300), (16, 16)])
@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_transforms_are_torchvisions(size, name):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    image, mode = Image.fromarray(pixels), InterpolationMode(name)
    center, squash = EvalTransform("center", name), EvalTransform("squash", name, crop_pct=1.0)
    draws = np.random.default_rng(0).random(DRAWS).tolist()
    box = crop_box(draws, size, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))
    cut = tv1.functional.resized_crop(image, *box, SIZE, mode)
    steps = tv1.Compose([tv1.Resize(18, mode), tv1.CenterCrop(16)])  # 18 = 16 / 0.875
    whole = tv1.Resize(SIZE, mode)(image)
    cases = [
        (fixed_transform(center, 3, SIZE)(image), steps(image)),
        (fixed_transform(squash, 3, SIZE)(image), whole),
        (random_pixels(image, squash, SIZE, [0.5] * DRAWS), whole),
        (random_pixels(image, squash, SIZE, [0.5] * (DRAWS - 1) + [0.49]),
         ImageOps.mirror(whole)),
        (random_pixels(image, center, SIZE, [*draws[:-1], 0.9]), cut),
    ]  # fmt: skip
    for found, expected in cases:
        assert torch.equal(found, tv1.PILToTensor()(expected))


def test_an_epoch_is_one_permutation_of_the_rows_without_the_last_images():
    rows = np.arange(60)[::-1][:50]
    batches = TrainBatches(numbered(60), rows, CROP, SIZE, 12, seed=7)
    assert (batches.steps, batches.parts) == (4, 1)
    assert list(batches.numbers(1, 3)) == list(range(4, 12))
    epochs = [[batches[n] for n in batches.numbers(e, e + 1)] for e in range(3)]
    read = [torch.cat([batch.labels for batch in epoch]).tolist() for epoch in epochs]
    assert all(len({*r}) == 48 and {*r} < {*rows.tolist()} for r in read)
    assert len({frozenset(r) for r in read}) > 1  # not always the same are left out
    first = epochs[0][1]
    assert torch.equal(first.images[:, 0, 0, 0].long(), first.labels)
    assert first.valid.all()


def test_batches_are_functions_of_seed_epoch_and_step():
    data = noise(30)
    forward = [train(data)[n] for n in range(6)]
    once = train(data)
    assert all(equal(once[n], forward[n]) for n in (5, 0, 3, 3, 1))
    assert not equal(train(data, seed=8)[0], forward[0])
    loaded = list(load_in_order(train(data), range(2, 6), 2, False))
    assert all(equal(*pair) for pair in zip(loaded, forward[2:], strict=True))
    # the same image is cut in other ways in other epochs
    seen = dict(zip(forward[0].labels.tolist(), forward[0].images))
    later = [pair for b in forward[2:4] for pair in zip(b.labels.tolist(), b.images)]
    again = [torch.equal(seen[number], image) for number, image in later if number in seen]
    assert again
    assert not any(again)


@given(st.integers(1, 6), st.integers(1, 13), st.sampled_from([1, 2]), st.integers(0, 5))
def test_processes_and_pieces_share_the_batch_of_one(world, micro, unit, step):
    data, micro = noise(30), micro * unit
    whole = train(data, unit=unit)[step]
    shares = [train(data, rank=r, world=world, micro=micro, unit=unit) for r in range(world)]
    assert {s.steps for s in shares} == {2}
    parts = [s[step * s.parts + p] for s in shares for p in range(s.parts)]
    assert all(len(p.labels) <= micro and len(p.labels) % unit == 0 for p in parts)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_fewer_images_than_a_batch_make_one():
    batches = train(numbered(11), 256, world=2)
    assert (batches.steps, batches.batch_size, len(batches[3].labels)) == (1, 11, 5)
    with pytest.raises(DataError, match="3 images"):
        train(numbered(3), 12, world=4)


def test_broken_images_of_training_are_replaced_and_named():
    batches = train(broken(40))
    read = [batches[n] for n in batches.numbers(0, 1)]
    named = {pair for batch in read for pair in batch.broken}
    assert {(f"photos[{i}]", "truncated image") for i in range(0, 40, 3)} >= named != set()
    for batch in read:
        assert len(batch.labels) == 12
        assert (batch.labels % 3 != 0).all()
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.labels)
    with pytest.raises(DataError, match=r"photos\[0\] cannot be decoded"):
        train(broken(1))[0]


@given(st.integers(1, 25), st.integers(1, 5))
def test_every_test_image_counts_once(n, world):
    data = numbered(30)
    ranks = [
        OrderedBatches(data, np.arange(n), SQUASH, SIZE, 4, rank=r, world=world)
        for r in range(world)
    ]
    assert len({len(r) for r in ranks}) == 1
    read = [r[b] for b in range(len(ranks[0])) for r in ranks]
    assert all(len(batch.images) == 4 for batch in read)
    assert not any(batch.images[~batch.valid].any() for batch in read)
    assert torch.cat([b.labels[b.valid] for b in read]).tolist() == list(range(n))
    assert torch.cat([b.images[b.valid] for b in read])[:, 0, 0, 0].tolist() == list(range(n))


def test_broken_test_images_leave_their_slots_empty_and_are_named():
    batches = OrderedBatches(broken(10), np.arange(10), SQUASH, SIZE, 4)
    first, second, third = (batches[n] for n in range(3))
    assert first.valid.tolist() == [False, True, True, False]
    assert first.reasons == ["truncated image", None, None, "truncated image"]
    assert second.labels.tolist() == [4, 5, 0, 7]
    assert second.broken == [("photos[6]", "truncated image")]
    assert third.valid.tolist() == [True, False, False, False]
