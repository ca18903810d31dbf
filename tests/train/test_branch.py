"""A run continued in another folder, with its optimizer and step."""

import numpy as np
import pytest
from small_run import CONFIG, change, pictures, rows, same_state, stop_after, train

from ijepa_zoo.cli import main
from ijepa_zoo.errors import CheckpointError, SettingsError
from ijepa_zoo.train.optim import Schedule

LONGER = change(CONFIG, optim={"duration": "11 steps", "lr": 5e-4})


def test_branch_keeps_optimizer_and_step(tmp_path, monkeypatch, whole):
    branch, source = tmp_path / "branch", tmp_path / "source"
    stop_after(monkeypatch, 5, source)
    stop_after(monkeypatch, 2, branch, init=source, resume_optimizer=4)
    source.rename(tmp_path / "gone")
    train(branch, init=source, resume_optimizer=4)  # resumes from its own checkpoint
    assert same_state(branch, whole)
    assert rows(branch) == rows(whole)[4:]


def test_longer_branch_on_the_command_line(tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", pictures())
    words = ["pretrain", "--config", str(whole / "config.yaml"), "--data", "images.npy", "--quiet"]
    words += ["--init", f"local-dir:{whole}", "--resume-optimizer", "--out", "longer"]
    assert main(words) != 0  # no step is left
    assert main([*words, "optim.lr=5e-4", "optim.duration=11 steps"]) == 0
    lr = [float(row["lr"]) for row in rows(tmp_path / "longer")]
    schedule = Schedule.of(LONGER.optim, 32)
    assert lr == pytest.approx([schedule.rates(step)["lr"] for step in (9, 10)])


@pytest.mark.parametrize(
    ("config", "changes", "error", "named"),
    [
        (change(LONGER, model={"predictor_embed_dim": 24}), {}, CheckpointError, "predictor"),
        (LONGER, {"resume_optimizer": 7}, CheckpointError, "no checkpoint of step 7"),
        (CONFIG, {}, SettingsError, r"optim\.duration=9 steps"),
        (LONGER, {"init": None}, SettingsError, "--init RUN"),
        (LONGER, {"init": "none"}, CheckpointError, "none has no checkpoints"),
    ],
)
def test_branches_that_do_not_fit_are_refused(tmp_path, whole, config, changes, error, named):
    options = {"init": whole, "resume_optimizer": "latest", **changes}
    with pytest.raises(error, match=named):
        train(tmp_path, config, **options)
