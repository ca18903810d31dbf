"""Longer runs: in the same folder with a stated schedule, or in another one from a checkpoint."""

import shutil

import pytest
import torch
from small_run import CONFIG, change, pictures, rows, same_state, stop_after

import ijepa_zoo
from ijepa_zoo.cli import main
from ijepa_zoo.errors import CheckpointError, RunError, SettingsError
from ijepa_zoo.train import pretrain
from ijepa_zoo.train.folder import read_settings
from ijepa_zoo.train.optim import Schedule

IMAGES = pictures()
# schedules over twice the duration: the learning rate is high at the end
BEFORE = change(CONFIG, optim={"schedule_scale": 2.0})


def longer(extend, duration="13 steps", **optim):
    return change(BEFORE, optim={"duration": duration, "extend": extend, **optim})


def train(folder, config=BEFORE, **options):
    return pretrain(config, IMAGES, folder, progress=False, **options)


def stop(monkeypatch, updates, folder, config=BEFORE, **options):
    stop_after(monkeypatch, updates, folder, config, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(folder)
    return folder


def test_rates_of_extensions():
    def schedule(duration, extend=None, extended_from=()):
        optim = {"duration": duration, "extend": extend, "extended_from": extended_from}
        return Schedule.of(change(BEFORE, optim=optim).optim, images=32)

    original = schedule("9 steps")
    constant = schedule("13 steps", "constant", ["9 steps"])
    twice = schedule("23 steps", "cosine", ["9 steps", "13 steps constant"])
    assert (constant.steps, twice.steps, twice.horizon) == (13, 23, 18)
    for step in range(9):
        assert constant.rates(step) == twice.rates(step) == original.rates(step)
    last = original.rates(8)
    assert last["lr"] > 5e-4
    assert [constant.rates(step) for step in range(9, 13)] == [last] * 4
    assert [twice.rates(step) for step in range(9, 13)] == [last] * 4
    tail = [twice.rates(step) for step in range(13, 23)]
    assert all({**rates, "lr": 0} == {**last, "lr": 0} for rates in tail)
    assert tail[4]["lr"] == pytest.approx((last["lr"] + 1e-6) / 2)
    assert tail[9]["lr"] == pytest.approx(1e-6)


def test_stopped_extension_equals_uninterrupted(tmp_path, monkeypatch, finished):
    extended, extend = tmp_path / "extended", "cosine"
    shutil.copytree(finished, extended)
    stop(monkeypatch, 2, extended, longer(extend))
    before = ijepa_zoo.create_model(f"local-dir:{extended}").norm.bias.clone()
    train(extended, longer(extend))
    assert (extended / "export.step").read_text() == "13"
    after = ijepa_zoo.create_model(f"local-dir:{extended}").norm.bias
    assert not torch.equal(before, after)
    at_once = read_settings(extended)
    assert (at_once.optim.extended_from, at_once.optim.extend) == (("9 steps",), extend)
    train(tmp_path / "whole", at_once)
    assert same_state(tmp_path / "whole", extended)
    lrs = [[row["lr"] for row in rows(folder)] for folder in (tmp_path / "whole", extended)]
    assert lrs[0] == lrs[1]
    assert len(lrs[0]) == 13


def test_unfinished_run_is_extended_twice(tmp_path, monkeypatch):
    stop(monkeypatch, 5, tmp_path)
    stop(monkeypatch, 5, tmp_path, longer("constant"))  # 9 steps would have been the end
    train(tmp_path, longer("cosine", "15 steps"))
    optim = read_settings(tmp_path).optim
    assert optim.extended_from == ("9 steps", "13 steps constant")
    lr = [float(row["lr"]) for row in rows(tmp_path)]
    assert lr == pytest.approx([Schedule.of(optim, 32).rates(step)["lr"] for step in range(15)])
    train(tmp_path, longer("cosine", "15 steps"))
    train(tmp_path, read_settings(tmp_path))
    assert read_settings(tmp_path).optim == optim


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (longer(None), r"optim\.duration: 9 steps then, 13 steps now.*optim\.extend="),
        (longer("constant", "6 steps"), r"optim\.duration: 9 steps then, 6 steps now"),
        (longer("constant", lr=0.1), r"\(optim\.lr: 0\.001 then, 0\.1 now\)"),
        (longer("constant", extended_from=["5 steps"]), r"optim\.extended_from"),
    ],
)
def test_what_cannot_be_extended_is_refused(finished, config, named):
    before = (finished / "config.yaml").read_text()
    with pytest.raises(RunError, match=named):
        train(finished, config)
    assert (finished / "config.yaml").read_text() == before


def test_extended_run_keeps_its_schedule(tmp_path, monkeypatch):
    stop(monkeypatch, 5, tmp_path)
    stop(monkeypatch, 1, tmp_path, longer("constant"))
    with pytest.raises(RunError, match=r"13 steps then, 9 steps now"):
        train(tmp_path)
    with pytest.raises(RunError, match=r"optim\.extend: constant then, cosine now"):
        train(tmp_path, longer("cosine"))


def test_branch_keeps_optimizer_and_step(tmp_path, monkeypatch, finished):
    branch, source = tmp_path / "branch", tmp_path / "source"
    stop(monkeypatch, 5, source)
    stop(monkeypatch, 2, branch, init=source, resume_optimizer=4)
    source.rename(tmp_path / "gone")
    train(branch, init=source, resume_optimizer=4)  # resumes from its own checkpoint
    assert same_state(branch, finished)
    assert rows(branch) == rows(finished)[4:]
    assert (branch / "export.step").read_text() == "9"


def test_branch_of_other_settings_and_of_an_extension(tmp_path, finished):
    lower = change(BEFORE, optim={"lr": 5e-4, "duration": "11 steps"})
    train(tmp_path / "lower", lower, init=f"local-dir:{finished}", resume_optimizer="latest")
    lr = [float(row["lr"]) for row in rows(tmp_path / "lower")]
    assert lr == pytest.approx([Schedule.of(lower.optim, 32).rates(n)["lr"] for n in (9, 10)])
    train(tmp_path / "tail", longer("cosine"), init=finished, resume_optimizer="latest")
    assert read_settings(tmp_path / "tail").optim.extended_from == ("9 steps",)
    assert len(rows(tmp_path / "tail")) == 4


def test_branches_that_do_not_fit_are_refused(tmp_path, finished):
    config = longer(None)

    def branch(config=config, init=finished, which="latest"):
        train(tmp_path / "branch", config, init=init, resume_optimizer=which)

    with pytest.raises(CheckpointError, match="predictor"):
        branch(change(config, model={"predictor_embed_dim": 24}))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7"):
        branch(which=7)
    with pytest.raises(SettingsError, match=r"optim\.duration=9 steps"):
        branch(BEFORE)
    with pytest.raises(SettingsError, match="--init RUN"):
        branch(init=None)
    with pytest.raises(RunError, match=r"config\.yaml"):
        branch(init=finished / "export")
    new = tmp_path / "new"
    new.mkdir()
    (new / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    with pytest.raises(CheckpointError, match="new has no checkpoints"):
        branch(init=new)
    branch()  # refusals leave nothing that is in the way
    assert len(rows(tmp_path / "branch")) == 4


def test_branch_on_the_command_line(tmp_path, monkeypatch, finished):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    np.save("images.npy", IMAGES)
    words = ["pretrain", "--config", str(finished / "config.yaml"), "--data", "images.npy"]
    words += ["--init", str(finished), "--quiet", "optim.lr=5e-4"]
    assert main([*words, "--out", "eight", "--resume-optimizer", "8"]) == 0
    assert len(rows(tmp_path / "eight")) == 1
    assert main([*words, "--out", "same", "--resume-optimizer"]) != 0
    assert not (tmp_path / "same" / "export").exists()
