"""Damage to the files of a run: made anew or told, never taken for results."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from ijepa_zoo.errors import RunError
from ijepa_zoo.extraction import extract_features, run


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, embed_dim=24, depth=1, num_heads=2, num_classes=0)
    model.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0, "architecture": "tiny"}
    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(
            folder / f"{number}.png"
        )
    return folder


def extract(images: Path, model: VisionTransformer, out: Path, overwrite: bool = False) -> bytes:
    options = {"batch_size": 2, "device": "cpu", "workers": 0, "overwrite": overwrite}
    extract_features([images], model, out, **options)
    return out.read_bytes()


@pytest.fixture
def parts(
    images: Path, model: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder of a run that was stopped when all its parts were there."""

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "merge", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(images, model, tmp_path / "f.npy")
    return tmp_path / "f.npy.parts"


@pytest.mark.parametrize(
    "damage",
    [
        lambda parts: os.truncate(parts / "000001.rows", 100),
        lambda parts: (parts / "000001.rows").write_bytes(b"x" * 1000),
        lambda parts: (parts / "000001.rows").unlink(),
        lambda parts: (parts / "000001.json").unlink(),
        lambda parts: (parts / "000001.json").write_text("{"),
        lambda parts: (parts / "000001.json").write_text("[null]"),
        lambda parts: (parts / "000001.json").rename(parts / "1.json"),
        lambda parts: (parts / "99999999.json").write_text("[]"),
        lambda parts: (parts / "\u00b2.json").write_text("[]"),
    ],
)
def test_damaged_parts_are_made_anew(
    images: Path,
    model: VisionTransformer,
    tmp_path: Path,
    parts: Path,
    damage: Callable[[Path], object],
) -> None:
    damage(parts)
    assert extract(images, model, parts.with_suffix("")) == extract(
        images, model, tmp_path / "whole.npy"
    )


@pytest.mark.parametrize("left", [["000002.rows"], ["settings.json", "000002.json", "rank1.lock"]])
@pytest.mark.parametrize("overwrite", [False, True])
def test_parts_of_a_run_that_was_killed_while_it_removed_them(
    images: Path, model: VisionTransformer, tmp_path: Path, parts: Path, left: list[str],
    overwrite: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop(outputs: object) -> None:
        raise KeyboardInterrupt

    out = parts.with_suffix("")
    with monkeypatch.context() as patch:
        patch.setattr(run, "remove_parts", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(images, model, out)
    for file in parts.iterdir():
        if file.name not in left:
            file.unlink()
    whole = extract(images, model, tmp_path / "whole.npy")
    assert extract(images, model, out, overwrite) == whole
    assert not parts.exists()


def test_a_process_that_waited_for_the_merge_does_not_merge_again(
    images: Path, model: VisionTransformer, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, results, remove = [], [], run.remove_parts
    merge_when_complete = run._merge_when_complete

    def record(*args: object) -> bool:
        found.append(args)
        return merge_when_complete(*args)

    def meanwhile(outputs: object) -> None:
        if not results:
            results.append(merge_when_complete(*found[0]))
        remove(outputs)

    monkeypatch.setattr(run, "_merge_when_complete", record)
    monkeypatch.setattr(run, "remove_parts", meanwhile)
    extract(images, model, parts.with_suffix(""))
    assert results == [False]
    assert not parts.exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_settings_are_told(
    images: Path, model: VisionTransformer, tmp_path: Path, parts: Path, text: str
) -> None:
    (parts / "settings.json").write_text(text)
    out = parts.with_suffix("")
    with pytest.raises(RunError, match="names them is damaged"):
        extract(images, model, out)
    assert extract(images, model, out, overwrite=True)
    (tmp_path / "f.run.json").write_text(text)
    with pytest.raises(RunError, match="names them is damaged"):
        extract(images, model, out)
    assert extract(images, model, out, overwrite=True)


def test_killed_workers_are_told(
    images: Path, model: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        os.kill(os.getpid(), 9)

    monkeypatch.setattr("ijepa_zoo.extraction.run.ImageBatches.__getitem__", killed)
    with pytest.raises(RunError, match="fewer workers"):
        extract_features([images], model, tmp_path / "f.npy", device="cpu", workers=1)


def test_devices_are_no_outputs(images: Path, model: VisionTransformer) -> None:
    with pytest.raises(ValueError, match="device or a pipe"):
        extract_features([images], model, os.devnull, format="npy")
    assert not os.path.isfile(os.devnull)


def test_text_that_is_not_utf8_reaches_the_metadata(
    images: Path, model: VisionTransformer, tmp_path: Path
) -> None:
    out = tmp_path / "f.safetensors"
    model.weights_origin = os.fsdecode(b"weights \xff")
    extract_features([images], model, out, device="cpu", workers=0)
    assert rb"weights \\udcff" in out.read_bytes()
