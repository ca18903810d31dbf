"""examples/small_data: the study's words and tables, and MAE beside it."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ijepa_zoo.data import open_images
from ijepa_zoo.metrics import knn_accuracy, linear_accuracy, rankme, spread
from ijepa_zoo.train import Trainer, load_config
from ijepa_zoo.train.networks import build_networks

EXAMPLE = Path(__file__).parent.parent / "examples" / "small_data"
RECIPE = "vith14_in1k"
WIDTH, DEPTH, NARROW, SHALLOW, PATCH, SIDE = 32, 2, 16, 1, 4, 24
PATCHES = (SIDE // PATCH) ** 2
TINY = [
    "model.name=vit_nano8_64_ijepa", f"model.embed_dim={WIDTH}", f"model.depth={DEPTH}",
    "model.num_heads=2", f"model.predictor_embed_dim={NARROW}",
    f"model.predictor_depth={SHALLOW}", "optim.batch_size=8", "mask.group_size=8",
    "optim.precision=fp32", "runtime.device=cpu", "runtime.workers=0", "runtime.threads=1",
    "optim.duration=20 steps", f"model.img_size={SIDE}", f"model.patch_size={PATCH}",
    "data.held_out=24", "mask.min_keep=1",
]  # fmt: skip


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import study

    return study


@pytest.fixture
def mae(study, monkeypatch):
    pytest.importorskip("transformers")
    import mae

    monkeypatch.setitem(study.SIZES, "cpu", TINY)
    monkeypatch.setattr(study, "SHARED", [])
    return mae


@pytest.fixture
def photos(tmp_path):
    """56 images of two classes: noise and darker noise, not easy to tell apart."""
    rng = np.random.default_rng(0)
    for name, brightest in (("bright", 256), ("dark", 250)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(28):
            pixels = rng.integers(0, brightest, (26, 26, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def start(mae, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["mae.py", *map(str, words)])
    mae.main()


def test_a_run_of_the_study_is_an_arm_of_the_published_recipe(study):
    config = load_config(RECIPE, study.overrides("cpu", "slow", 3, 80))
    assert (config.seed, config.optim.lr, config.data.held_out) == (3, 4e-4, 4000)
    assert (config.optim.duration, config.optim.warmup) == ("80 steps", "10 steps")
    assert (config.log.monitor_every, config.log.save_every) == (8, "20 steps")
    assert load_config(RECIPE, study.overrides("cpu", "slow", 3, None)).optim.duration == (
        "1000 steps"
    )


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_every_arm_has_known_settings_and_sees_as_many_images(study, size):
    optims = [load_config(RECIPE, study.overrides(size, arm, 0, None)).optim for arm in study.ARMS]
    assert len({(optim.batch_size, optim.duration) for optim in optims}) == 1


def test_table_has_means_over_seeds_and_the_best_arm_first(study):
    keys = ("linear", "knn", "rankme", "loss", "step (ms)")
    rows = [
        {"arm": "low", "seed": 0, **dict(zip(keys, (30, 20, 3, 0.5, 100)))},
        {"arm": "high", "seed": 0, **dict(zip(keys, (40, 30, 5, 0.25, 200)))},
        {"arm": "high", "seed": 1, **dict(zip(keys, (43, 33, 8, 0.75, 300)))},
    ]
    assert study.table(rows).splitlines()[2:] == [
        "| high | 2 | 41.5 (40.0-43.0) | 31.5 | 6.5 | 0.500 | 250 |",
        "| low | 1 | 30.0 | 20.0 | 3.0 | 0.500 | 100 |",
    ]


def test_correlations_are_those_of_ranks(study):
    names = ("linear", "early rankme", "early knn", "early linear", "rankme", "knn", "loss")
    values = np.random.default_rng(1).permuted(np.arange(56.0).reshape(7, 8) ** 2, axis=1)
    rows = [dict(zip(names, map(float, column))) for column in values.T]
    found = study.correlations(rows)
    for name, series in zip(names[1:], values[1:]):
        places, wanted = ([sorted(v).index(x) for x in v] for v in (series, values[0]))
        squares = sum((one - other) ** 2 for one, other in zip(places, wanted))
        assert found[name] == pytest.approx(1 - 6 * squares / (8 * (8**2 - 1)))  # Spearman's


def test_equal_values_share_their_rank(study):
    assert study.ranks([7.0, 3.0, 7.0, 9.0]).tolist() == [2, 0.5, 2, 3.5]


def test_runs_of_mae_join_the_table(study, photos, tmp_path, capsys):
    args = argparse.Namespace(data=[str(photos)], out=tmp_path, size="cpu", steps=80, set=[])
    row = dict(zip(study.COLUMNS, ("mae", 0, 41.0, 25.0, 9.0, 0.7, 80.0)))
    words = [*study.overrides("cpu", "published", 0, 100), "optim.lr=1e-3", "optim.start_lr=0"]
    about = {"settings": words, "data": open_images(args.data).fingerprint(), "images": 6400}
    others = {"settings": [*words, "model.patch_size=8"]}, {"data": "of another set"}, {}
    for number, other in enumerate(others):
        (tmp_path / f"mae-{number}").mkdir()
        text = json.dumps({**row, **about, **other})
        (tmp_path / f"mae-{number}" / "figures.json").write_text(text)
    (tmp_path / "mae-9").mkdir()  # not finished
    named = "mae, 6,400 images"
    assert study.mae_rows(args) == [{**row, "arm": named}]
    said = capsys.readouterr().out
    assert "mae-0/figures.json is left out (model.patch_size: 8 then, 4 now)" in said
    assert "mae-1/figures.json is left out (other images)" in said
    assert f"| {named} | 1 | 41.0 | 25.0 | 9.0 | 0.700 | 80 |" in study.table(study.mae_rows(args))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=5", "use --seeds"),
        ("optim.duration=5 epochs", "use --steps"),
        ("optim.lr=1e-3", "the arm slow sets it"),
        ("data.held_out=0", "images held out"),
    ],
)
def test_settings_of_all_arms_change_no_arm(study, photos, tmp_path, monkeypatch, word, message):
    with pytest.raises(ValueError, match=message):
        start(study, monkeypatch, "--data", photos, "--out", tmp_path, "--arms", "slow",
              "--set", word)  # fmt: skip
    words = study.overrides("cpu", "slow", 0, 80, ["optim.warmup=3 steps"])
    assert load_config(RECIPE, words).optim.warmup == "3 steps"


def test_figures_are_those_of_the_last_monitoring_of_a_finished_run(study, tmp_path):
    lines = ["time (ms),loss,knn,linear,rankme,spread"]
    for step in range(8):  # monitored every other time: 1, 3, 5, 7
        measured = f"{step + 10},{step + 20},{step + 30},{step + 40}" if step % 2 else ",,,"
        lines.append(f"{100 + step**2},{1 / (step + 1)},{measured}")
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    assert study.figures(tmp_path) is None
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    assert study.figures(tmp_path) == {
        "loss": 0.125, "knn": 17, "linear": 27, "rankme": 37, "spread": 47, "early rankme": 33,
        "early knn": 13, "early linear": 23, "step (ms)": 112.5,
    }  # fmt: skip


def test_mae_writes_figures_of_the_encoder_that_it_saves(mae, photos, tmp_path, monkeypatch):
    out = tmp_path / "runs"
    start(mae, monkeypatch, "--data", photos, "--out", out, "--seed", 5, "--steps", 12)
    found = json.loads((out / "mae-5" / "figures.json").read_text())
    assert (found["arm"], found["seed"], found["images"]) == ("mae", 5, 12 * 8)
    assert math.isfinite(found["loss"])
    assert found["step (ms)"] > 0
    encoder = timm.create_model(f"local-dir:{out / 'mae-5' / 'encoder'}", pretrained=True).eval()
    assert encoder.pretrained_cfg["mean"] == pytest.approx((0.485, 0.456, 0.406))
    config = load_config(RECIPE, mae.overrides("cpu", "published", 5, 12))
    monitor, _ = Trainer(config, open_images([photos])).monitor()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (monitor.mean, monitor.std))
    with torch.no_grad():
        tokens = encoder.forward_features((monitor.images / 255 - mean) / std)
    assert tokens.shape == (24, 1 + PATCHES, WIDTH)
    features = tokens[:, 1:].mean(dim=1)
    assert found["rankme"] == pytest.approx(rankme(features), rel=1e-3)
    assert found["spread"] == pytest.approx(spread(features), rel=1e-3)
    assert found["knn"] == pytest.approx(knn_accuracy(features, monitor.labels))
    assert found["linear"] == pytest.approx(linear_accuracy(features, monitor.labels))

    monkeypatch.setattr(mae, "train", None)  # a finished run is not repeated
    start(mae, monkeypatch, "--data", photos, "--out", out, "--seed", 5, "--steps", 12)
    with pytest.raises(ValueError, match="other settings"):
        start(mae, monkeypatch, "--data", photos, "--out", out, "--seed", 5, "--lr", 1)
    (photos / "dark" / "0.png").unlink()
    with pytest.raises(ValueError, match="other data"):
        start(mae, monkeypatch, "--data", photos, "--out", out, "--seed", 5, "--steps", 12)


def test_mae_sees_the_images_of_the_study_unless_its_own_crops_are_asked_for(
    mae, photos, monkeypatch
):
    def seen(words):
        trainer = Trainer(load_config(RECIPE, words), open_images([photos]))
        images = torch.cat([batch.images for batch in list(trainer.batches())[13]])
        return images, trainer.held_out

    class Args:
        size, seed, lr, mae_crops, set = "cpu", 2, 1e-3, False, ()

    ours, held_out = seen(mae.overrides("cpu", "published", 2, None))
    same, same_held_out = seen(mae.words_of(Args, None))
    assert torch.equal(ours, same)
    assert np.array_equal(held_out, same_held_out)
    Args.mae_crops = True
    assert not torch.equal(ours, seen(mae.words_of(Args, None))[0])


def test_mae_knows_where_patches_are(mae):
    model = mae.make_mae(build_networks(load_config(RECIPE, TINY)))
    images = torch.rand(1, 3, SIDE, SIDE)
    swapped = images.roll(PATCH, dims=-1)  # the same patches at other places
    model.config.mask_ratio = 0.0
    noise = torch.arange(float(PATCHES))[None]
    with torch.no_grad():
        class_tokens = [
            model.vit(pixels, noise=noise).last_hidden_state[:, 0] for pixels in (images, swapped)
        ]
    assert not torch.allclose(*class_tokens, atol=1e-3)
    positions = model.decoder.decoder_pos_embed[0, 1:]
    assert len(torch.unique(positions, dim=0)) == PATCHES


def test_operations_of_mae_are_those_of_the_formula(mae):
    ours = mae.operations(load_config(RECIPE, TINY))
    pixels, seen, whole = 3 * PATCH**2, 1 + PATCHES // 4, 1 + PATCHES

    def block(tokens, width):
        return 2 * tokens * 12 * width**2 + 4 * tokens**2 * width

    forward = DEPTH * block(seen, WIDTH) + SHALLOW * block(whole, NARROW)
    forward += 2 * seen * WIDTH * NARROW + 2 * whole * NARROW * pixels
    embedding = 2 * PATCHES * pixels * WIDTH  # whose input needs no gradient
    assert ours[0] == pytest.approx((3 * forward + 2 * embedding) / 1e9)
    assert ours[1] > ours[0]


def test_mae_gets_as_many_steps_more_as_its_steps_cost_less(mae, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(mae, "operations", lambda config: (1.0, 1.5))
    words = ("--data", photos, "--out", tmp_path, "--steps", 12, "--equal-compute")
    start(mae, monkeypatch, *words)
    found = json.loads((tmp_path / "mae_compute-0" / "figures.json").read_text())
    assert (found["arm"], found["images"]) == ("mae_compute", 18 * 8)


def test_mae_needs_classes(mae, photos, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="class folders"):
        start(mae, monkeypatch, "--data", photos / "dark", "--out", tmp_path, "--steps", 12)
