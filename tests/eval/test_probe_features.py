"""Cached features: computed once, of the right pixels and weights, whatever happens in between."""

import shutil

import pytest
import torch
from PIL import Image
from small_probe import TASK, encoder, features_of, pixels_of, write_pictures

from ijepa_zoo.distributed import Distributed
from ijepa_zoo.errors import DataError
from ijepa_zoo.eval.features import BlockFeatures, RawPixels, cached_features
from ijepa_zoo.eval.models import Subject
from ijepa_zoo.eval.probe import EvalConfig, open_probe


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures", train=50, test=2)


@pytest.fixture
def cached(pictures, tmp_path):
    def run(model=None, source=None, options=None, **kwargs):
        model = model or encoder()
        options = {"out": tmp_path / "out", "workers": 0, "skip_broken": True} | (options or {})
        config = EvalConfig(task=TASK, model=model, data=pictures, **options)
        probe = open_probe(config, Distributed(), Subject(model, "m"))
        source = source or BlockFeatures(Subject(model, "m"))
        return cached_features(probe, probe.train, source, **kwargs)

    return run


def test_rows_are_the_extractors_features_of_images_and_mirror_images(cached, pictures):
    for file in pictures.rglob("*.png"):  # an order of names that is that of the images
        file.rename(file.with_name(f"{int(file.stem):03}.png"))
    images, _ = pixels_of(pictures, "train")
    images[:, :, :, :7] *= 0.5  # no longer symmetric
    for image, file in zip(images, sorted((pictures / "train").rglob("*.png"))):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(file)
    images = (images * 255).byte() / 255
    for mirrored in (False, True):
        found = cached(mirrored=mirrored)
        expected = features_of(encoder(), images.flip(-1) if mirrored else images)["last4"]
        torch.testing.assert_close(found.rows, expected, atol=1e-5, rtol=1e-5)
        assert found.computed == 150


def test_nothing_is_encoded_twice(cached, monkeypatch):
    first = cached()
    monkeypatch.setattr(BlockFeatures, "encode", None)
    second = cached()
    assert second.computed == 0
    assert first.rows.equal(second.rows)


@pytest.mark.parametrize(
    "change", ["weights", "pixels", "names", "transform", "precision", "bands", "more"]
)
def test_a_stale_cache_is_never_used(cached, pictures, change):
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
        source = BlockFeatures(Subject(model, "m"), precision="bfloat16")
        kwargs = {"source": source}
    elif change == "bands":
        kwargs = {"options": {"bands": (2, 1, 0)}}
    else:
        shutil.copy(file, file.with_name("one-more.png"))
    assert cached(model, **kwargs).computed == (151 if change == "more" else 150)


def test_an_interrupted_pass_computes_only_what_is_missing(cached, monkeypatch):
    encode, seen = BlockFeatures.encode, []

    def dying(self, batches):
        for number, batch in enumerate(encode(self, batches)):
            if number == 1:
                raise KeyboardInterrupt
            yield batch

    def counting(self, batches):
        for rows, reasons in encode(self, batches):
            seen.append(len(rows))
            yield rows, reasons

    with monkeypatch.context() as patch:
        patch.setattr(BlockFeatures, "encode", dying)
        with pytest.raises(KeyboardInterrupt):
            cached()
    monkeypatch.setattr(BlockFeatures, "encode", counting)
    found = cached()
    assert seen == [22]  # of 150 in batches of 128
    assert found.computed == 22
    assert len(found.rows) == 150


def test_broken_images_have_no_row_and_a_reason(cached, pictures):
    (pictures / "train" / "class0" / "0.png").write_bytes(b"no image")
    found = cached()
    assert len(found.rows) == 149
    assert list(found.broken) == [0]
    assert 0 not in found.indices
    assert len(found.indices) == 149
    with pytest.raises(DataError, match=r"class0/0\.png"):  # from the cache as well
        cached(options={"skip_broken": False})


def test_a_link_to_nowhere_is_a_broken_image(cached, pictures):
    file = pictures / "train" / "class0" / "0.png"
    file.unlink()
    file.symlink_to("nowhere")
    assert list(cached().broken) == [0]


def test_raw_pixels_are_the_images_themselves(cached, pictures):
    found = cached(source=RawPixels((32, 32), 3, torch.device("cpu")))
    images, _ = pixels_of(pictures, "test")
    assert found.rows.shape == (150, 3 * 32 * 32)
    assert len(images) == 6
    assert 0 <= float(found.rows.min()) < float(found.rows.max()) <= 1


@pytest.mark.parametrize(
    ("name", "damage"),
    [("rows.npy", ""), ("rows.npy", "cut"), ("rows.index.jsonl", ""), ("rows.index.jsonl", "cut")],
)
def test_files_cut_short_are_computed_again(cached, tmp_path, name, damage):
    first = cached().rows.clone()
    (file,) = tmp_path.glob(f"out/cache/*/{name}")
    content = file.read_bytes()
    file.unlink()  # not written in place: the rows are mapped into memory
    file.write_bytes(content[:-9] if damage else b"")
    again = cached()
    assert again.computed == 150
    assert again.rows.equal(first)
    assert cached().computed == 0
