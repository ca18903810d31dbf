"""Views of images and batches of a probe, as functions of (seed, epoch, step)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv1
from torchvision.transforms import InterpolationMode

from ijepa_zoo.data.datasets import ArrayDataset
from ijepa_zoo.data.decode import Decoder, Pixels
from ijepa_zoo.data.loading import load_in_order
from ijepa_zoo.data.transforms import DRAWS
from ijepa_zoo.errors import DataError, ImageError
from ijepa_zoo.eval import batches as batches_module
from ijepa_zoo.eval.batches import (
    EvalBatch,
    OrderedBatches,
    TrainBatches,
    fixed_pixels,
    random_pixels,
)
from ijepa_zoo.eval.sets import EvalSet
from ijepa_zoo.eval.tasks import View

CROP, SQUARE = View("crop", "bicubic"), View("square", "bilinear")
SIZE = (16, 16)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def numbered(n: int, pixels: np.ndarray | None = None) -> EvalSet:
    """Images of one color, the index of the image, which is its class too."""
    numbers = np.arange(n)
    if pixels is None:
        pixels = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (n, 4, 4, 3)).copy()
    classes = tuple(map(str, numbers))
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
    rows = more.pop("rows", len(data))
    return TrainBatches(data, np.arange(rows), CROP, SIZE, batch_size, seed=7, **more)


def ordered(data: EvalSet, batch_size: int, rows: Sequence[int] | None = None, **more: int):
    chosen = np.arange(len(data)) if rows is None else np.array(rows)
    return OrderedBatches(data, chosen, CROP, SIZE, batch_size, **more)


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(300, 200), (200, 333), (32, 32), (480, 320), (50, 51)])
@pytest.mark.parametrize("size", [224, 64])
def test_the_views_of_tests_are_torchvisions(
    filter: str, shape: tuple[int, int], size: int
) -> None:
    image, mode = photo(*shape), InterpolationMode(filter)
    resized = {224: 256, 64: 73}[size]
    crop = tv1.Compose([tv1.Resize(resized, mode), tv1.CenterCrop(size), tv1.PILToTensor()])
    square = tv1.Compose([tv1.Resize((size, size), mode), tv1.PILToTensor()])
    for view, expected in ((View("crop", filter), crop), (View("square", filter), square)):
        assert torch.equal(fixed_pixels(image, view, (size, size)), expected(image))


def test_an_extreme_image_is_cut_before_it_is_made_large(monkeypatch: pytest.MonkeyPatch) -> None:
    areas = []
    resize = batches_module.tv.resize

    def recorded(image: Image.Image, size: list[int], **more: object) -> Image.Image:
        areas.append(size[0] * size[1])
        return resize(image, size, **more)

    monkeypatch.setattr(batches_module.tv, "resize", recorded)
    assert fixed_pixels(photo(1, 2_000), CROP, (64, 64)).shape == (3, 64, 64)
    assert areas == [73 * 73 * 32]


def test_oblong_sizes() -> None:
    assert fixed_pixels(photo(90, 40), CROP, (32, 64)).shape == (3, 32, 64)
    assert fixed_pixels(photo(40, 90), SQUARE, (32, 64)).shape == (3, 32, 64)
    assert random_pixels(photo(9, 4), CROP, (32, 64), [0.5] * DRAWS).shape == (3, 32, 64)


@pytest.mark.parametrize("flip", [True, False])
def test_the_crop_of_training_by_hand(flip: bool) -> None:
    # A quarter of 100 x 80 pixels, aspect 1: 45 x 45 of (100 - 45 + 1) x (80 - 45 + 1) places.
    area = (0.25 - 0.08) / 0.92
    draws = [area] * 10 + [0.5] * 10 + [0.5, 0.25, 0.4 if flip else 0.6]
    image = photo(100, 80)
    part = image.crop((14, 18, 14 + 45, 18 + 45)).resize((64, 64), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(part)).permute(2, 0, 1)
    found = random_pixels(image, CROP, (64, 64), draws)
    assert torch.equal(found, expected.flip(-1) if flip else expected)
    assert found.dtype == torch.uint8


def test_the_square_view_of_training_only_flips() -> None:
    image = photo(60, 40)
    plain = fixed_pixels(image, SQUARE, SIZE)
    assert torch.equal(random_pixels(image, SQUARE, SIZE, [0.3] * (DRAWS - 1) + [0.5]), plain)
    flipped = random_pixels(image, SQUARE, SIZE, [0.3] * (DRAWS - 1) + [0.49])
    assert torch.equal(
        flipped, fixed_pixels(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), SQUARE, SIZE)
    )


def test_crops_have_torchvisions_distribution() -> None:
    """Areas of the box, read off a picture whose two gradients tell where it was cut."""
    draws = np.random.default_rng(0).random((400, DRAWS))
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(64) * 4, np.arange(64)[:, None] * 4
    image = Image.fromarray(ramp)
    torch.manual_seed(0)
    reference = tv1.Compose([tv1.RandomResizedCrop(32), tv1.PILToTensor()])

    def extent(pixels: torch.Tensor) -> list[float]:
        x, y = pixels[0].float(), pixels[1].float()
        return [(x.amax() - x.amin()).item(), (y.amax() - y.amin()).item(), y.mean().item()]

    bilinear = View("crop", "bilinear")
    ours = np.array([extent(random_pixels(image, bilinear, (32, 32), d)) for d in draws.tolist()])
    theirs = np.array([extent(reference(image)) for _ in range(400)])
    error = np.sqrt((ours.var(0) + theirs.var(0)) / 400)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
    assert np.abs(ours.std(0) / theirs.std(0) - 1).max() < 0.2


def equal(one: EvalBatch, other: EvalBatch) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_an_epoch_is_one_permutation_without_the_last_images() -> None:
    batches = train(numbered(50))
    assert (batches.steps, batches.parts) == (4, 1)
    epochs = []
    for epoch in range(3):
        read = [batches[n].labels.tolist() for n in batches.numbers(epoch, epoch + 1)]
        assert [len(r) for r in read] == [12] * 4
        epochs.append([index for indices in read for index in indices])
        assert len(set(epochs[-1])) == 48
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({frozenset(e) for e in epochs}) > 1  # not always the same are left out
    assert list(batches.numbers(1, 3)) == list(range(4, 12))


def test_labels_and_pixels_belong_together() -> None:
    batch = train(numbered(50))[1]
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (12, 3, 16, 16)
    assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.labels)
    assert batch.valid.all()
    assert batch.reasons == [None] * 12


def test_only_the_rows_are_trained_on() -> None:
    data = numbered(60)
    rows = np.arange(60)[::-1][:30]
    batches = TrainBatches(data, rows, CROP, SIZE, 10, seed=0)
    read = torch.cat([batches[n].labels for n in batches.numbers(0, 1)])
    assert sorted(read.tolist()) == list(range(30, 60))


def test_batches_do_not_depend_on_what_was_read_before() -> None:
    data = photos(30)
    forward = [train(data)[n] for n in range(6)]
    once = train(data)
    assert all(equal(once[n], forward[n]) for n in (5, 0, 3, 3, 1))
    other = TrainBatches(data, np.arange(30), CROP, SIZE, 12, seed=8)
    assert not equal(other[0], forward[0])
    # The same image is cut in other ways in other epochs.
    seen = {int(i): forward[0].images[k] for k, i in enumerate(forward[0].labels)}
    again = [(k, b) for b in forward[2:4] for k, i in enumerate(b.labels.tolist()) if i in seen]
    assert again
    assert not any(torch.equal(b.images[k], seen[int(b.labels[k])]) for k, b in again)


@pytest.mark.parametrize(("world", "micro"), [(1, 5), (2, 256), (4, 2), (5, 256), (7, 1)])
def test_processes_and_pieces_share_the_batch_of_one(world: int, micro: int) -> None:
    data = photos(50)
    whole = train(data)
    shares = [train(data, rank=rank, world=world, micro=micro) for rank in range(world)]
    assert {s.steps for s in shares} == {4}
    for step in range(6):
        parts = [s[step * s.parts + p] for s in shares for p in range(s.parts)]
        assert all(len(part.labels) <= micro for part in parts)
        for name in ("images", "labels"):
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(together, getattr(whole[step], name))


def test_fewer_images_than_a_batch_make_one() -> None:
    batches = train(numbered(11), 256, world=2)
    assert (batches.steps, batches.batch_size) == (1, 11)
    assert len(batches[3].labels) == 5
    with pytest.raises(DataError, match="3 images"):
        train(numbered(3), 12, world=4)


def test_shares_of_pairs() -> None:
    shares = [train(numbered(50), 11, rank=rank, world=3, unit=2) for rank in range(3)]
    assert [len(share[0].labels) for share in shares] == [2, 4, 4]


def test_broken_images_of_training_are_replaced_and_named() -> None:
    data = broken(40, range(0, 40, 4))
    batches = train(data)
    read = [batches[n] for n in batches.numbers(0, 1)]
    names = [name for batch in read for name, _ in batch.broken]
    assert {f"photos[{i}]" for i in range(0, 40, 4)} >= set(names) != set()
    assert all(reason == "truncated image" for batch in read for _, reason in batch.broken)
    for batch in read:
        assert len(batch.labels) == 12
        assert not (batch.labels % 4 == 0).any()
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.labels)
    with pytest.raises(DataError, match=r"photos\[\d+\] cannot be decoded, nor can 20 others"):
        list(load_in_order(train(broken(20, range(20))), range(2), 0, False))


def test_workers_change_nothing() -> None:
    batches = train(numbered(50))
    loaded = list(load_in_order(batches, range(2, 6), 2, False))
    assert len(loaded) == 4
    assert all(equal(one, batches[n]) for one, n in zip(loaded, range(2, 6)))
    with pytest.raises(DataError, match="cannot be decoded"):
        list(load_in_order(train(broken(20, range(20))), range(2), 1, False))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 6, 12, 13, 25])
def test_every_test_image_counts_once(n: int, world: int) -> None:
    data = numbered(30)
    ranks = [ordered(data, 4, range(n), rank=rank, world=world) for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1
    read = [r[b] for b in range(len(ranks[0])) for r in ranks]
    assert all(len(batch.images) == 4 for batch in read)
    for batch in read:
        assert not batch.images[~batch.valid].any()
        assert len(batch.reasons) == int(batch.valid.sum())
    assert torch.cat([b.labels[b.valid] for b in read]).tolist() == list(range(n))
    firsts = torch.cat([b.images[b.valid] for b in read])[:, 0, 0, 0]
    assert firsts.tolist() == list(range(n))


def test_broken_test_images_leave_their_slots_empty_and_are_named() -> None:
    batches = ordered(broken(10, [1, 6]), 4)
    first, second, third = (batches[n] for n in range(3))
    assert first.valid.tolist() == [True, False, True, True]
    assert first.reasons == [None, "truncated image", None, None]
    assert second.labels.tolist() == [4, 5, 0, 7]
    assert second.broken == [("photos[6]", "truncated image")]
    assert (third.reasons, third.valid.tolist()) == ([None, None], [True, True, False, False])
