"""Every example runs as its docstring says, on small input, and draws what it should."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from timm.layers import set_fused_attn

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(script, *arguments)` returns what an example prints."""
    monkeypatch.chdir(ROOT)

    def script(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield script
    set_fused_attn(True)  # attention_maps.py turns it off for the process


def losses(out: str) -> list[float]:
    return [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step")]


def colors(path: Path) -> int:
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return len(np.unique(pixels, axis=0))


def test_extract_features(run, tmp_path) -> None:
    out = run("extract_features.py", "examples/images", tmp_path / "f.safetensors")
    assert "12 images" in out
    assert "four patches [1, 4, 128]" in out
    assert load_file(tmp_path / "f.safetensors")["features"].shape == (12, 512)


@pytest.mark.parametrize("lora", [False, True])
def test_finetune_timm_learns(run, tmp_path, lora) -> None:
    options = ["--steps", "12", "--scenes", "32", "--batch-size", "16"]
    if lora:
        pytest.importorskip("peft")
        try:
            import torchao.quantization  # noqa: F401 - peft imports it if it is installed
        except ImportError as error:
            pytest.skip(f"torchao does not fit this torch: {error}")
        options += ["--lora", tmp_path / "adapter"]
    out = run("finetune_timm.py", *options)
    assert losses(out)[-1] < losses(out)[0]
    assert "64 unseen scenes" in out
    if lora:
        adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert {key.split(".")[-2] for key in adapter} == {"lora_A", "lora_B", "head"}


def test_pca_maps(run, tmp_path) -> None:
    out = run("pca_maps.py", "examples/images/scenes", tmp_path / "maps.png")
    assert "8 maps of 16x16 patches" in out
    assert colors(tmp_path / "maps.png") > 1000


def test_retrieve(run, tmp_path) -> None:
    assert "gallery of 60" in run("retrieve.py", "--gallery", 60, "--out", tmp_path / "r.png")
    assert Image.open(tmp_path / "r.png").size == (6 * 134 + 18, 6 * 134)


def test_predict_region(run, tmp_path) -> None:
    out = run("predict_region.py", "examples/images/scenes", tmp_path / "p.png")
    assert float(out.split(":")[1].split()[0]) > 0.1  # an untrained predictor gives about 0
    assert colors(tmp_path / "p.png") > 1000


def test_attention_maps(run, tmp_path) -> None:
    out = run("attention_maps.py", "examples/images/photos", tmp_path / "a.png", "--images", 2)
    assert Image.open(tmp_path / "a.png").height == 2 * 200 - 8
    assert float(out.split("patch has ")[1].split()[0]) > 4  # uniform attention gives 1
    assert colors(tmp_path / "a.png") > 1000


def test_detection(run) -> None:
    out = run("detection.py", "--steps", 6, "--scenes", 8, "--size", 64)
    assert losses(out)[-1] < 0.8 * losses(out)[0]
    assert "unseen scenes" in out


def test_quickstart(monkeypatch) -> None:
    """The notebook runs offline, and finds what its text says."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cells = json.loads(Path("quickstart.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    photos = range(4)  # the others are rendered scenes
    assert all((neighbor in photos) == (i in photos) for i, neighbor in enumerate(names["nearest"]))
    assert names["picture"].size == (400, 808)
    assert names["accuracy"] > names["most_frequent"] + 0.15
