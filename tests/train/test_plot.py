import sys

import numpy as np
import pytest
from PIL import Image

from ijepa_zoo.errors import MissingPackageError, RunError
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.train.config import MaskConfig, ModelConfig, OptimConfig, PretrainConfig, dump_config
from ijepa_zoo.train.logger import RunLogger
from ijepa_zoo.train.plot import _coverage, _masks, _picture, plot_run

pytest.importorskip("matplotlib")
CONFIG = PretrainConfig(
    model=ModelConfig(name="vit_nano8_64_ijepa"),
    optim=OptimConfig(batch_size=8, warmup="1 steps"),
    mask=MaskConfig(group_size=4, min_keep=4),
)


def write_run(run, steps, monitors=True):
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(CONFIG))
    with RunLogger(run, 0, CONFIG) as log:
        if monitors:
            log.initial({"rankme": 3.0, "spread": 0.2, "knn": 18.0})
        for step in range(steps):
            metrics = {"rankme": 3.0 + step, "spread": 0.3, "knn": 20.0, "grad_encoder": 0.1}
            log.write(
                {"step": step, "epoch": 1, "itr": step, "loss": 1 / (step + 1), "lr": 1e-3}
                | {"momentum": 0.99, "images_per_second": 50.0, "mask-A": 30}
                | (metrics if monitors and step % 5 == 0 else {})
            )
    return run


def plotted(path):
    """Whether each of the nine panels has a colored line."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    colored = (pixels.max(2) - pixels.min(2)) > 60
    height, width = colored.shape
    return [
        bool(panel[:, : int(width / 3 * 0.97)].sum() > 20)
        for line in np.array_split(colored[: int(0.77 * height)], 3)
        for panel in np.array_split(line, 3, axis=1)
    ]


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # of matplotlib's own
def test_what_was_logged_is_plotted(tmp_path):
    picture = plot_run(write_run(tmp_path / "whole", 100))
    assert picture == tmp_path / "whole" / "plot.png"
    assert plotted(picture) == [True, True, True, False, True, True, True, False, True]
    begun = write_run(tmp_path / "new", 1, monitors=False)
    picture = plot_run(begun, tmp_path / "picture.png")
    assert picture == tmp_path / "picture.png"
    assert [i for i, shown in enumerate(plotted(picture)) if shown] == [0, 5, 8]


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"config\.yaml"):
        plot_run(tmp_path)
    with pytest.raises(ValueError, match=r"log\.csv"):
        plot_run(write_run(tmp_path / "empty", 0))
    run = write_run(tmp_path / "run", 1)
    before = sorted(tmp_path.rglob("*"))
    for out in ("plot", "plot.jpg", "run", "none/plot.png"):
        with pytest.raises(ValueError, match=f"{out} is not"):
            plot_run(run, tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before
    (run / "events.jsonl").write_text('{"step": 0, "kind": "initial", "metrics": [3]}\n')
    with pytest.raises(RunError, match=r"events\.jsonl, line 1"):
        plot_run(run)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="pip install matplotlib"):
        plot_run(run)


def test_masks_are_those_of_the_run():
    assert _masks(CONFIG) == MultiBlockMasks(grid_size=(8, 8), min_keep=4)
    large = ModelConfig(img_size=448, patch_size=16)
    assert _masks(PretrainConfig(model=large)).grid_size == (28, 28)


def test_coverage_counts_images():
    masks = _masks(CONFIG)
    found = _coverage(masks, 4, seed=3)
    counts = np.zeros((2, 64))
    for step in range(200):
        context, targets = masks.sample(4, seed=3, step=step)
        for image in range(4):
            counts[0, context[image].unique()] += 1
            counts[1, targets[image].unique()] += 1
    np.testing.assert_allclose([share.ravel() for share in found], counts / 800)
    assert found[1][-1].max() == 0  # the published sampler never uses the last row


def test_picture_of_a_mask():
    pixels = _picture((2, 3), np.array([0]), np.array([[1, 2], [2, 5]])).reshape(6, 3)
    np.testing.assert_array_equal(pixels[0], 1)
    np.testing.assert_array_equal(pixels[3], pixels[4])
    np.testing.assert_allclose(pixels[2], (pixels[1] + pixels[5]) / 2)
    assert len({tuple(p) for p in pixels}) == 5
