"""The other benches: contenders do the same work, and what they report adds up."""

import numpy as np
import pytest
import torch
from PIL import Image
from published_stub import write_stub

from ijepa_zoo import bench
from ijepa_zoo.bench import DisagreementError, crops
from ijepa_zoo.bench.crops import compare_boxes, compare_pixels
from ijepa_zoo.bench.folder_features import _Timm
from ijepa_zoo.bench.photos import photographs as usable_photographs
from ijepa_zoo.bench.photos import write_photographs
from ijepa_zoo.data.image_sets import open_images

SHORT = {"seconds": 0.05, "rounds": 3, "threads": 1}
MODEL = "vit_nano8_64_ijepa"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder, 6)
    return folder


def test_made_up_photographs_are_of_the_usual_size(photographs, tmp_path):
    files = sorted(photographs.iterdir())
    sizes = [file.stat().st_size for file in files]
    assert len(files) == 6
    assert 80_000 < np.mean(sizes) < 130_000
    assert {Image.open(file).size for file in files} == {(500, 375), (375, 500), (500, 333)}
    write_photographs(tmp_path, 2)
    assert (tmp_path / files[1].name).read_bytes() == files[1].read_bytes()


def test_masks(tmp_path):
    found = bench.masks(
        batch_size=4, vs=["published"], published_path=write_stub(tmp_path), **SHORT
    )
    seconds = found.results["published"]["seconds"]["median"]
    assert found.results["published"]["images_per_second"] == pytest.approx(4 / seconds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"larger = 0": "larger = 1"}, "sizes of target blocks"),
        ({"[context]": "[context[:, 20:]]"}, "mean lengths of the contexts"),
    ],
)
def test_other_masks_are_an_error(tmp_path, change, message):
    stub = write_stub(tmp_path, **change)
    with pytest.raises(DisagreementError, match=message):
        bench.masks(batch_size=4, vs=["published"], published_path=stub, **SHORT)


def test_data(photographs, tmp_path):
    found = bench.data(
        data=photographs, batch_size=3, img_size=64, vs=["published"],
        published_path=write_stub(tmp_path), **SHORT,
    )  # fmt: skip
    assert found.agreement["published"]["difference"] <= 1
    assert found.extra["images"] == 6
    assert found.settings["data"] == photographs


@pytest.fixture
def damaged(photographs, tmp_path):
    """Three good photographs and two files that cannot be decoded."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in sorted(photographs.iterdir())[:3]:
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "00001a.jpg").write_bytes(b"no picture")
    (folder / "00009.jpg").write_bytes((folder / "00000.jpg").read_bytes()[:9_000])
    (folder / "notes.txt").write_text("no image name")
    return folder


def test_files_that_cannot_be_decoded_are_left_out_for_all(damaged, tmp_path, caplog):
    with Image.open(damaged / "00002.jpg") as image:
        image.save(damaged / "00003.webp")  # timm lists no such names
    found = bench.features(
        model=MODEL, data=damaged, batch_size=4, workers=0, device="cpu",
        vs=["timm", "timm"], **SHORT,
    )  # fmt: skip
    assert found.extra["images"] == 4
    assert found.extra["left_out"].startswith("2 of 6 files: 00001a.jpg (")
    assert "00009.jpg" in found.extra["left_out"]
    assert found.settings["vs"] == ["timm"]
    assert "left out 2 of 6 files" in caplog.text
    stub = write_stub(tmp_path / "stub")
    crops = bench.data(
        data=damaged, batch_size=2, img_size=64, vs=["published"], published_path=stub, **SHORT
    )
    assert crops.extra["images"] == 4


def test_folders_without_any_photograph_are_refused(damaged):
    for file in damaged.glob("0000[0-2].jpg"):
        file.unlink()
    for measure in (bench.features, bench.data):
        with pytest.raises(ValueError, match=r"none of its 2 image files can be decoded: 00001a"):
            measure(data=damaged)


def test_large_folders_give_as_many_photographs_as_are_used(tmp_path):
    for number in range(50):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    with usable_photographs(tmp_path, 1, most=20) as good:
        reds = [Image.open(file).getpixel((0, 0))[0] for file in sorted(good.folder.iterdir())]
    assert reds == list(range(0, 50, 3))


def test_other_crops_are_an_error(photographs, monkeypatch):
    images = open_images(photographs)
    box = crops.crop_box
    monkeypatch.setattr(
        crops, "crop_box", lambda draws, size, **law: box(draws, size, **{**law, "scale": (0.4, 1)})
    )
    with pytest.raises(DisagreementError, match="area, log ratio and place"):
        compare_boxes((0.3, 1.0), (3 / 4, 4 / 3))
    monkeypatch.setattr(crops, "cut", lambda *given: torch.zeros(3, 64, 64, dtype=torch.uint8))
    with pytest.raises(DisagreementError, match="levels of crops of 6 photographs"):
        compare_pixels(images, 64)


def test_features_of_three_libraries(photographs):
    found = bench.features(
        model=MODEL, data=photographs, batch_size=4, workers=0, device="cpu",
        vs=["timm", "transformers"], **SHORT,
    )  # fmt: skip
    assert found.agreement["timm"]["tolerance"] == 1e-5
    assert set(found.ratios) == {
        "timm", "transformers", "timm, bare model", "transformers, bare model",
    }  # fmt: skip
    ours = found.results["ijepa_zoo"]
    assert ours["images_per_second"] == pytest.approx(6 / ours["seconds"]["median"])
    for name in ("ijepa_zoo", "timm", "transformers"):
        assert 0 < found.results[name]["start_seconds"] < found.results[name]["seconds"]["range"][1]
        assert "start_seconds" not in found.results[f"{name}, bare model"]


def test_other_features_are_an_error(photographs, monkeypatch):
    right = _Timm.folder_features
    monkeypatch.setattr(_Timm, "folder_features", lambda self: right(self).roll(1, 0))
    with pytest.raises(DisagreementError, match="features of 6 images, as cosine distances"):
        bench.features(model=MODEL, data=photographs, workers=0, device="cpu", vs=["timm"], **SHORT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load(monkeypatch, dtype):
    monkeypatch.setattr(
        "ijepa_zoo.bench.loading.in_fresh_process", lambda function, **given: function(**given)
    )
    found = bench.load(model=MODEL, dtype=dtype, vs=["timm", "transformers"], **SHORT)
    assert set(found.results) == {"ijepa_zoo", "timm", "transformers"}
    assert found.extra["file_bytes"] > 4_000_000


def test_eval():
    found = bench.eval(model=MODEL, batch_size=8, images=4, device="cpu", **SHORT)
    heads, encoder = found.results["heads"], found.results["ijepa_zoo"]
    per_image = heads["seconds"]["median"] / 8, encoder["seconds"]["median"] / 4
    assert heads["over_encoder"] == pytest.approx(per_image[0] / per_image[1])
    assert found.extra["classes"] == 100


def test_unknown_words_are_sentences():
    with pytest.raises(ValueError, match="has no contender published: use timm or transformers"):
        bench.load(vs=["published"])
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        bench.load(dtype="int8")
    with pytest.raises(ValueError, match="other_precision is 'fp8'"):
        bench.features(other_precision="fp8")
