import json
import sys

import numpy as np
import pytest
from PIL import Image

from ijepa_zoo.errors import RunError
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.train.config import (
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    dump_config,
)
from ijepa_zoo.train.logger import RunLog
from ijepa_zoo.train.plot import _coverage, _group, _masks, _picture, plot_run

CONFIG = PretrainConfig(
    model=ModelConfig(name="vit_nano8_64_ijepa"),
    optim=OptimConfig(batch_size=8, warmup="1 steps"),
    mask=MaskConfig(group_size=4, min_keep=4),
)


def write_run(run, steps, monitors=True):
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(CONFIG))
    with RunLog(run, 0) as log:
        if monitors:
            log.event(0, "initial", json.dumps({"rankme": 3.0, "spread": 0.2, "knn": 18.0}))
        for step in range(steps):
            figures = {"rankme": 3.0 + step, "spread": 0.3, "knn": 20.0, "grad_encoder": 0.1}
            log.write(
                {"step": step, "epoch": 1, "itr": step, "loss": 1 / (step + 1), "lr": 1e-3}
                | {"momentum": 0.99, "images_per_second": 50.0, "context_tokens": 30}
                | (figures if monitors and step % 5 == 0 else {})
            )
    return run


def drawn(path):
    """Bounds of nine curve panels, and whether each holds a coloured line."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    coloured = (pixels.max(2) - pixels.min(2)) > 60
    height, width = coloured.shape
    top = coloured[: int(0.77 * height)]
    return [
        panel[:, : int(width / 3 * 0.97)].sum() > 20
        for line in np.array_split(top, 3)
        for panel in np.array_split(line, 3, axis=1)
    ]


@pytest.fixture(autouse=True)
def matplotlib():
    pytest.importorskip("matplotlib")


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # of matplotlib's own
def test_a_run_is_drawn(tmp_path):
    picture = plot_run(write_run(tmp_path / "whole", 100))
    assert picture == tmp_path / "whole" / "plot.png"
    assert drawn(picture)[:6] == [True] * 6
    assert not drawn(picture)[6]  # no EMA distance was logged


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # of matplotlib's own
def test_a_run_that_has_just_begun_is_drawn(tmp_path):
    picture = plot_run(write_run(tmp_path / "new", 1, monitors=False), tmp_path / "picture.png")
    assert picture == tmp_path / "picture.png"
    shown = drawn(picture)
    assert shown[0]
    assert shown[4]
    assert not any(shown[i] for i in (1, 2, 3, 6))


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"has no config\.yaml"):
        plot_run(tmp_path)
    with pytest.raises(ValueError, match="no row in"):
        plot_run(write_run(tmp_path / "empty", 0))
    run = write_run(tmp_path / "run", 1)
    before = sorted(tmp_path.rglob("*"))
    for out, words in (
        ("plot", r"is no name of one: use .*plot\.png$"),
        ("plot.jpg", r"is no name of one: use .*plot\.png$"),
        ("run", r"is no name of one: use .*run/plot\.png$"),
        ("none/plot.png", "there is no folder .*none for plot.png: make it first"),
    ):
        with pytest.raises(ValueError, match=words):
            plot_run(run, tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before
    log = run / "log.jsonl"
    for text in ('"rankme"', "[3]", "rankme"):
        entry = {"step": 0, "event": "initial", "text": text}
        log.write_text(json.dumps(entry) + "\n")
        with pytest.raises(RunError, match=r"log\.jsonl, line 1 is damaged"):
            plot_run(run)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_run(run)


def test_masks_are_those_of_the_run():
    assert _masks(CONFIG) == MultiBlockMasks(grid_size=(8, 8), min_keep=4)
    assert _group(CONFIG) == 4
    large = ModelConfig(img_size=448, patch_size=16)
    assert _masks(PretrainConfig(model=large)).grid_size == (28, 28)
    assert _group(PretrainConfig(mask=MaskConfig(group_size="global"))) == 128


def test_coverage_counts_images():
    masks = _masks(CONFIG)
    seen, wanted = _coverage(masks, 4, seed=3)
    counts = np.zeros((2, 64))
    for step in range(200):
        context, targets = masks.sample(4, seed=3, step=step)
        for image in range(4):
            for patch in set(context[image].tolist()):
                counts[0, patch] += 1
            for patch in set(targets[image].flatten().tolist()):
                counts[1, patch] += 1
    np.testing.assert_allclose([seen.ravel(), wanted.ravel()], counts / 800)
    assert wanted[-1].max() == 0  # the published sampler never uses the last row


def test_picture_of_a_mask():
    pixels = _picture((2, 3), np.array([0]), np.array([[1, 2], [2, 5]])).reshape(6, 3)
    np.testing.assert_array_equal(pixels[0], 1)
    np.testing.assert_array_equal(pixels[3], pixels[4])
    np.testing.assert_allclose(pixels[2], (pixels[1] + pixels[5]) / 2)
    assert len({tuple(p) for p in pixels}) == 5
