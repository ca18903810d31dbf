import sys

import numpy as np
import pytest
from PIL import Image
from small_run import CONFIG

from ijepa_zoo.errors import MissingPackageError, SettingsError
from ijepa_zoo.train import describe_config, plot_run
from ijepa_zoo.train.logger import RunLogger

pytest.importorskip("matplotlib")


def write_run(run, steps, monitors=True):
    run.mkdir()
    (run / "config.yaml").write_text(describe_config(CONFIG))
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
    """Whether each of the nine panels has a colored line, and whether the masks are colored."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    colored = (pixels.max(2) - pixels.min(2)) > 60
    height, width = colored.shape
    panels = [
        bool(panel[:, : int(width / 3 * 0.97)].sum() > 20)
        for line in np.array_split(colored[: int(0.77 * height)], 3)
        for panel in np.array_split(line, 3, axis=1)
    ]
    return [*panels, bool(colored[int(0.8 * height) :].sum() > 1000)]


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # of matplotlib's own
def test_what_was_logged_is_plotted(tmp_path):
    picture = plot_run(write_run(tmp_path / "whole", 20))
    assert picture == tmp_path / "whole" / "plot.png"
    assert plotted(picture) == [*(True, True, True, False, True, True, True, False, True), True]
    begun = write_run(tmp_path / "new", 1, monitors=False)
    picture = plot_run(begun, tmp_path / "picture.png")
    assert picture == tmp_path / "picture.png"
    assert [i for i, shown in enumerate(plotted(picture)) if shown] == [0, 5, 8, 9]


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=r"log\.csv"):
        plot_run(write_run(tmp_path / "empty", 0))
    run = write_run(tmp_path / "run", 1)
    for out in ("plot.jpg", "run", "none/plot.png"):
        with pytest.raises(SettingsError, match=out):
            plot_run(run, tmp_path / out)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="pip install matplotlib"):
        plot_run(run)
