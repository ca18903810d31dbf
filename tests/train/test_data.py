"""Which images a step sees, how they are cropped and what masks they have."""

import io
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_run import change
from torchvision.transforms import functional as published

from ijepa_zoo.data import open_images
from ijepa_zoo.data.transforms import DRAWS, crop_box, crop_resize
from ijepa_zoo.errors import DataError, ImageError, SettingsError
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.seeds import Stream, numpy_generator
from ijepa_zoo.train.config import MaskConfig, OptimConfig, PretrainConfig
from ijepa_zoo.train.data import (
    TrainBatches,
    batch_indices,
    evaluation_images,
    normalize,
    open_training_images,
    split,
)

MASKS = MultiBlockMasks(grid_size=(6, 6), min_keep=2)
CONFIG = PretrainConfig(
    seed=3, mask=MaskConfig(group_size=4, min_keep=2), optim=OptimConfig(batch_size=16)
)
ARRAY = np.random.default_rng(0).integers(0, 256, (90, 20, 26, 3), dtype=np.uint8)


def batches(images=None, config=CONFIG):
    images = images or open_images(ARRAY)
    indices, _ = split(len(images), 8, config.seed)
    return TrainBatches(images, indices, config, (12, 12), MASKS, rank=0, world=1, micro=4)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 300), st.floats(0, 0.9), st.integers(0, 2**63 - 1))
def test_split_and_epochs_are_permutations(n, share, seed):
    trained, held_out = split(n, int(share * n), seed)
    assert sorted([*trained, *held_out]) == list(range(n))
    assert trained.tolist() == sorted(trained)
    size = min(7, n)
    for epoch in range(2):
        steps = range(epoch * (n // size), (epoch + 1) * (n // size))
        seen = np.concatenate([batch_indices(n, size, seed=seed, step=step) for step in steps])
        assert len(set(seen.tolist())) == len(seen) == n // size * size
        assert set(seen) <= set(range(n))
    with pytest.raises(SettingsError, match=rf"data\.held_out={n} leaves none of {n} images"):
        split(n, n, seed)


def test_a_batch_is_its_images_cropped_and_masks_of_the_batch():
    data, step = batches(), 5
    second = data[4 * step + 1]
    whole = batch_indices(82, 16, seed=3, step=step)
    assert second.indices.tolist() == data.indices[whole[4:8]].tolist()
    draws = numpy_generator(3, Stream.CROPS, step).random((16, DRAWS))[4:8].tolist()
    for picture, index, row in zip(second.images, second.indices.tolist(), draws):
        box = crop_box(row, (20, 26), scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3))
        assert torch.equal(picture, crop_resize(Image.fromarray(ARRAY[index]), box, (12, 12)))
    context, targets = MASKS.sample(16, seed=3, step=step, part=slice(4, 8), group_size=4)
    assert torch.equal(second.context, context)
    assert torch.equal(second.targets, targets)


def test_flip_turns_half_of_the_images_and_nothing_else():
    flipping = batches(config=change(CONFIG, data={"horizontal_flip": True}))
    turned = 0
    for number in range(80):
        plain, flipped = batches()[number], flipping[number]
        assert torch.equal(plain.indices, flipped.indices)
        for a, b in zip(plain.images, flipped.images):
            assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
            turned += not torch.equal(a, b)
    assert abs(turned - 160) < 5 * np.sqrt(320 / 4)


def test_shards_files_and_arrays_give_the_same_batches(tmp_path):
    (tmp_path / "files").mkdir()
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for number, pixels in enumerate(ARRAY):
            Image.fromarray(pixels).save(tmp_path / "files" / f"{number:03}.png")
            tar.add(tmp_path / "files" / f"{number:03}.png")
    for source in (tmp_path / "all.tar", tmp_path / "files"):
        data = batches(open_training_images(CONFIG, source))
        assert torch.equal(data[7].images, batches()[7].images)
    with tarfile.open(tmp_path / "all.tgz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(DataError, match=r"all\.tgz.*compressed"):
        open_training_images(CONFIG, tmp_path / "all.tgz")


class Broken:
    """A set with images that cannot be decoded."""

    name = staticmethod("image {}".format)

    def __init__(self, broken):
        self.broken = broken

    def __len__(self):
        return len(ARRAY)

    def read(self, index):
        if index in self.broken:
            raise ImageError(f"spoilt {index}")
        return open_images(ARRAY).read(index)


def test_broken_images_are_named_and_replaced():
    broken = set(range(0, 90, 3))
    data, intact = batches(Broken(broken)), batches()
    for number in range(20):
        part, wanted = data[number], intact[number].indices.tolist()
        named = dict(part.broken)
        assert set(wanted) & broken <= {int(name.removeprefix("image ")) for name in named}
        assert all(reason == name.replace("image", "spoilt") for name, reason in named.items())
        found = part.indices.tolist()
        assert not set(found) & broken
        assert set(found) <= set(data.indices.tolist())
        assert all(f == w for f, w in zip(found, wanted) if w not in broken)
        for index, picture in zip(found, part.images):
            if index in wanted:
                assert torch.equal(picture, intact[number].images[wanted.index(index)])
    (parts,) = data.steps(2, 3, 2, False)  # the same in any process
    assert torch.equal(parts[1].indices, data[9].indices)
    with pytest.raises(DataError, match=r"^step 2: image \d+ cannot.* 20 others.*: spoilt \d+$"):
        next(batches(Broken(set(range(90)))).steps(2, 4, 2, False))


def test_images_for_monitors(tmp_path):
    for name, size in {"a/0": (30, 20), "a/2": (8, 8), "b/1": (20, 50)}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "b" / "9.png").write_bytes(b"junk")
    images = open_images(tmp_path)
    pixels, known, broken = evaluation_images(images, np.array([0, 2, 3, -1]), (3, 12, 12))
    assert known.tolist() == [True, True, False, False]
    ((name, reason),) = broken
    assert name.endswith("9.png")
    assert reason.startswith("not an image")
    for picture, index in zip(pixels[known], (0, 2), strict=True):
        image = published.center_crop(images.read(index), [20, 20])
        expected = published.pil_to_tensor(image.resize((12, 12), Image.Resampling.BILINEAR))
        assert torch.equal(picture, expected)
    wide, _, _ = evaluation_images(images, np.array([0]), (3, 10, 5))
    middle = images.read(0).crop((2, 0, 17, 30)).resize((5, 10), Image.Resampling.BILINEAR)
    assert torch.equal(wide[0], published.pil_to_tensor(middle))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels_is_normalized(channels):
    array = np.random.default_rng(0).integers(0, 256, (40, 16, 16, channels), dtype=np.uint8)
    mean = tuple(0.1 * (channel + 1) for channel in range(channels))
    part = batches(open_images(array, in_chans=channels))[0]
    assert part.images.shape == (4, channels, 12, 12)
    expected = (part.images / 255 - torch.tensor(mean)[:, None, None]) / 0.2
    assert torch.allclose(normalize(part.images, mean, (0.2,)), expected, atol=1e-5)
