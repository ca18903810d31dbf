import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from ijepa_zoo.train.batches import batch_indices, crop_and_resize, crop_boxes, normalise

WIDE = {"scale": (0.3, 1.0), "ratio": (3 / 4, 4 / 3), "seed": 0}


def test_every_epoch_is_a_permutation():
    seen = np.concatenate([batch_indices(10, 4, seed=1, step=s) for s in range(10)])
    epochs = seen.reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(e) for e in epochs}) == 4
    assert batch_indices(10, 4, seed=2, step=0).tolist() != seen[:4].tolist()


def test_batch_larger_than_the_data():
    counts = np.bincount(batch_indices(3, 7, seed=0, step=1), minlength=3)
    assert counts.sum() == 7
    assert counts.max() <= 4


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_boxes_follow_torchvision(size):
    """Means of every box coordinate agree with torchvision's own draws within their error."""
    ours = np.concatenate([crop_boxes(500, size, step=s, **WIDE) for s in range(8)])
    torch.manual_seed(0)
    image = torch.zeros(3, *size)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, WIDE["scale"], WIDE["ratio"]) for _ in range(4000)]
    )
    for values in (lambda b: b, lambda b: b**2, lambda b: b[:, 2:] * b[:, 3:2:-1]):
        a, b = values(ours.astype(float)), values(theirs.astype(float))
        error = np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
        assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) < 5 * error).all()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= size[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= size[1]).all()


def test_boxes_are_a_function_of_the_step():
    first = crop_boxes(6, (64, 64), step=3, **WIDE)
    assert np.array_equal(first, crop_boxes(6, (64, 64), step=3, **WIDE))
    assert not np.array_equal(first, crop_boxes(6, (64, 64), step=4, **WIDE))


def test_fallback_is_the_largest_centred_box():
    box = crop_boxes(2, (20, 200), scale=(0.99, 1.0), ratio=(1.0, 1.0), seed=0, step=0)
    assert box.tolist() == [[0, 90, 20, 20]] * 2


@pytest.mark.parametrize("out", [(32, 32), (64, 48), (16, 96)])
def test_crop_equals_torchvision(out):
    images = torch.randint(0, 256, (5, 50, 70, 3), generator=torch.Generator().manual_seed(0))
    boxes = np.array(
        [[0, 0, 50, 70], [3, 7, 20, 31], [10, 40, 40, 30], [49, 69, 1, 1], [5, 5, 9, 60]]
    )
    ours = crop_and_resize(images.to(torch.uint8), boxes, out)
    for image, box, result in zip(images, boxes, ours):
        picture = image.movedim(2, 0).float()
        expected = tv.resized_crop(picture, *box.tolist(), list(out), antialias=True)
        assert torch.allclose(result, expected, atol=2e-3)


def test_normalise():
    images = torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    out = normalise(images, (0.5, 0.4, 0.2), (0.25, 0.2, 0.1))
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([-2.0, -2.0, -2.0]))
    assert torch.allclose(out[1, :, 0, 0], torch.tensor([2.0, 3.0, 8.0]))


def test_refuses_scales():
    with pytest.raises(ValueError, match="crop scale"):
        crop_boxes(1, (8, 8), scale=(0.5, 1.5), ratio=(1, 1), seed=0, step=0)
