"""`ijepa-zoo pretrain` and `plot`, and what follows a run."""

import signal
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from small_run import CONFIG, change, pictures

from ijepa_zoo.cli import main
from ijepa_zoo.train import Interrupted, describe_config, load_config
from ijepa_zoo.train.config import parse_config

SHORT = change(CONFIG, optim={"duration": "2 steps", "warmup": "1 steps"})
RUN = ["pretrain", "--config", "own.yaml", "--data", "images.npy", "--out", "run"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", pictures())
    (tmp_path / "own.yaml").write_text(describe_config(SHORT))
    return tmp_path


def test_pretrain_plot_export_features(folder, capsys):
    words = ["--config", "own.yaml", "optim.lr=5e-4", "--out", "run", "--data", "images.npy"]
    assert main(["pretrain", *words, "mask.num_targets=3"]) == 0
    out = capsys.readouterr().out
    assert "local-dir:run" in out
    assert "lr: 0.0005" in (folder / "run" / "config.yaml").read_text()
    assert "num_targets: 3" in (folder / "run" / "config.yaml").read_text()
    assert main(["plot", "run"]) == 0
    assert Image.open("run/plot.png").width > 1000
    again = [*words, "mask.num_targets=3", "optim.duration=3 steps", "--out", "longer"]
    assert main(["pretrain", *again, "--init", "run", "--resume-optimizer"]) == 0
    Image.fromarray(pictures(1)[0]).save("picture.png")
    command = ["features", "picture.png", "--model", "local-dir:run", "--out", "f.npy"]
    assert main([*command, "--workers", "0"]) == 0
    assert np.load("f.npy").shape == (1, 24)
    assert main(["export", "run", "exported", "--dtype", "float16", "--license", "MIT"]) == 0
    assert main(["export", "exported", "official", "--to", "official"]) == 0
    capsys.readouterr()
    assert main(["export", "run", "exported"]) == 1
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_stopped_runs_have_their_own_exit_status(folder, monkeypatch, capsys, number, status):
    stopped = Interrupted("stopped after step 7", number)
    monkeypatch.setattr("ijepa_zoo.cli.pretrain.pretrain", Mock(side_effect=stopped))
    assert main(RUN) == status
    assert "step 7" in capsys.readouterr().err


def test_recipes_and_settings_are_listed(capsys):
    assert main(["pretrain", "--recipes"]) == 0
    assert "vith14_in1k " in capsys.readouterr().out
    assert main(["pretrain", "vith14_in1k", "optim.lr=5e-4", "--settings"]) == 0
    printed = parse_config(capsys.readouterr().out, "stdout")
    assert printed == load_config("vith14_in1k", ["optim.lr=5e-4"])


def test_released_weights_choose_the_model(folder, monkeypatch):
    monkeypatch.setattr("ijepa_zoo.cli.pretrain.dry_run", dry_run := Mock())
    words = ["--data", "images.npy", "--dry-run", "--init", "vit_huge14_ijepa.in1k"]
    assert main(["pretrain", "custom_small", *words]) == 0
    assert dry_run.call_args.args[0].model.name == "vit_huge14_ijepa"


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        ([], 2, "--recipes"),
        (["custom_small", "vith14_in1k"], 2, "custom_small, vith14_in1k"),
        (["--config", "own.yaml", "mask.target_scale=1,1", "--data", "images.npy", "--out", "r"], 2,
         "target_scale"),
        (["custom_small", "--data", "images.npy"], 2, "--out"),
        (["custom_small", "--data", "images.npy", "--out", "run", "data.held_out=4"], 2,
         "optim.batch_size"),
        (["custom_small", "--data", ".", "--out", "run"], 2, "inside its images"),
        (["custom_small", "--data", ".", "--out", "."], 2, "inside its images"),
        (["custom_small", "--data", "images.npy", "--out", "run", "--resume-optimizer",
          "data.held_out=4"], 2, "--init RUN"),
        (["--config", "absent.yaml", "--data", "images.npy", "--out", "r"], None, "absent.yaml"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(folder, capsys, words, status, named):
    assert main(["pretrain", *words]) in ((1, 2) if status is None else (status,))
    err = capsys.readouterr().err
    assert err.startswith("ijepa-zoo: error: ")
    assert named in err
