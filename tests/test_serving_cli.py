"""`ijepa-zoo export` for servers, and the example that serves what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_serving import needs_onnx

import ijepa_zoo
from ijepa_zoo.cli import main

ROOT = Path(__file__).parents[1]
NANO = "vit_nano8_64_ijepa"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@needs_onnx
def test_name_to_onnx_served_by_the_example(here, capfd):
    assert main(["export", NANO, "served", "--to", "onnx", "--layers", "last4"]) == 0
    out, err = capfd.readouterr()
    assert "served/model.onnx" in out
    assert "features float32 ['batch', 512]" in out
    assert not err
    record = json.loads(Path("served/serving.json").read_text())
    assert record["weights"] == f"target encoder of {NANO}.scenes"
    assert record["license"] == "apache-2.0"
    photos = sorted(map(str, (ROOT / "examples/images/photos").glob("*.jpg")))
    words = [str(ROOT / "examples" / "serve_onnx.py"), str(here / "served"), *photos]
    alone = "import runpy, sys; sys.modules.update(torch=None, timm=None, ijepa_zoo=None); "
    alone += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    said = f"{len(photos)} images -> features [{len(photos)}, 512]"
    for command in (["-c", alone, *words], [*words, "--compare", NANO]):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=100
        )
        assert said in done.stdout, done.stderr
    assert f"relative error to {NANO} in PyTorch" in done.stdout


def test_folder_to_torch_export_with_options(here, capsys):
    assert main(["convert", NANO, "folder", "--to", "native"]) == 0
    words = ["--dtype", "bfloat16", "--img-size", "32", "--license", "MIT", "--layers", "1,3"]
    assert main(["export", "folder", "served", "--to", "torch-export", *words]) == 0
    record = json.loads(Path("served/serving.json").read_text())
    assert record["precision"] == "bfloat16"
    assert record["license"] == "MIT"
    assert record["layers"] == [1, 3]
    assert record["input"]["shape"] == ["batch", 3, 32, 32]
    served = torch.export.load("served/model.pt2").module()
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    model = ijepa_zoo.create_model(NANO, img_size=32).eval()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    with torch.no_grad():
        wanted = ijepa_zoo.FeatureExtractor(model, [1, 3])((pixels / 255 - mean) / std)
        got = served(pixels)
    assert torch.cosine_similarity(got, wanted).min() > 0.999


def test_own_weights_by_checkpoint(here):
    model = ijepa_zoo.create_model(NANO, pretrained=False).eval()
    save_file(model.state_dict(), "own.safetensors")
    words = ["--checkpoint", "own.safetensors", "--to", "torch-export"]
    assert main(["export", NANO, "served", *words]) == 0
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    with torch.no_grad():
        wanted = model.encode((pixels / 255 - mean) / std).mean(1)
        got = torch.export.load("served/model.pt2").module()(pixels)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["vit_tiny16_ijepa", "out"], "convert vit_tiny16_ijepa"),
        (["vit_tiny16_ijepa", "--to", "onnx"], "export vit_tiny16_ijepa DST --to onnx"),
        (["run", "out", "--layers", "last4", "--img-size", "64"], "--layers, --img-size"),
        (["run", "out", "--to", "onnx", "--step", "5"], "--step 5"),
        (["run", "out", "--to", "onnx", "--dtype", "bfloat16"], "bfloat16"),
        (["run", "out", "--to", "torch-export", "--quantize", "int8"], "int8"),
        (["weights.pth", "out", "--to", "torch-export"], "--checkpoint weights.pth"),
        (["vit_tiny61", "out", "--to", "torch-export"], "'vit_tiny61'"),
        ([NANO, "out", "--to", "torch-export", "--layers", "9"], "9"),
    ],
)
def test_wrong_usage_names_the_value(here, capsys, words, named):
    Path("run").mkdir()
    Path("run/config.yaml").touch()
    Path("weights.pth").touch()
    assert main(["export", *words]) == 2
    assert named in capsys.readouterr().err
    assert not Path("out").exists()


def test_folder_that_is_not_a_run_and_folder_that_exists(here, capsys):
    assert main(["convert", NANO, "folder", "--to", "timm"]) == 0
    assert main(["export", "folder", "out"]) == 2
    assert "`ijepa-zoo export folder DST --to onnx`" in capsys.readouterr().err
    Path("empty").mkdir()
    assert main(["export", "empty", "out"]) == 1
    assert "config.yaml" in capsys.readouterr().err
    Path("out").mkdir()
    for command in (
        ["export", NANO, "out", "--to", "torch-export"],
        ["convert", NANO, "out", "--to", "timm"],
    ):
        assert main(command) == 1
        assert "out" in (err := capsys.readouterr().err)
        assert "--overwrite" in err


@pytest.mark.parametrize("to", [pytest.param("onnx", marks=needs_onnx), "torch-export"])
def test_file_that_may_not_grow_is_an_error_with_the_folders_name(here, to):
    code = "import resource as r, sys; r.setrlimit(r.RLIMIT_FSIZE, (1_000_000, 1_000_000)); "
    code += "from ijepa_zoo.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "export", NANO, "served", "--to", to, "--quiet"]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "served" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(here.iterdir())
