"""`ijepa-zoo export`: every source to every format, and the example that serves an ONNX file."""

import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_run import CONFIG, after_updates, pictures
from test_deploy import features, needs_onnx, run

import ijepa_zoo
from ijepa_zoo.cli import main
from ijepa_zoo.train import Interrupted, pretrain

ROOT = Path(__file__).parents[1]
NANO = "vit_nano8_64_ijepa"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after 6 steps, with checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        after_updates(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            pretrain(CONFIG, pictures(), folder, progress=False)
    return str(folder)


def bias(name):
    return ijepa_zoo.create_model(name).norm.bias


def about(folder):
    return json.loads(Path(folder, "serving.json").read_text())


def test_released_weights_to_the_formats_of_weights(here, capsys, monkeypatch):
    wanted = bias(NANO).half().float()
    for to in ("timm", "transformers", "native"):
        assert main(["export", NANO, to, "--to", to, "--dtype", "float16"]) == 0
        assert torch.equal(bias(f"local-dir:{to}").float(), wanted)
    out = capsys.readouterr().out
    assert "native/model.safetensors" in out
    assert 'create_model("local-dir:native")' in out
    assert torch.equal(timm.create_model("local-dir:timm", pretrained=True).norm.bias, wanted)
    assert main(["export", NANO, "official", "--to", "official"]) == 0
    (file,) = Path("official").glob("*.pth.tar")
    assert main(["export", str(file), "again", "--model", NANO]) == 0
    assert torch.equal(bias("local-dir:again"), bias(NANO))


def test_any_step_of_a_run(here, stopped, capsys):
    assert main(["export", stopped]) == 0
    newest = bias(f"local-dir:{stopped}/export")
    assert main(["export", stopped]) == 1
    assert "--overwrite" in capsys.readouterr().err
    words = ["--step", "4", "--network", "encoder"]
    for to in ("native", "timm", "torch-export"):
        assert main(["export", stopped, to, "--to", to, *words]) == 0
    wanted = ijepa_zoo.create_model("local-dir:native", network="encoder").eval()
    assert not torch.equal(wanted.norm.bias, newest)
    assert torch.equal(bias("local-dir:timm"), wanted.norm.bias)
    pixels = torch.from_numpy(pictures(1)).permute(0, 3, 1, 2)
    images = ijepa_zoo.create_transform(wanted)(pictures(1)[0])[None]
    with torch.no_grad():
        torch.testing.assert_close(run(Path("torch-export"), pixels), wanted.encode(images).mean(1))
    assert "after 4 steps" in about("torch-export")["weights"]


@pytest.fixture
def own(here):
    """Weights of a smaller encoder, in a file that does not say so."""
    small = {"embed_dim": 64, "depth": 2}
    model = ijepa_zoo.create_model(NANO, pretrained=False, **small).eval()
    save_file(model.state_dict(), "own.safetensors")
    return ["export", str(here / "own.safetensors"), "served"], model


@needs_onnx
def test_onnx_served_by_the_example(here, own, capfd, monkeypatch):
    words, model = own
    words += ["--model", NANO, "--embed-dim", "64", "--depth", "2", "--to", "onnx", "--quiet"]
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert "features float32 ['batch', 64]" in out
    assert not err
    assert about("served")["weights"] == "own.safetensors"
    photos = sorted(map(str, (ROOT / "examples/images/photos").glob("*.jpg")))
    script = str(ROOT / "examples" / "serve_onnx.py")
    alone = "import runpy, sys; sys.modules.update(torch=None, timm=None, ijepa_zoo=None); "
    alone += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", alone, script, str(here / "served"), *photos]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert f"features [{len(photos)}, 64]" in done.stdout, done.stderr
    ijepa_zoo.export(model, "model", to="native")
    monkeypatch.setattr(sys, "argv", [script, "served", *photos, "--compare", "local-dir:model"])
    runpy.run_path(script, run_name="__main__")
    assert "relative error to local-dir:model in PyTorch" in capfd.readouterr().out


def test_own_file_to_torch_export_with_options(own, capsys):
    words, model = own
    words += ["--to", "torch-export"]
    assert main(words) == 2
    assert "--model" in capsys.readouterr().err
    words += ["--model", NANO, "--embed-dim", "64", "--depth", "2", "--license", "MIT"]
    assert main([*words, "--layers", "0,1", "--pool", "none", "--quiet"]) == 0
    made = about("served")
    assert (made["precision"], made["license"], made["layers"]) == ("float32", "MIT", [0, 1])
    pixels = torch.from_numpy(pictures(1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(run(Path("served"), pixels), features(model, pixels, [0, 1], None))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["vit_tiny16_ijepa", "--to", "onnx"], "DST"),
        (["run", "--to", "timm"], "DST"),
        (["run", "out", "--layers", "last4", "--dynamic-size"], "--layers, --dynamic-size"),
        (["run", "out", "--model", NANO], "--model"),
        ([NANO, "out", "--step", "5"], "--step"),
        (["vit_tiny61", "out", "--to", "torch-export"], "'vit_tiny61'"),
        ([NANO, "out", "--to", "torch-export", "--layers", "9"], "9"),
    ],
)
def test_wrong_usage_names_the_value(here, capsys, words, named):
    Path("run").mkdir()
    Path("run/config.yaml").touch()
    assert main(["export", *words]) == 2
    assert named in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("to", ["timm", "torch-export"])
def test_existing_folder_is_refused_before_the_source_is_read(here, capsys, to):
    Path("out").mkdir()
    assert main(["export", "hf-hub:nobody/absent", "out", "--to", to]) == 1
    assert "--overwrite" in capsys.readouterr().err
