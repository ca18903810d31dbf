"""Cached features: computed once, of the right pixels and weights, whatever happens in between."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from small_probe import TASK, encoder, pixels_of, write_pictures

from ijepa_zoo import FeatureExtractor
from ijepa_zoo.distributed import Distributed
from ijepa_zoo.errors import RunError
from ijepa_zoo.eval.feeds import CachedFeed
from ijepa_zoo.eval.models import Subject
from ijepa_zoo.eval.probe import Probe, open_probe
from ijepa_zoo.eval.representations import BlockFeatures, RawPixels


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures", train=50, test=2)


@pytest.fixture
def cached(pictures, tmp_path):
    def run(model=None, data=pictures, task=TASK, source=None, **kwargs):
        probe = open_probe(task, data, tmp_path / "out", Distributed(), workers=0, skip_broken=True)
        source = source or BlockFeatures(Subject(model or encoder(), "m"), device="cpu")
        return probe.features(probe.train, source, **kwargs)

    return run


def test_rows_are_the_extractors_features_of_images_and_mirror_images(cached, pictures):
    for file in pictures.rglob("*.png"):  # an order of names that is that of the images
        file.rename(file.with_name(f"{int(file.stem):03}.png"))
    images, _ = pixels_of(pictures, "train")
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    images[:, :, :, :7] *= 0.5  # no longer symmetric
    for image, file in zip(images, sorted((pictures / "train").rglob("*.png"))):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(file)
    images = (images * 255).byte() / 255
    for mirrored in (False, True):
        found = cached(mirrored=mirrored)
        with torch.no_grad():
            pixels = (images.flip(-1) if mirrored else images).sub(mean) / std
            expected = FeatureExtractor(encoder(), "last4")(pixels)
        torch.testing.assert_close(torch.as_tensor(found.rows), expected, atol=1e-5, rtol=1e-5)
        assert found.computed == 150


def test_nothing_is_encoded_twice(cached, monkeypatch):
    first = cached()
    monkeypatch.setattr(BlockFeatures, "encode", None)
    second = cached()
    assert second.computed == 0
    assert torch.equal(torch.as_tensor(first.rows), torch.as_tensor(second.rows))


@pytest.mark.parametrize("change", ["weights", "pixels", "names", "transform", "precision", "more"])
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
        source = BlockFeatures(Subject(model, "m"), device="cpu", precision="bfloat16")
        kwargs = {"source": source}
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


def test_a_link_to_nowhere_is_a_broken_image(cached, pictures):
    file = pictures / "train" / "class0" / "0.png"
    file.unlink()
    file.symlink_to("nowhere")
    assert list(cached().broken) == [0]


def test_what_does_not_train_needs_no_batch_that_processes_can_share(
    pictures, tmp_path, monkeypatch
):
    probe = open_probe(TASK, pictures, tmp_path / "out", Distributed(), workers=0)
    source = BlockFeatures(Subject(encoder(), "m"), device="cpu")
    found = {part.split: probe.features(part, source) for part in (probe.train, probe.test)}
    monkeypatch.setattr(Probe, "features", lambda probe, part, source: found[part.split])
    three = replace(probe, distributed=Distributed(world_size=3))
    assert CachedFeed(three, source, None, flips=False).fitted() > 0


def test_a_folder_with_other_settings_is_refused(cached, tmp_path):
    cached()
    (settings,) = tmp_path.glob("out/cache/*/settings.json")
    content = json.loads(settings.read_bytes())
    settings.write_text(json.dumps({**content, "weights_hash": "0"}))
    with pytest.raises(RunError, match="holds other features than its name says"):
        cached()


def test_raw_pixels_are_the_images_themselves(cached, pictures):
    found = cached(source=RawPixels((32, 32), torch.device("cpu")))
    images, _ = pixels_of(pictures, "test")
    assert found.rows.shape == (150, 3 * 32 * 32)
    assert len(images) == 6
    assert 0 <= float(found.rows.min()) < float(found.rows.max()) <= 1


@pytest.mark.parametrize("name", ["rows.npy", "reasons.json", "settings.json"])
@pytest.mark.parametrize("damage", ["empty", "cut", "junk", "type", "longer"])
def test_damaged_files_are_computed_again(cached, tmp_path, name, damage):
    first = torch.as_tensor(cached().rows).clone()
    (file,) = tmp_path.glob(f"out/cache/*/{name}")
    content = file.read_bytes()
    file.unlink()  # not written in place: the rows are mapped into memory
    file.write_bytes(
        {"empty": b"", "cut": content[:-9], "junk": b"\x93\xff\x00", "type": b"7",
         "longer": content + b"more"}[damage]
    )  # fmt: skip
    again = cached()
    assert again.computed == 150
    assert torch.equal(torch.as_tensor(again.rows), first)
    assert cached().computed == 0


def test_rows_and_reasons_must_agree(cached, tmp_path):
    cached()
    (file,) = tmp_path.glob("out/cache/*/reasons.json")
    content = json.loads(file.read_bytes())
    file.write_text(json.dumps({**content, "reasons": ["broken", *[None] * 149]}))
    assert cached().computed == 150


def test_rows_with_other_values_are_computed_again(cached, tmp_path):
    first = torch.as_tensor(cached().rows).clone()
    (file,) = tmp_path.glob("out/cache/*/rows.npy")
    content = bytearray(file.read_bytes())
    content[-400:] = bytes(400)
    file.unlink()
    file.write_bytes(content)
    again = cached()
    assert again.computed == 150
    assert torch.equal(torch.as_tensor(again.rows), first)


def test_files_that_are_damaged_again_at_once_name_their_folder(cached, tmp_path, monkeypatch):
    monkeypatch.setattr("ijepa_zoo.eval.cache._merge", lambda parts, width: None)
    with pytest.raises(RunError, match=r"the features in .*cache.* are damaged .*remove it"):
        cached()
