"""Which images a step sees, how they are cropped and what masks they have."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import change, step_batches
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as published

from ijepa_zoo.data import ImageDataset, open_images
from ijepa_zoo.data.transforms import DRAWS, crop_resize
from ijepa_zoo.errors import DataError, ImageError, RunError
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.train.config import MaskConfig, OptimConfig, PretrainConfig
from ijepa_zoo.train.data import (
    Batch,
    TrainBatches,
    batch_indices,
    crop_box,
    evaluation_images,
    loader,
    normalize,
    open_training_images,
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


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((64, 64), (0.3, 1.0), (3 / 4, 4 / 3)),
        ((48, 200), (0.3, 1.0), (3 / 4, 4 / 3)),  # many fallbacks
        ((375, 500), (0.08, 0.5), (0.5, 1.0)),
    ],
)
def test_boxes_follow_torchvision(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    """Moments of all coordinates agree with torchvision's own draws within their error."""
    draws = np.random.default_rng(0).random((4000, DRAWS)).tolist()
    ours = np.array([crop_box(row, size, scale=scale, ratio=ratio) for row in draws], float)
    image = torch.zeros(3, *size)
    theirs = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(4000)]
    for moment in (
        lambda b: b,
        lambda b: b**2,
        lambda b: b[:, 2:] * b[:, 3:],
        lambda b: b[:, :2] * b[:, 2:],
        lambda b: b[:, :1] * b[:, 1:2],
    ):
        a, b = moment(ours), moment(np.array(theirs, float))
        error = np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
        assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) <= 5 * error).all()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    assert ((ours[:, :2] + ours[:, 2:]).max(axis=0) >= 0.97 * np.array(size)).all()


def test_boxes_reach_all_borders() -> None:
    wide = {"scale": (0.3, 1.0), "ratio": (3 / 4, 4 / 3)}
    for first in np.random.default_rng(0).random((50, 20)).tolist():
        top, left, height, width = crop_box([*first, 0.0, 0.0, 0.0], (50, 70), **wide)
        assert (top, left) == (0, 0)
        end = 1 - 2**-53
        assert crop_box([*first, end, end, 0.0], (50, 70), **wide) == (
            *(50 - height, 70 - width),
            *(height, width),
        )


@pytest.mark.parametrize("size", [(20, 200), (200, 20), (21, 20), (1, 90)])
def test_fallback_is_that_of_torchvision(size: tuple[int, int]) -> None:
    """Boxes that are larger than any image never fit."""
    ratio = (3 / 4, 4 / 3)
    theirs = RandomResizedCrop.get_params(torch.zeros(3, *size), [9.0, 9.0], list(ratio))
    assert crop_box([0.5] * DRAWS, size, scale=(9.0, 9.0), ratio=ratio) == theirs


@pytest.mark.parametrize("box", [(0, 0, 50, 70), (3, 7, 20, 31), (49, 69, 1, 1), (5, 5, 9, 60)])
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (50, 70)])
def test_crop_is_the_published_one(box: tuple[int, ...], size: tuple[int, int]) -> None:
    """That of torchvision's first transforms on Pillow images, but for rounding."""
    pixels = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels[..., 0])):
        expected = published.resized_crop(image, *box, list(size), InterpolationMode.BILINEAR)
        difference = crop_resize(image, box, size).int() - published.pil_to_tensor(expected).int()
        assert difference.abs().max() <= 1
        assert difference.abs().float().mean() < 0.1


def test_crop_of_many_channels_is_that_of_each() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (40, 50, 7), dtype=np.uint8)
    found = crop_resize(torch.from_numpy(pixels).movedim(2, 0), (4, 3, 30, 41), (16, 24))
    assert found.dtype == torch.uint8
    for channel in range(7):
        image = Image.fromarray(np.ascontiguousarray(pixels[..., channel]))
        single = crop_resize(image, (4, 3, 30, 41), (16, 24))[0]
        assert (found[channel].int() - single.int()).abs().max() <= 1  # rounding


def test_a_batch_is_its_images_cropped() -> None:
    """Worked out once more from the index of every image and the draws of its place."""
    data = batches()
    (first, *_), step = step_batches(data, 5), 5
    whole = batch_indices(82, 16, seed=3, step=step)
    assert first.indices.tolist() == data.indices[whole[:4]].tolist()
    assert set(data.indices) == set(split(90, 8, 3)[0])
    sizes = set()
    for picture, index in zip(first.images, first.indices.tolist()):
        image, found = Image.fromarray(ARRAY[index]), []
        for height in range(1, 21):
            for width in range(1, 27):
                if height * width / 520 > 0.28 and 0.7 < width / height < 1.4:
                    found += [
                        (top, left, height, width)
                        for top in range(21 - height)
                        for left in range(27 - width)
                        if torch.equal(
                            crop_resize(image, (top, left, height, width), (12, 12)), picture
                        )
                    ]
        assert len(found) == 1
        sizes.add(found[0])
    assert len(sizes) == 4


def test_masks_are_those_of_the_batch() -> None:
    context, targets = MASKS.sample(16, seed=3, step=2, part=slice(4, 8), group_size=4)
    part = step_batches(batches(), 2)[1]
    assert torch.equal(part.context, context)
    assert torch.equal(part.targets, targets)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_processes_and_micro_batches_share_one_batch(world: int, micro: int) -> None:
    whole = step_batches(batches(micro=4), 7)
    shared = [
        batch
        for rank in range(world)
        for batch in step_batches(batches(rank=rank, world=world, micro=micro), 7)
    ]
    assert len(shared) == 16 // micro
    assert_same(whole, shared)


def test_steps_seeds_and_positions_differ() -> None:
    one, other = joined(step_batches(batches(), 0)), joined(step_batches(batches(), 1))
    assert one["indices"].tolist() != other["indices"].tolist()
    seeded = joined(step_batches(batches(config=change(CONFIG, seed=4)), 0))
    assert one["indices"].tolist() != seeded["indices"].tolist()
    same = step_batches(batches(open_images(np.repeat(ARRAY[:1], 90, axis=0))), 0)
    pictures = {bytes(picture.numpy()) for picture in joined(same)["images"]}
    assert len(pictures) == 16


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


def test_flip_does_not_depend_on_the_crop() -> None:
    ramp = np.tile(np.arange(0, 240, 3, dtype=np.uint8)[:, None], (90, 60, 1, 3))
    data = {"crop_scale": (0.3, 0.3), "crop_ratio": (1.0, 1.0), "horizontal_flip": True}
    flipping = batches(open_images(ramp), change(CONFIG, data=data))
    steps = [joined(step_batches(flipping, step)) for step in range(20)]
    rows = torch.cat([step["images"][:, 0, 6].float() for step in steps])
    turned = rows[:, 0] > rows[:, -1]
    lefts = rows.amin(dim=1)
    difference = lefts[turned].mean() - lefts[~turned].mean()
    assert difference.abs() < 5 * lefts.std() * np.sqrt(2 / 160)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_is_exact_from_any_step(workers: int) -> None:
    data = batches()
    for first, last in ((0, 6), (4, 9)):
        found = list(loader(data, first, last, workers, pin_memory=False))
        assert len(found) == last - first
        for step, parts in enumerate(found, first):
            assert [len(part.images) for part in parts] == [4] * 4
            assert_same(parts, step_batches(data, step))
    assert list(loader(data, 9, 9, workers, pin_memory=False)) == []


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
        for step, parts in enumerate(loader(batches(open_images(source)), 0, 3, 2, False)):
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


def test_a_damaged_shard_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.tar").write_bytes(b"not a tar file")
    with pytest.raises(DataError, match=r"cut\.tar"):
        open_training_images(CONFIG, str(tmp_path / "cut.tar"))


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
    for step, parts in enumerate(loader(data, 0, 5, 2, False)):  # the same in any process
        assert_same(parts, step_batches(data, step))
        assert [p.broken for p in parts] == [p.broken for p in step_batches(data, step)]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_images_end_the_run(workers: int) -> None:
    data = batches(Broken(set(range(90))))
    with pytest.raises(
        DataError, match=r"^step 2: image \d+ cannot be decoded, nor can 20 others.*: spoilt \d+$"
    ):
        next(loader(data, 2, 4, workers, False))


class Deadly(Broken):
    def read(self, index: int) -> object:
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def test_a_killed_worker_is_told() -> None:
    images = Deadly(set())
    images.parent = os.getpid()
    with pytest.raises(RunError, match="fewer workers"):
        list(loader(batches(images), 0, 3, 2, False))


class Asked(Broken):
    """Workers that get the signals by which a run is asked to stop."""

    def read(self, index: int) -> object:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        return super().read(index)


def test_workers_leave_signals_to_the_run() -> None:
    found = list(loader(batches(Asked(set())), 0, 2, 2, False))
    assert_same(found[1], step_batches(batches(), 1))


ABANDONED = """
from test_data import batches, loader
steps = loader(batches(), 0, 100, 2, False)
next(steps)
raise SystemExit("gone")  # with workers at work
"""


def test_workers_end_with_the_run() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", ABANDONED], env=environment, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr.decode().strip()) == (1, "gone")


def test_faults_of_a_data_set_keep_their_kind() -> None:
    class Faulty(Broken):
        def read(self, index: int) -> object:
            raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        list(loader(batches(Faulty(set())), 0, 1, 1, False))


def test_loader_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        list(loader(batches(), 0, 1, 1, False))


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
