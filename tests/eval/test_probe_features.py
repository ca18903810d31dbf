"""Cached features: computed once, of the right pixels and weights, whatever happens in between."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_probe import TASK, encoder, features_of, pixels_of, save, the_one, write_pictures

from ijepa_zoo.distributed import Distributed
from ijepa_zoo.encode import Encoder
from ijepa_zoo.eval.features import BlockFeatures, RawPixels, cached_features
from ijepa_zoo.eval.models import EvalModel
from ijepa_zoo.eval.probe import EvalConfig, open_probe


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures", train=50, test=2)


@pytest.fixture
def cached(pictures, tmp_path):
    def run(model=None, source=None, options=None, **kwargs):
        model = EvalModel(model or encoder(), "m")
        options = {"out": tmp_path / "out", "workers": 0} | (options or {})
        config = EvalConfig(task=TASK, model=model, data=pictures, **options)
        probe = open_probe(config, Distributed(), model)
        return cached_features(probe, probe.train, source or BlockFeatures(model), **kwargs)

    return run


@pytest.fixture
def encoded(monkeypatch):
    """Numbers of images in the batches that are encoded."""
    encode, counts = Encoder.encode, []

    def counting(self, batches):
        for rows, reasons in encode(self, batches):
            counts.append(len(rows))
            yield rows, reasons

    monkeypatch.setattr(Encoder, "encode", counting)
    return counts


def test_rows_are_the_extractors_features_of_images_and_mirror_images(cached, pictures, encoded):
    for file in pictures.rglob("*.png"):  # an order of names that is that of the images
        pixels = np.array(Image.open(file))
        pixels[:, :7] //= 2  # no longer symmetric
        save(pixels, file.with_name(f"{int(file.stem):03}.png"))
        file.unlink()
    images, _ = pixels_of(pictures, "train")
    for mirrored in (False, True):
        found = cached(mirrored=mirrored)
        expected = features_of(encoder(), images.flip(-1) if mirrored else images)["last4"]
        torch.testing.assert_close(found.rows, expected, atol=1e-5, rtol=1e-5)
    assert cached().rows.equal(cached().rows)
    assert encoded == [128, 22] * 2, "nothing is encoded twice"
    raw = cached(source=RawPixels((32, 32), 3, torch.device("cpu"))).rows
    torch.testing.assert_close(raw.view(150, 3, 32, 32), images, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change", ["weights", "pixels", "names", "transform", "precision", "bands", "more"]
)
def test_a_stale_cache_is_never_used(cached, pictures, encoded, change):
    cached()
    file = pictures / "train" / "class1" / "3.png"
    model, kwargs = encoder(), {}
    if change == "weights":
        model.blocks[2].mlp.fc1.weight.data.mul_(1.5)
    elif change == "pixels":
        shutil.copy(pictures / "train" / "class2" / "3.png", file)
    elif change == "names":
        file.rename(file.with_name("other.png"))
    elif change == "transform":
        model.set_input_size(img_size=64)
    elif change == "precision":
        kwargs = {"source": BlockFeatures(EvalModel(model, "m"), precision="bfloat16")}
    elif change == "bands":
        kwargs = {"options": {"bands": (2, 1, 0)}}
    else:
        shutil.copy(file, file.with_name("one-more.png"))
    cached(model, **kwargs)
    assert sum(encoded) == 150 + (151 if change == "more" else 150)


def test_a_file_cut_short_is_computed_again(cached, tmp_path, encoded):
    first = cached().rows.clone()
    file = the_one(tmp_path, "out/cache/*/rows.npy")
    content = file.read_bytes()
    file.unlink()  # not written in place: the rows are mapped into memory
    file.write_bytes(content[:-9])
    assert cached().rows.equal(first)
    assert sum(encoded) == 300
