"""Batches of a probe as functions of (seed, epoch, step), and their transforms."""

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
from ijepa_zoo.errors import DataError
from ijepa_zoo.eval.batches import OrderedBatches, TrainBatches, fixed_transform, random_pixels
from ijepa_zoo.eval.sets import EvalSet
from ijepa_zoo.eval.tasks import CROP, EvalTransform

SIZE = (16, 16)


def images(n):
    """Images of noise; the first channel is their index, which is their class too."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 20, 20, 3), np.uint8)
    pixels[..., 0] = np.arange(n)[:, None, None]
    data, names = ArrayDataset([pixels], Decoder(), "photos"), dict.fromkeys(range(n), "x")
    return EvalSet(data, np.arange(n), names, "train")


def train(data, batch_size=12, seed=7, **more):
    return TrainBatches(data, np.arange(len(data)), CROP, SIZE, batch_size, seed=seed, **more)


def assert_own_labels(pixels, labels):
    assert torch.equal(pixels[:, 0, 0, 0].long(), labels)


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
    assert all(len(labels) <= micro and len(labels) % unit == 0 for _, labels in parts)
    for joined, expected in zip(map(torch.cat, zip(*parts)), whole, strict=True):
        assert torch.equal(joined, expected)
    assert len(whole[1].unique()) == 12
    assert_own_labels(*whole)
    others = [train(data, unit=unit)[step + 2], train(data, unit=unit, seed=8)[step]]
    assert not any(torch.equal(whole[1], labels) for _, labels in others)


def test_fewer_images_than_a_batch_make_one():
    batches = train(images(11), 256, world=2)
    assert (batches.steps, batches.batch_size, len(batches[3][1])) == (1, 11, 5)
    with pytest.raises(DataError, match="3 images"):
        train(images(3), 12, world=4)


@given(st.integers(1, 25), st.integers(1, 8))
def test_every_test_image_counts_once_and_the_last_batch_is_padded(n, batch_size):
    data = images(30)
    batches = OrderedBatches(data, np.arange(n), SQUASH, SIZE, batch_size)
    read = [batches[number] for number in range(len(batches))]
    assert all(len(pixels) == batch_size for pixels, _ in read)
    assert torch.cat([labels for _, labels in read]).tolist() == list(range(n))
    for pixels, labels in read:
        assert_own_labels(pixels[: len(labels)], labels)
        assert not pixels[len(labels) :].any()
