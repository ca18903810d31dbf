"""The command line, in this process; weights are random and come from a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ijepa_zoo
from ijepa_zoo import cli
from ijepa_zoo.cli.status import DONE, USAGE
from ijepa_zoo.extraction.parts import Parts


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = ijepa_zoo.create_model("vit_nano8_64_ijepa", pretrained=False)
    path = tmp_path_factory.mktemp("weights") / "nano.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six pictures in two classes, all good; the current folder holds them."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for number in range(6):
        place = tmp_path / "photos" / ("cat" if number < 3 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random.integers(0, 256, (70, 80, 3), np.uint8))
        image.save(place / f"{number}.png")
    return tmp_path / "photos"


def command(weights: str, *arguments: str) -> int:
    options = ["--device", "cpu", "--workers", "0", "--batch-size", "2", "--out", "f.npy"]
    model = ["--model", "vit_nano8_64_ijepa", "--checkpoint", weights]
    return cli.main(["features", *options, *model, *arguments])


def test_features_and_picture(
    photos: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(weights, "photos", "--picture", "p.png", "--picture-images", "2") == 0
    assert np.load("f.npy").shape == (6, 128)
    with Image.open("p.png") as picture:
        assert picture.width > picture.height / 2
    printed = capsys.readouterr()
    for words in (
        *("vit_nano8_64_ijepa", weights, "crop 1 to 64x64", "block 5, final LayerNorm, mean"),
        *("6 done, 0 failed, 0 skipped", "images/s on cpu", "[6 x 128] float32"),
        *("f.index.jsonl", "f.run.json", "p.png"),
    ):
        assert words in printed.out
    assert printed.err == ""
    assert command(weights, "photos") == 0
    assert "all done before" in capsys.readouterr().out


def test_layers_pool_dtype_and_format(photos: Path, weights: str) -> None:
    arguments = ["--layers", "0,-1", "--pool", "none", "--dtype", "float16", "--out", "maps"]
    assert command(weights, "photos", *arguments, "--format", "npy") == 0
    maps = np.load("maps")
    assert (maps.shape, maps.dtype) == ((6, 256, 8, 8), np.float16)
    assert json.loads(Path("maps.run.json").read_text())["settings"]["layers"] == [0, 5]


def test_failed_images_are_listed(
    photos: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(25):
        (photos / f"broken{number:02}.jpg").write_bytes(b"")
    (photos / "large.png").write_bytes((photos / "cat/0.png").read_bytes())
    assert command(weights, "photos/", "--max-pixels", "5599") == 3
    printed = capsys.readouterr()
    assert "0 done, 32 failed" in printed.out
    assert "failed: 'photos/broken00.jpg': empty file\n" in printed.err
    assert printed.err.count("failed: ") == 20
    assert "and 12 more, see 'error' in f.index.jsonl" in printed.err
    lines = [json.loads(line) for line in Path("f.index.jsonl").read_text().splitlines()]
    assert {line["error"] for line in lines if "broken" not in line["path"]} == {
        "too large: 5,600 pixels, the limit is 5,599 (max_pixels)"
    }
    assert command(weights, "photos/", "--max-pixels", "5599") == 3  # also when all is done


def test_named_file_that_is_no_image_is_a_failure(photos: Path, weights: str) -> None:
    Path("notes.md").write_text("text")
    assert command(weights, "photos", "notes.md") == 3
    assert np.load("f.npy").shape == (6, 128)


def test_strict(photos: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "broken.jpg").write_bytes(b"")
    assert command(weights, "photos", "--strict") == 1
    assert "'photos/broken.jpg': empty file" in capsys.readouterr().err


def test_other_settings_and_overwrite(
    photos: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(weights, "photos") == 0
    assert command(weights, "photos", "--layers", "last4") == 1
    assert "layers: [5] then, [2, 3, 4, 5] now" in capsys.readouterr().err
    assert command(weights, "photos", "--layers", "last4", "--overwrite") == 0
    assert np.load("f.npy").shape == (6, 512)


def test_interrupt(
    photos: Path,
    weights: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", interrupt)
        assert command(weights, "photos") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert command(weights, "photos") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["phtos"], "Did you mean 'photos'?"),
        (["photos", "--out", "f.csv"], "format of 'f.csv' is not clear"),
        (["photos", "--layers", "6"], "from 0 to 5, or from -6 to -1"),
        (["photos", "--model", "vit_huge"], "vit_huge"),
    ],
)
def test_wrong_usage(
    photos: Path,
    weights: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(weights, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ijepa-zoo: error: ")
    assert message in error


@pytest.mark.parametrize(
    "arguments", [["--layers", "first"], ["--workers", "-1"], ["--batch-size", "0"], []]
)
def test_arguments_are_checked_by_the_parser(weights: str, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command(weights, *arguments, *(["photos"] if arguments else []))
    assert caught.value.code == 2


def test_missing_weights(photos: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("absent.safetensors", "photos") == 1
    assert "absent.safetensors" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    everything = capsys.readouterr().out
    assert cli.main(["list", "--pretrained"]) == 0
    pretrained = capsys.readouterr().out
    assert "vit_tiny16_ijepa " in everything
    assert "vit_tiny16_ijepa " not in pretrained
    row = next(line for line in pretrained.splitlines() if "vit_huge14_ijepa.in1k " in line)
    for words in ("target_encoder", "630.", "224x224", "CC-BY-NC-4.0"):
        assert words in row


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99", ""])
def test_devices_that_are_not_there(
    photos: Path, weights: str, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    assert command(weights, str(photos), "--device", device) == USAGE
    assert "device" in capsys.readouterr().err


def test_inputs_are_never_written_over(
    photos: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = photos / "cat/0.png"
    before = image.read_bytes()
    overwrite = ["--out", str(image), "--format", "npy", "--overwrite"]
    for arguments in (overwrite, ["--picture", str(image)]):
        assert command(weights, str(photos), *arguments) == USAGE
        assert "input" in capsys.readouterr().err
    assert image.read_bytes() == before


@pytest.mark.parametrize("picture", ["a.xyz", "a", "absent/a.png"])
def test_pictures_are_checked_before_the_work(photos: Path, weights: str, picture: str) -> None:
    assert command(weights, str(photos), "--picture", picture) == USAGE
    assert not Path("f.npy").exists()


def test_more_pictures_than_images(photos: Path, weights: str) -> None:
    many = ["--picture", "a.png", "--picture-images", str(10**9)]
    assert command(weights, str(photos), *many) == DONE


def test_names_beyond_the_encoding_of_the_terminal(photos: Path, weights: str) -> None:
    root = Path(cli.__file__).parents[2]
    arguments = ["features", "photos", "--model", "vit_nano8_64_ijepa", "--checkpoint", weights]
    arguments += ["--device", "cpu", "--workers", "0", "--out", os.fsdecode(b"f\xff.npy")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "ijepa_zoo.cli", *arguments], env=environment, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"written   f\udcff.npy" in done.stdout
