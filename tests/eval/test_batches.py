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
from ijepa_zoo.data.transforms import DRAWS, crop_box
from ijepa_zoo.errors import DataError, ImageError
from ijepa_zoo.eval.batches import OrderedBatches, TrainBatches, fixed_transform, random_pixels
from ijepa_zoo.eval.sets import EvalSet
from ijepa_zoo.eval.tasks import CROP, EvalTransform

SIZE = (16, 16)


class Broken(ArrayDataset):
    """Every third image cannot be decoded."""

    def read(self, index):
        if index % 3 == 0:
            raise ImageError("truncated image")
        return super().read(index)


def images(n, kind=ArrayDataset):
    """Images of noise; the first channel is their index, which is their class too."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 20, 20, 3), np.uint8)
    pixels[..., 0] = np.arange(n)[:, None, None]
    data, names = kind([pixels], Decoder(), "photos"), dict.fromkeys(range(n), "x")
    return EvalSet(data, np.arange(n), names, "train", skip_broken=True)


def train(data, batch_size=12, seed=7, **more):
    return TrainBatches(data, np.arange(len(data)), CROP, SIZE, batch_size, seed=seed, **more)


def assert_own_labels(batch):
    assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.labels)


@pytest.mark.parametrize("size", [(90, 70), (40, 300)])
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
    for found, expected in (
        (fixed_transform(center, 3, SIZE)(image), steps(image)),
        (fixed_transform(squash, 3, SIZE)(image), whole),
        (random_pixels(image, squash, SIZE, [0.5] * DRAWS), whole),
        (random_pixels(image, squash, SIZE, [0.49] * DRAWS), ImageOps.mirror(whole)),
        (random_pixels(image, center, SIZE, [*draws[:-1], 0.9]), cut),
    ):
        assert torch.equal(found, tv1.PILToTensor()(expected))


@given(st.integers(1, 6), st.integers(1, 13), st.sampled_from([1, 2]), st.integers(0, 5))
def test_processes_and_pieces_share_the_batch_of_one(world, micro, unit, step):
    data, micro = images(30), micro * unit
    whole = train(data, unit=unit)[step]
    shares = [train(data, rank=r, world=world, micro=micro, unit=unit) for r in range(world)]
    assert {s.steps for s in shares} == {2}
    parts = [s[step * s.parts + p] for s in shares for p in range(s.parts)]
    assert all(len(p.labels) <= micro and len(p.labels) % unit == 0 for p in parts)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert len(whole.labels.unique()) == 12
    assert_own_labels(whole)
    others = [train(data, unit=unit)[step + 2], train(data, unit=unit, seed=8)[step]]
    assert not any(torch.equal(whole.labels, other.labels) for other in others)


def test_fewer_images_than_a_batch_make_one():
    batches = train(images(11), 256, world=2)
    assert (batches.steps, batches.batch_size, len(batches[3].labels)) == (1, 11, 5)
    with pytest.raises(DataError, match="3 images"):
        train(images(3), 12, world=4)


def test_broken_images_of_training_are_replaced_and_named():
    batch = train(images(40, Broken))[1]
    assert {(f"photos[{i}]", "truncated image") for i in range(0, 40, 3)} >= {*batch.broken}
    assert len(batch.broken) > 1
    assert len(batch.labels) == 12
    assert (batch.labels % 3 != 0).all()
    assert_own_labels(batch)
    with pytest.raises(DataError, match=r"photos\[0\] cannot be decoded"):
        train(images(1, Broken))[0]


@given(st.integers(1, 25), st.integers(1, 5), st.sampled_from([ArrayDataset, Broken]))
def test_every_test_image_counts_once_and_broken_ones_leave_their_slots_empty(n, world, kind):
    ranks = [
        OrderedBatches(images(30, kind), np.arange(n), SQUASH, SIZE, 4, rank=r, world=world)
        for r in range(world)
    ]
    assert len({len(r) for r in ranks}) == 1
    read = [r[b] for b in range(len(ranks[0])) for r in ranks]
    assert all(len(batch.images) == 4 and not batch.images[~batch.valid].any() for batch in read)
    good = [i for i in range(n) if kind is ArrayDataset or i % 3]
    assert torch.cat([b.labels[b.valid] for b in read]).tolist() == good
    for batch in read:
        assert_own_labels(replace(batch, images=batch.images[batch.valid],
                                  labels=batch.labels[batch.valid]))  # fmt: skip
    named = [name for batch in read for name, _ in batch.broken]
    assert named == [f"photos[{i}]" for i in range(n) if i not in good]
