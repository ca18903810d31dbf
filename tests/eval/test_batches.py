"""Batches of a probe as functions of (seed, epoch, step), and their transforms."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as tv1
from torchvision.transforms import InterpolationMode

from ijepa_zoo.data.datasets import ArrayDataset
from ijepa_zoo.data.decode import Decoder, Pixels
from ijepa_zoo.data.loading import load_in_order
from ijepa_zoo.data.transforms import DRAWS
from ijepa_zoo.errors import DataError, ImageError
from ijepa_zoo.eval.batches import OrderedBatches, TrainBatches, fixed_transform, random_pixels
from ijepa_zoo.eval.sets import EvalSet
from ijepa_zoo.eval.tasks import CROP, EvalTransform

SQUASH = EvalTransform("squash", "bilinear", crop_pct=1.0)
SIZE = (16, 16)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def numbered(n: int, pixels: np.ndarray | None = None) -> EvalSet:
    """Images of one color, the index of the image, which is its class too."""
    numbers = np.arange(n)
    if pixels is None:
        pixels = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (n, 4, 4, 3)).copy()
    classes = dict(enumerate(map(str, numbers)))
    return EvalSet(ArrayDataset([pixels], Decoder()), numbers, classes, "train")


def photos(n: int) -> EvalSet:
    """Images of noise, so that every crop is another."""
    return numbered(n, np.stack([np.asarray(photo(20, 20, seed)) for seed in range(n)]))


class Broken(ArrayDataset):
    """Some of the images cannot be decoded."""

    def __init__(self, images: np.ndarray, bad: Sequence[int]) -> None:
        super().__init__([images], Decoder(), "photos")
        self.bad = frozenset(bad)

    def read(self, index: int) -> Pixels:
        if index in self.bad:
            raise ImageError("truncated image")
        return super().read(index)


def broken(n: int, bad: Sequence[int]) -> EvalSet:
    whole = numbered(n)
    return replace(whole, images=Broken(whole.images.arrays[0], bad), skip_broken=True)


def train(data: EvalSet, batch_size: int = 12, **more: int) -> TrainBatches:
    return TrainBatches(data, np.arange(len(data)), CROP, SIZE, batch_size, seed=7, **more)


@pytest.mark.parametrize("size", [(90, 70), (40, 300), (16, 16)])
@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_fixed_transforms_are_torchvisions(size, name):
    image, mode = photo(*size), InterpolationMode(name)
    steps = [tv1.Resize(18, mode), tv1.CenterCrop(16), tv1.PILToTensor()]  # 18 = 16 / 0.875
    found = fixed_transform(EvalTransform("center", name), 3, SIZE)(image)
    assert torch.equal(found, tv1.Compose(steps)(image))
    squash = EvalTransform("squash", name, crop_pct=1.0)
    expected = tv1.PILToTensor()(tv1.Resize(SIZE, mode)(image))
    assert torch.equal(fixed_transform(squash, 3, SIZE)(image), expected)
    assert torch.equal(random_pixels(image, squash, SIZE, [0.5] * DRAWS), expected)
    flipped = random_pixels(image, squash, SIZE, [0.5] * (DRAWS - 1) + [0.49])
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert torch.equal(flipped, fixed_transform(squash, 3, SIZE)(mirrored))


def test_crops_have_torchvisions_distribution():
    """Extents of the box, read off a picture whose two gradients tell where it was cut."""
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(64) * 4, np.arange(64)[:, None] * 4
    image, draws = Image.fromarray(ramp), np.random.default_rng(0).random((300, DRAWS)).tolist()
    reference = tv1.Compose([tv1.RandomResizedCrop(32), tv1.PILToTensor()])

    def extent(pixels):
        x, y = pixels[0].float(), pixels[1].float()
        return [(x.amax() - x.amin()).item(), (y.amax() - y.amin()).item(), y.mean().item()]

    bilinear = EvalTransform("center", "bilinear")
    ours = np.array([extent(random_pixels(image, bilinear, (32, 32), d)) for d in draws])
    theirs = np.array([extent(reference(image)) for _ in draws])
    error = np.sqrt((ours.var(0) + theirs.var(0)) / len(draws))
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
    assert np.abs(ours.std(0) / theirs.std(0) - 1).max() < 0.25


def equal(one, other) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


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
    assert first.images.shape == (12, 3, 16, 16)
    assert first.valid.all()


def test_batches_do_not_depend_on_what_was_read_before():
    data = photos(30)
    forward = [train(data)[n] for n in range(6)]
    once = train(data)
    assert all(equal(once[n], forward[n]) for n in (5, 0, 3, 3, 1))
    assert not equal(TrainBatches(data, np.arange(30), CROP, SIZE, 12, seed=8)[0], forward[0])
    # the same image is cut in other ways in other epochs
    seen = {int(i): forward[0].images[k] for k, i in enumerate(forward[0].labels)}
    again = [(k, b) for b in forward[2:4] for k, i in enumerate(b.labels.tolist()) if i in seen]
    assert again
    assert not any(torch.equal(b.images[k], seen[int(b.labels[k])]) for k, b in again)


@given(st.integers(1, 6), st.integers(1, 13), st.sampled_from([1, 2]), st.integers(0, 5))
def test_processes_and_pieces_share_the_batch_of_one(world, micro, unit, step):
    data, micro = photos(30), micro * unit
    whole = train(data, unit=unit)
    shares = [train(data, rank=r, world=world, micro=micro, unit=unit) for r in range(world)]
    assert {s.steps for s in shares} == {2}
    parts = [s[step * s.parts + p] for s in shares for p in range(s.parts)]
    assert all(len(part.labels) <= micro for part in parts)
    assert all(len(part.labels) % unit == 0 for part in parts)
    for name in ("images", "labels"):
        together = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(together, getattr(whole[step], name))


def test_fewer_images_than_a_batch_make_one():
    batches = train(numbered(11), 256, world=2)
    assert (batches.steps, batches.batch_size) == (1, 11)
    assert len(batches[3].labels) == 5
    with pytest.raises(DataError, match="3 images"):
        train(numbered(3), 12, world=4)


def test_broken_images_of_training_are_replaced_and_named():
    batches = train(broken(40, range(0, 40, 4)))
    read = [batches[n] for n in batches.numbers(0, 1)]
    named = {pair for batch in read for pair in batch.broken}
    assert {(f"photos[{i}]", "truncated image") for i in range(0, 40, 4)} >= named != set()
    for batch in read:
        assert len(batch.labels) == 12
        assert not (batch.labels % 4 == 0).any()
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.labels)
    with pytest.raises(DataError, match=r"photos\[\d+\] cannot be decoded"):
        train(broken(20, range(20)))[0]


def test_workers_change_nothing():
    batches = train(numbered(50))
    loaded = list(load_in_order(batches, range(2, 6), 2, False))
    assert all(equal(one, batches[n]) for one, n in zip(loaded, range(2, 6), strict=True))


@given(st.integers(1, 25), st.integers(1, 5))
def test_every_test_image_counts_once(n, world):
    data = numbered(30)
    ranks = [OrderedBatches(data, np.arange(n), SQUASH, SIZE, 4, rank=r, world=world)
             for r in range(world)]  # fmt: skip
    assert len({len(r) for r in ranks}) == 1
    read = [r[b] for b in range(len(ranks[0])) for r in ranks]
    assert all(len(batch.images) == 4 for batch in read)
    assert not any(batch.images[~batch.valid].any() for batch in read)
    assert torch.cat([b.labels[b.valid] for b in read]).tolist() == list(range(n))
    assert torch.cat([b.images[b.valid] for b in read])[:, 0, 0, 0].tolist() == list(range(n))


def test_broken_test_images_leave_their_slots_empty_and_are_named():
    batches = OrderedBatches(broken(10, [1, 6]), np.arange(10), SQUASH, SIZE, 4)
    first, second, third = (batches[n] for n in range(3))
    assert first.valid.tolist() == [True, False, True, True]
    assert first.reasons == [None, "truncated image", None, None]
    assert second.labels.tolist() == [4, 5, 0, 7]
    assert second.broken == [("photos[6]", "truncated image")]
    assert third.valid.tolist() == [True, True, False, False]
