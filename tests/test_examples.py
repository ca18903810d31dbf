"""Every example runs as its docstring says, on small input, and draws what it should."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(name: str, *args: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_extract_features(tmp_path: Path) -> None:
    out = run("extract_features.py", "examples/images", str(tmp_path / "f.safetensors"))
    assert "12 images" in out
    assert "four patches [1, 4, 128]" in out
    assert load_file(tmp_path / "f.safetensors")["features"].shape == (12, 512)


def test_finetune_timm_learns() -> None:
    out = run("finetune_timm.py", "--steps", "40", "--scenes", "256")
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]
    assert "unseen scenes" in out


def test_pca_maps(tmp_path: Path) -> None:
    out = run("pca_maps.py", "examples/images/scenes", str(tmp_path / "maps.png"))
    assert "8 maps of 16x16 patches" in out
    assert colors(tmp_path / "maps.png") > 1000


def test_retrieve(tmp_path: Path) -> None:
    out = run("retrieve.py", "--gallery", "60", "--out", str(tmp_path / "r.png"))
    assert "gallery of 60" in out
    assert Image.open(tmp_path / "r.png").size == (6 * 134 + 18, 6 * 134)


def test_predict_region(tmp_path: Path) -> None:
    out = run("predict_region.py", "examples/images/scenes", str(tmp_path / "p.png"))
    inside = float(out.split(":")[1].split()[0])
    assert inside > 0.1  # an untrained predictor gives about 0
    assert colors(tmp_path / "p.png") > 1000


def test_attention_maps(tmp_path: Path) -> None:
    out = run(
        "attention_maps.py", "examples/images/photos", str(tmp_path / "a.png"), "--images", "2"
    )
    assert Image.open(tmp_path / "a.png").height == 2 * 200 - 8
    peak = float(out.split("patch has ")[1].split()[0])
    assert peak > 4  # uniform attention gives 1
    assert colors(tmp_path / "a.png") > 1000


def test_lora_trains_an_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = run("lora.py", "--steps", "12", "--scenes", "64", "--out", str(tmp_path / "adapter"))
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key.split(".")[-2] for key in adapter} == {"lora_A", "lora_B", "head"}


def test_detection() -> None:
    out = run("detection.py", "--steps", "8", "--scenes", "8", "--size", "64")
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.8 * losses[0]
    assert "unseen scenes" in out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 100


def colors(path: Path) -> int:
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return len(np.unique(pixels, axis=0))
