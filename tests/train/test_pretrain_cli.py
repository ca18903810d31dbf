"""`ijepa-zoo pretrain` and `plot`, and what follows a run."""

import signal

import numpy as np
import pytest
from PIL import Image
from small_run import CONFIG, change, pictures

from ijepa_zoo.cli import main
from ijepa_zoo.train import Interrupted
from ijepa_zoo.train.config import dump_config, load_config, parse_config

SHORT = change(CONFIG, optim={"duration": "2 steps", "warmup": "1 steps"})
RUN = ["pretrain", "--config", "own.yaml", "--data", "images.npy", "--out", "run"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", pictures())
    (tmp_path / "own.yaml").write_text(dump_config(SHORT))
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
    Image.fromarray(pictures(1)[0]).save("picture.png")
    command = ["features", "picture.png", "--model", "local-dir:run", "--out", "f.npy"]
    assert main([*command, "--workers", "0"]) == 0
    assert np.load("f.npy").shape == (1, 24)
    assert main(["export", "run", "exported", "--dtype", "float16", "--license", "MIT"]) == 0
    assert main(["export", "exported", "official", "--to", "official"]) == 0
    capsys.readouterr()
    assert main(["export", "run", "exported"]) == 1
    assert "exported" in (err := capsys.readouterr().err)
    assert "--overwrite" in err


def test_dry_run_leaves_nothing(folder, capsys):
    before = sorted(folder.rglob("*"))
    assert main(["pretrain", "--config", "own.yaml", "--data", "images.npy", "--dry-run"]) == 0
    assert "images/s" in capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_stopped_runs_have_their_own_exit_status(folder, monkeypatch, capsys, number, status):
    def stop(*args, **kwargs):
        raise Interrupted("stopped after step 7", number)

    monkeypatch.setattr("ijepa_zoo.cli.pretrain.pretrain", stop)
    assert main(RUN) == status
    assert "step 7" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("1", False)])
def test_the_first_process_prints(folder, monkeypatch, capsys, rank, prints):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr("ijepa_zoo.cli.pretrain.pretrain", lambda *args, **kwargs: "run/export")
    assert main(RUN) == 0
    assert ("run/export" in capsys.readouterr().out) == prints


def test_recipes_and_settings_are_listed(capsys):
    assert main(["pretrain", "--recipes"]) == 0
    assert "vith14_in1k " in capsys.readouterr().out
    assert main(["pretrain", "vith14_in1k", "optim.lr=5e-4", "--settings"]) == 0
    printed = parse_config(capsys.readouterr().out, "stdout")
    assert printed == load_config("vith14_in1k", ["optim.lr=5e-4"])


def test_released_weights_choose_the_model(folder, monkeypatch):
    calls = []
    monkeypatch.setattr("ijepa_zoo.cli.pretrain.dry_run", lambda *args, **kw: calls.append(args))
    words = ["--data", "images.npy", "--dry-run", "--init", "vit_huge14_ijepa.in1k"]
    assert main(["pretrain", "custom_small", *words]) == 0
    ((config, _),) = calls
    assert config.model.name == "vit_huge14_ijepa"


def test_file_of_the_official_repository_brings_its_folders(folder, capsys):
    text = (
        "data: {batch_size: 4, color_jitter_strength: 0.0, crop_scale: [0.3, 1.0], crop_size: 32,"
        " image_folder: pictures, num_workers: 0, pin_mem: true, root_path: ROOT,"
        " use_color_distortion: false, use_gaussian_blur: false, use_horizontal_flip: false}\n"
        "logging: {folder: official_run, write_tag: jepa}\n"
        "mask: {allow_overlap: false, aspect_ratio: [0.75, 1.5], enc_mask_scale: [0.85, 1.0],"
        " min_keep: 0, num_enc_masks: 1, num_pred_masks: 4, patch_size: 8,"
        " pred_mask_scale: [0.15, 0.2]}\n"
        "meta: {copy_data: false, load_checkpoint: false, model_name: vit_tiny, pred_depth: 1,"
        " pred_emb_dim: 24, read_checkpoint: null, use_bfloat16: false}\n"
        "optimization: {ema: [0.996, 1.0], epochs: 2, final_lr: 1.0e-06,"
        " final_weight_decay: 0.4, ipe_scale: 1.0, lr: 0.001, start_lr: 0.0002, warmup: 1,"
        " weight_decay: 0.04}\n"
    )
    (folder / "theirs.yaml").write_text(text)
    small = ["model.embed_dim=24", "model.depth=1", "data.held_out=4", "runtime.device=cpu"]
    command = ["pretrain", "--config", "theirs.yaml", *small, "--quiet", "runtime.workers=0"]
    assert main(command) == 1
    assert "ROOT/pictures/train" in capsys.readouterr().err
    (folder / "theirs.yaml").write_text(text.replace("ROOT", "$ROOT"))
    assert main(command) == 2
    assert "--data" in (err := capsys.readouterr().err)
    assert "$ROOT" in err
    (folder / "theirs.yaml").write_text(text.replace("ROOT", str(folder)))
    (folder / "pictures" / "train" / "cat").mkdir(parents=True)
    for i, picture in enumerate(pictures(16)):
        Image.fromarray(picture).save(folder / "pictures" / "train" / "cat" / f"{i}.png")
    assert main(command) == 0
    assert (folder / "official_run" / "export" / "config.json").exists()
    lines = (folder / "official_run" / "log.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,itr,loss,mask-A,mask-B,time (ms)")


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        ([], 2, "--recipes"),
        (["custom_small", "vith14_in1k"], 2, "custom_small, vith14_in1k"),
        (["custom_small"], 2, "--data"),
        (["--config", "own.yaml", "mask.target_scale=1,1", "--data", "images.npy", "--out", "r"], 2,
         "mask.target_scale"),
        (["custom_small", "--data", "images.npy"], 2, "--out"),
        (["custom_small", "--data", "absent", "--out", "run"], 1, "'absent'"),
        (["custom_small", "--data", "images.npy", "--out", "run", "data.held_out=4"], 2,
         "optim.batch_size"),
        (["--config", "absent.yaml", "--data", "images.npy", "--out", "r"], None, "absent.yaml"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(folder, capsys, words, status, named):
    assert main(["pretrain", *words]) in ((1, 2) if status is None else (status,))
    err = capsys.readouterr().err
    assert err.startswith("ijepa-zoo: error: ")
    assert named in err


@pytest.mark.parametrize("words", [["--bogus", "1"], ["--resume-from", "first"]])
def test_wrong_options_are_named(folder, capsys, words):
    with pytest.raises(SystemExit, match="2"):
        main(["pretrain", "custom_small", *words])
    assert words[0] in capsys.readouterr().err
