"""Which images a step sees, how they are cropped and what masks they have."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import change, step_batches
from torchvision.transforms import functional as published

from ijepa_zoo.data import ImageDataset, open_images
from ijepa_zoo.data.transforms import DRAWS, crop_box, crop_resize
from ijepa_zoo.errors import DataError, ImageError
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.seeds import Stream, numpy_generator
from ijepa_zoo.train.config import MaskConfig, OptimConfig, PretrainConfig
from ijepa_zoo.train.data import (
    Batch,
    TrainBatches,
    batch_indices,
    evaluation_images,
    normalize,
    split,
)

MASKS = MultiBlockMasks(grid_size=(6, 6), min_keep=2)
CONFIG = PretrainConfig(
    seed=3, mask=MaskConfig(group_size=4, min_keep=2), optim=OptimConfig(batch_size=16)
)
ARRAY = np.random.default_rng(0).integers(0, 256, (90, 20, 26, 3), dtype=np.uint8)


def batches(
    images: ImageDataset | None = None,
    config: PretrainConfig = CONFIG,
    *,
    rank: int = 0,
    world: int = 1,
    micro: int = 4,
) -> TrainBatches:
    images = images or open_images(ARRAY)
    indices, _ = split(len(images), 8, config.seed)
    return TrainBatches(images, indices, config, (12, 12), MASKS, rank, world, micro)


def joined(parts: list[Batch]) -> dict[str, torch.Tensor]:
    """Micro-batches put together; contexts stay apart where they are of several lengths."""
    names = ("images", "targets", "indices")
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return whole | {"context": [row for part in parts for row in part.context.tolist()]}


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    first, second = joined(one), joined(other)
    assert first.pop("context") == second.pop("context")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_split_holds_out_a_random_part() -> None:
    trained, held_out = split(1000, 100, seed=5)
    assert sorted([*trained, *held_out]) == list(range(1000))
    assert trained.dtype == held_out.dtype == np.int64
    assert (np.diff(trained) > 0).all()
    assert (np.diff(held_out) > 0).all()
    assert 350 < held_out.mean() < 650
    assert np.array_equal(held_out, split(1000, 100, seed=5)[1])
    assert not np.array_equal(held_out, split(1000, 100, seed=6)[1])
    assert split(10, 0, seed=0)[0].tolist() == list(range(10))
    with pytest.raises(ValueError, match=r"data\.held_out=40 leaves none of 40 images.*=2"):
        split(40, 40, seed=0)


def test_every_epoch_is_a_permutation_without_its_rest() -> None:
    steps = [batch_indices(11, 3, seed=1, step=s) for s in range(3 * 40)]
    epochs = np.concatenate(steps).reshape(40, 9)
    assert all(len(set(epoch)) == 9 for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 40
    left_out = {frozenset(range(11)) - set(epoch) for epoch in epochs.tolist()}
    assert len(left_out) > 20
    counts = np.bincount(epochs.ravel(), minlength=11)
    assert (np.abs(counts - 40 * 9 / 11) < 5 * np.sqrt(40 * 2 / 11)).all()
    assert batch_indices(11, 3, seed=2, step=0).tolist() != steps[0].tolist()
    assert batch_indices(11, 3, seed=1, step=77).tolist() == steps[77].tolist()


def test_a_batch_is_its_images_cropped() -> None:
    data = batches()
    (_, second, *_), step = step_batches(data, 5), 5
    whole = batch_indices(82, 16, seed=3, step=step)
    assert second.indices.tolist() == data.indices[whole[4:8]].tolist()
    assert set(data.indices) == set(split(90, 8, 3)[0])
    draws = numpy_generator(3, Stream.CROPS, step).random((16, DRAWS))[4:8].tolist()
    for picture, index, row in zip(second.images, second.indices.tolist(), draws):
        box = crop_box(row, (20, 26), scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3))
        assert torch.equal(picture, crop_resize(Image.fromarray(ARRAY[index]), box, (12, 12)))


def test_masks_are_those_of_the_batch() -> None:
    context, targets = MASKS.sample(16, seed=3, step=2, part=slice(4, 8), group_size=4)
    part = step_batches(batches(), 2)[1]
    assert torch.equal(part.context, context)
    assert torch.equal(part.targets, targets)


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 4), (4, 1)])
def test_processes_and_micro_batches_share_one_batch(world: int, micro: int) -> None:
    whole = step_batches(batches(micro=4), 7)
    shared = [
        batch
        for rank in range(world)
        for batch in step_batches(batches(rank=rank, world=world, micro=micro), 7)
    ]
    assert len(shared) == 16 // micro
    assert_same(whole, shared)


def test_flip_turns_half_of_the_images_and_nothing_else() -> None:
    flipping = change(CONFIG, data={"horizontal_flip": True})
    turned = 0
    for step in range(20):
        plain, flipped = (
            joined(step_batches(batches(config=config), step)) for config in (CONFIG, flipping)
        )
        assert plain["indices"].tolist() == flipped["indices"].tolist()
        for a, b in zip(plain["images"], flipped["images"]):
            assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
            turned += not torch.equal(a, b)
    assert abs(turned - 160) < 5 * np.sqrt(320 / 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_is_exact_from_any_step(workers: int) -> None:
    data = batches()
    for first, last in ((0, 6), (4, 9)):
        found = list(data.steps(first, last, workers, pin_memory=False))
        assert len(found) == last - first
        for step, parts in enumerate(found, first):
            assert [len(part.images) for part in parts] == [4] * 4
            assert_same(parts, step_batches(data, step))
    assert list(data.steps(9, 9, workers, pin_memory=False)) == []


def test_shards_files_and_arrays_give_the_same_batches(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for number, pixels in enumerate(ARRAY):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            info = tarfile.TarInfo(f"{number:03}.png")
            info.size = len(file.getvalue())
            tar.addfile(info, io.BytesIO(file.getvalue()))
            (tmp_path / "files").mkdir(exist_ok=True)
            (tmp_path / "files" / info.name).write_bytes(file.getvalue())
    for source in (tmp_path / "all.tar", tmp_path / "files"):
        for step, parts in enumerate(batches(open_images(source)).steps(0, 3, 2, False)):
            assert_same(parts, step_batches(batches(), step))


class Broken:
    """A set with images that cannot be decoded."""

    labels = None

    def __init__(self, broken: set[int]) -> None:
        self.whole, self.broken = open_images(ARRAY), broken

    def __len__(self) -> int:
        return len(self.whole)

    def read(self, index: int) -> object:
        if index in self.broken:
            raise ImageError(f"spoilt {index}")
        return self.whole.read(index)

    def name(self, index: int) -> str:
        return f"image {index}"

    def fingerprint(self) -> str:
        return ""


def test_broken_images_are_named_and_replaced() -> None:
    broken = set(range(0, 90, 3))
    data, intact = batches(Broken(broken)), batches()
    replaced = 0
    for step in range(5):
        for part, wanted in zip(step_batches(data, step), step_batches(intact, step)):
            tried = [int(name.removeprefix("image ")) for name, _ in part.broken]
            assert all(reason == f"spoilt {n}" for n, (_, reason) in zip(tried, part.broken))
            assert set(tried) <= broken
            assert set(wanted.indices.tolist()) & broken <= set(tried)
            assert not set(part.indices.tolist()) & broken
            assert set(part.indices.tolist()) <= set(data.indices.tolist())
            for row, index in enumerate(wanted.indices.tolist()):
                kept = index not in broken
                assert kept == (part.indices[row] == index)
                assert not kept or torch.equal(part.images[row], wanted.images[row])
                replaced += not kept
    assert replaced > 10
    for step, parts in enumerate(data.steps(0, 5, 2, False)):  # the same in any process
        assert_same(parts, step_batches(data, step))
        assert [p.broken for p in parts] == [p.broken for p in step_batches(data, step)]


def test_too_many_broken_images_end_the_run() -> None:
    data, workers = batches(Broken(set(range(90)))), 2
    with pytest.raises(
        DataError, match=r"^step 2: image \d+ cannot be decoded, nor can 20 others.*: spoilt \d+$"
    ):
        next(data.steps(2, 4, workers, False))


def test_images_for_monitors(tmp_path: Path) -> None:
    for number, size in enumerate([(30, 20), (20, 50), (8, 8)]):
        folder = tmp_path / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "b" / "9.png").write_bytes(b"junk")
    images = open_images(tmp_path)  # a/0, a/2, b/1, b/9
    pixels, labels, broken = evaluation_images(images, np.array([0, 2, 3]), (12, 12))
    assert pixels.shape == (2, 3, 12, 12)
    assert labels.tolist() == [0, 1]
    assert [(Path(name).name, reason.partition(",")[0]) for name, reason in broken] == [
        ("9.png", "not an image")
    ]
    for picture, index, side in ((pixels[0], 0, 20), (pixels[1], 2, 20)):
        image = published.center_crop(images.read(index), [side, side])
        expected = published.pil_to_tensor(image.resize((12, 12), Image.Resampling.BILINEAR))
        assert torch.equal(picture, expected)
    wide, _, _ = evaluation_images(images, np.array([0]), (10, 5))
    middle = images.read(0).crop((2, 0, 17, 30))
    expected = published.pil_to_tensor(middle.resize((5, 10), Image.Resampling.BILINEAR))
    assert torch.equal(wide[0], expected)
    with pytest.raises(DataError, match=r"none of 1 images can be decoded; .*9\.png: not an"):
        evaluation_images(images, np.array([3]), (12, 12))
    assert evaluation_images(open_images(ARRAY), np.array([1]), (4, 4))[1] is None


def test_greyscale_and_many_channels_come_through() -> None:
    for channels in (1, 2, 5):
        array = np.random.default_rng(0).integers(0, 256, (40, 16, 16, channels), dtype=np.uint8)
        config = change(CONFIG, data={"mean": (0.5,), "std": (0.2,)})
        part = batches(open_images(array, in_chans=channels), config)[0]
        assert part.images.shape == (4, channels, 12, 12)
        normal = normalize(part.images, config.data.mean, config.data.std)
        assert torch.allclose(normal, (part.images / 255 - 0.5) / 0.2, atol=1e-5)


def test_normalize() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    out = normalize(images, (0.5, 0.4, 0.2), (0.25, 0.2, 0.1))
    assert out.dtype == torch.float32
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([-2.0, -2.0, -2.0]))
    assert torch.allclose(out[1, :, 0, 0], torch.tensor([2.0, 3.0, 8.0]))
