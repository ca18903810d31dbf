import json
import math
import os
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import several_processes
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ijepa_zoo import cli
from ijepa_zoo.data.dense import open_depth
from ijepa_zoo.distributed import Distributed
from ijepa_zoo.errors import DataError, RunError
from ijepa_zoo.eval import depth_training
from ijepa_zoo.eval.dense_depth import evaluate_dense_depth
from ijepa_zoo.eval.depth_feed import DepthFeed
from ijepa_zoo.eval.depth_heads import DepthHeads, DepthHeadSpec, lr_scale
from ijepa_zoo.eval.depth_metrics import (
    METRICS,
    depth_figures,
    scale_invariant_loss,
    valid_pixels,
)
from ijepa_zoo.eval.depth_training import DepthProtocol, DepthTraining
from ijepa_zoo.eval.epoch_state import EpochState
from ijepa_zoo.eval.models import Subject, open_model
from ijepa_zoo.eval.result_files import read_result

SPECS = [
    DepthHeadSpec(r, bn, lr)
    for r in ("last", "last4")
    for bn in (False, True)
    for lr in (0.01, 0.1)
]
WIDTHS = {"last": 6, "last4": 24}
PROTOCOL = DepthProtocol(epochs=2, batch_size=4, lrs=(3e-3, 1e-2), bins=16, upsample=2)


class PlainHead(nn.Module):
    """DINOv2's head as it is written there: upsample, BatchNorm, 1x1 convolution, bins."""

    def __init__(self, width, bins, max_depth, upsample, batch_norm):
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.conv = nn.Conv2d(width, bins, 1)
        self.bins, self.upsample = torch.linspace(1e-3, max_depth, bins), upsample

    def forward(self, maps):
        x = self.norm(maps)
        x = F.interpolate(x, scale_factor=self.upsample, mode="bilinear", align_corners=False)
        logits = torch.relu(self.conv(x)) + 0.1
        logits = logits / logits.sum(dim=1, keepdim=True)
        return torch.einsum("ikmn,k->imn", [logits, self.bins])


def _sig_loss(predicted, depth):
    """DINOv2's SigLoss, written out with NumPy."""
    known = depth > 0
    g = np.log(predicted[known] + 1e-3) - np.log(depth[known] + 1e-3)
    return math.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2)


def test_every_head_of_the_grid_equals_dinov2s_head_trained_alone():
    heads = DepthHeads(SPECS, WIDTHS, max_depth=10, bins=7, upsample=2, seed=3)
    alone = []
    for spec, head in zip(SPECS, heads.heads):
        plain = PlainHead(WIDTHS[spec.representation], 7, 10, 2, spec.batch_norm)
        plain.conv.weight.data.copy_(head.weight[:, :, None, None])
        plain.conv.bias.data.copy_(head.bias)
        alone.append((plain, torch.optim.AdamW(plain.parameters(), spec.lr, weight_decay=0.01)))
    optimizer = heads.optimizer(0.01)
    for _ in range(5):
        maps, depth = torch.randn(4, 24, 3, 5) * 2 + 1, torch.rand(4, 6, 10) * 9 + 0.5
        features, valid = {"last": maps[:, -6:], "last4": maps}, torch.rand(4, 6, 10) < 0.8
        optimizer.zero_grad()
        scale_invariant_loss(heads(features), depth, valid).sum().backward()
        optimizer.step()
        for spec, (plain, own) in zip(SPECS, alone):
            own.zero_grad()
            predicted = plain(features[spec.representation])
            g = (predicted[valid] + 1e-3).log() - (depth[valid] + 1e-3).log()
            (g.var() + 0.15 * g.mean() ** 2).sqrt().backward()
            own.step()
    heads.eval()
    together = heads(features)
    for place, (spec, head, (plain, _)) in enumerate(zip(SPECS, heads.heads, alone)):
        plain.eval()
        torch.testing.assert_close(head.weight, plain.conv.weight[:, :, 0, 0], atol=1e-5, rtol=1e-4)
        if spec.batch_norm:
            torch.testing.assert_close(head.gain, plain.norm.weight, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(head.var, plain.norm.running_var, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(head.mean, plain.norm.running_mean, atol=1e-5, rtol=1e-4)
        expected = plain(features[spec.representation])
        torch.testing.assert_close(together[place], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(heads(features, place)[0], together[place])


def test_loss_is_dinov2s():
    predicted, depth = np.random.rand(2, 3, 4, 5) * 5 + 1, np.random.rand(3, 4, 5) * 5
    depth[0, :2] = 0
    losses = scale_invariant_loss(
        torch.tensor(predicted), torch.tensor(depth), torch.tensor(depth) > 0
    )
    expected = [_sig_loss(p, depth) for p in predicted]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_figures_by_hand():
    depth = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    predicted = torch.tensor([[[1.0, 3.0], [8.0, 99.0]]])
    valid = valid_pixels(depth, 10)
    assert valid.tolist() == [[True, True], [True, False]]
    figures = dict(zip(METRICS, depth_figures(predicted, depth, valid, 10)[0].tolist()))
    logs = [0, math.log(1.5), math.log(2)]
    expected = {
        "rmse": math.sqrt((0 + 1 + 16) / 3),
        "rmse_log": math.sqrt(sum(x * x for x in logs) / 3),
        "abs_rel": (0 + 0.5 + 1) / 3,
        "sq_rel": (0 + 0.5 + 4) / 3,
        "log10": sum(logs) / 3 / math.log(10),
        "delta_1": 1 / 3,
        "delta_2": 2 / 3,  # 1.5 < 1.5625
        "delta_3": 2 / 3,  # 2 > 1.953
    }
    assert figures == pytest.approx(expected, rel=1e-6)


def test_valid_pixels_end_at_the_largest_depth_and_the_eigen_crop():
    depth = torch.full((480, 640), 10.0)
    depth[100, 100], depth[101, 100], depth[102, 100] = 10.01, 0.0, 0.001
    assert int((~valid_pixels(depth, 10)).sum()) == 3
    cropped = valid_pixels(depth, 10, "eigen")
    rows, columns = cropped.nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (45, 470, 41, 600)
    assert int(cropped.sum()) == 426 * 560 - 3


def test_learning_rate_warms_up_for_a_third_and_ends_at_zero():
    rates = [lr_scale(step, 300) for step in range(300)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[100] == 1
    assert rates[200] == pytest.approx(0.5)
    assert rates[-1] < 1e-3


# runs


@pytest.fixture(scope="module")
def subject():
    return open_model("vit_nano8_64_ijepa", random=True)


@pytest.fixture(scope="module")
def finished(subject, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    result = evaluate_dense_depth(subject, "scenes:24,6", out, protocol=PROTOCOL, pictures=2)
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder, result


def test_a_run_leaves_result_and_pictures(finished):
    out, result = finished
    assert read_result(out / "result.json").figure == result.figure
    assert sorted(file.name for file in out.iterdir()) == [
        ".lock",
        "predictions.png",
        "result.json",
    ]
    with Image.open(out / "predictions.png") as picture:
        assert picture.size == (3 * 200 + 8, 2 * 200 + 8)
    assert result.images == {"fit": 22, "choose": 2, "test": 6}
    assert [(part["split"], part["images"]) for part in result.data.values()] == [
        ("rendered", 24),
        ("rendered", 6),
    ]
    few, *worse = result.notes
    assert few == "chosen by 2 images only: with another seed another choice is likely"
    assert bool(worse) == (result.figure > result.baselines["rmse of the mean depth map"])
    assert result.data["train"]["name"] == "scenes:24,6"
    assert result.table().startswith("dense depth, rendered scenes: ")
    assert len(result.heads) == 8
    assert min(result.heads, key=lambda head: head.held_out).name == result.chosen
    assert [head.test is not None for head in result.heads].count(True) == 1
    json.dumps(result.others)


def test_the_test_figure_is_that_of_the_chosen_head_on_whole_maps(subject, tmp_path):
    """Predictions by another route: features by timm, the head by its parameters."""
    data = open_depth("scenes:24,6")
    training = DepthTraining(
        subject.model, data, PROTOCOL, data.max_depth, 0, "float32", 0, Distributed()
    )
    training.train(EpochState(tmp_path / "state.pt", {}), False, False)
    result = evaluate_dense_depth(subject, "scenes:24,6", tmp_path, protocol=PROTOCOL, pictures=0)
    place = [spec.name for spec in training.heads.specs].index(result.chosen)
    spec, head = training.heads.specs[place], training.heads.heads[place]
    plain = PlainHead(head.weight.shape[1], 16, data.max_depth, 2, spec.batch_norm).eval()
    plain.conv.weight.data.copy_(head.weight[:, :, None, None])
    plain.conv.bias.data.copy_(head.bias)
    if spec.batch_norm:
        plain.norm.weight.data, plain.norm.bias.data = head.gain.data, head.shift.data
        plain.norm.running_mean, plain.norm.running_var = head.mean, head.var
    errors = []
    cfg = subject.model.pretrained_cfg
    for i in range(6):
        image, depth, _ = data.test[i]
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        x = (x - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
        layers = 1 if spec.representation == "last" else 4
        sides = []
        for picture in (x, x.flip(-1)):
            with torch.no_grad():
                maps = subject.model.get_intermediate_layers(
                    picture, n=layers, reshape=True, norm=True
                )
                sides.append(plain(torch.cat(maps, dim=1)))
        mean = (sides[0] + sides[1].flip(-1)) / 2
        full = F.interpolate(mean[None], (64, 64), mode="bilinear", align_corners=False)[0, 0]
        known = (depth > 0) & (depth <= data.max_depth)
        difference = np.clip(full.numpy(), 1e-3, data.max_depth)[known] - depth[known]
        errors.append(math.sqrt((difference.astype(np.float64) ** 2).mean()))
    assert result.figure == pytest.approx(np.mean(errors), rel=1e-4)


def test_kept_features_give_the_same_figures(finished, subject, tmp_path):
    cached = evaluate_dense_depth(
        subject, "scenes:24,6", tmp_path, protocol=PROTOCOL, cached=True, pictures=0
    )
    online = finished[1]
    how, *others = cached.notes
    assert how.startswith("cached: each image and its mirror image are encoded once, as the proto")
    assert [n.split(",")[0] for n in others] == [n.split(",")[0] for n in online.notes]
    assert cached.figure == pytest.approx(online.figure, rel=1e-3)
    assert [h.held_out for h in cached.heads] == pytest.approx(
        [h.held_out for h in online.heads], rel=1e-3
    )


def test_the_baseline_is_the_mean_depth_of_what_was_trained_on(finished):
    data = open_depth("scenes:24,6")
    baselines = finished[1].baselines
    depths = np.stack([data.train[i][1] for i in range(24)])
    errors = [np.sqrt(((depths.mean() - data.test[i][1]) ** 2).mean()) for i in range(6)]
    assert baselines["rmse of the mean depth"] == pytest.approx(np.mean(errors), rel=0.05)
    assert baselines["rmse of the mean depth map"] < baselines["rmse of the mean depth"]


class _KilledError(Exception):
    pass


def test_a_killed_run_goes_on_with_the_same_numbers(finished, subject, tmp_path, monkeypatch):
    original = depth_training.EpochState.save

    def kill(self, state):
        original(self, state)
        raise _KilledError

    monkeypatch.setattr(depth_training.EpochState, "save", kill)
    arguments = {"protocol": PROTOCOL, "pictures": 0}
    with pytest.raises(_KilledError):
        evaluate_dense_depth(subject, "scenes:24,6", tmp_path, **arguments)
    monkeypatch.undo()
    result = evaluate_dense_depth(subject, "scenes:24,6", tmp_path, **arguments)
    assert result.heads == finished[1].heads
    assert result.figure == finished[1].figure
    assert result.baselines == finished[1].baselines


def test_a_finished_run_is_not_done_again(finished, subject, monkeypatch):
    folder, result = finished
    monkeypatch.setattr(DepthTraining, "train", None)
    again = evaluate_dense_depth(subject, "scenes:24,6", folder.parent, protocol=PROTOCOL)
    assert (again.heads, again.date) == (result.heads, result.date)


def test_baseline_is_the_architecture_with_random_weights(tmp_path):
    arguments = {"protocol": PROTOCOL, "epochs": 1, "pictures": 0}
    result = evaluate_dense_depth(
        "vit_nano8_64_ijepa.scenes", "scenes:24,6", tmp_path, baseline=True, **arguments
    )
    (name,) = (name for name in result.baselines if "random weights" in name)
    random = open_model("vit_nano8_64_ijepa.scenes", random=True)
    alone = evaluate_dense_depth(random, "scenes:24,6", tmp_path / "other", **arguments)
    assert result.baselines[name] == alone.figure != result.figure


def test_select_on_test_reads_it_with_every_head(subject, tmp_path):
    result = evaluate_dense_depth(
        subject, "scenes:24,6", tmp_path, protocol=PROTOCOL, select_on_test=True
    )
    assert result.selection == "the test set"
    assert result.figure == min(head.test for head in result.heads)


def _write_pair(image, depth, color=128, meters=2.0, size=(40, 30)):
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color, 0, 0)).save(image)
    Image.fromarray(np.full((size[1], size[0]), meters * 1000, np.uint16)).save(depth)


def _folder(tmp_path, count=6, meters=2.0):
    for split in ("train", "test"):
        for n in range(count):
            name = tmp_path / "data" / split / f"{n}"
            _write_pair(name.with_suffix(".png"), name.with_name(f"{n}_depth.png"), 20 * n, meters)
    return tmp_path / "data"


def test_broken_images_are_left_out_and_named(subject, tmp_path):
    data = _folder(tmp_path)
    (data / "test/3.png").write_bytes(b"nothing")
    (data / "train/4_depth.png").write_bytes(b"nothing")
    result = evaluate_dense_depth(
        subject, data, tmp_path / "out", workers=0, protocol=PROTOCOL, epochs=1, skip_broken=True
    )
    assert result.images == {"fit": 4, "choose": 1, "test": 5}
    epochs, *_, undecoded = result.notes
    assert epochs == f"1 epoch in the place of the protocol's {PROTOCOL.epochs}"
    assert undecoded.startswith("2 pairs could not be decoded (")
    assert "test/3.png: not an image" in undecoded
    assert "train/4_depth.png" in undecoded
    assert math.isfinite(result.figure)


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_killed_after_its_last_epoch_knows_what_could_not_be_decoded(
    subject, tmp_path, monkeypatch, cached
):
    data = _folder(tmp_path)
    (data / "train/4_depth.png").write_bytes(b"nothing")
    arguments = {"workers": 0, "protocol": PROTOCOL, "pictures": 0, "cached": cached}
    with pytest.raises(DataError, match=r"4_depth\.png"):
        evaluate_dense_depth(subject, data, tmp_path / "whole", **arguments)
    arguments["skip_broken"] = True
    whole = evaluate_dense_depth(subject, data, tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch:
        patch.setattr("ijepa_zoo.eval.dense_depth._measure", None)
        with pytest.raises(TypeError, match="NoneType"):
            evaluate_dense_depth(subject, data, tmp_path / "killed", **arguments)
    resumed = evaluate_dense_depth(subject, data, tmp_path / "killed", **arguments)
    assert (resumed.notes, resumed.images) == (whole.notes, whole.images)
    assert whole.notes[-1].startswith("1 pair could not be decoded")


def test_depths_in_other_units_are_noticed_before_the_work(subject, tmp_path):
    data = _folder(tmp_path, meters=40.0)
    with pytest.raises(DataError, match=r"no pixel .* counts: its depths span 40 to 40.*depth_sc"):
        evaluate_dense_depth(subject, data, tmp_path / "out")
    with pytest.raises(ValueError, match="epochs is 0"):
        evaluate_dense_depth(subject, data, tmp_path / "out", epochs=0)
    result = evaluate_dense_depth(
        subject, data, tmp_path / "out", workers=0, protocol=PROTOCOL, max_depth=80
    )
    assert result.protocol["max_depth"] == 80


def test_features_that_are_not_finite_are_refused(tmp_path):
    model = open_model("vit_nano8_64_ijepa", random=True).model
    model.norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        evaluate_dense_depth(Subject(model, "broken"), "scenes:4,2", tmp_path, protocol=PROTOCOL)


def test_pairs_of_which_none_can_be_read_are_refused_before_the_work(subject, tmp_path):
    data = _folder(tmp_path, count=5)
    for n in range(5):
        (data / f"test/{n}_depth.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"test/0\.png.*test/0_depth\.png"):
        evaluate_dense_depth(subject, data, tmp_path / "out")


TWO = """
    import sys
    from ijepa_zoo.eval.dense_depth import evaluate_dense_depth
    from ijepa_zoo.eval.depth_training import DepthProtocol
    from ijepa_zoo.eval.models import open_model
    evaluate_dense_depth(
        open_model("vit_nano8_64_ijepa", random=True), sys.argv[1], sys.argv[2], device="cpu",
        workers=0, pictures=1, skip_broken=True,
        protocol=DepthProtocol(epochs=2, batch_size=4, lrs=(3e-3, 1e-2), bins=16, upsample=2),
    )
"""


def test_two_processes_do_what_one_does(subject, tmp_path):
    data = _folder(tmp_path, count=9)
    for n in range(9):  # something to learn, and a pair that only one process can read
        _write_pair(data / f"train/{n}.png", data / f"train/{n}_depth.png", 25 * n, 1 + n / 2)
    (data / "train/5.png").write_bytes(b"nothing")
    for n in (2, 3):  # one of each process
        (data / f"test/{n}.png").write_bytes(b"nothing")
    several_processes.run(TWO, 2, data, tmp_path / "two")
    one = evaluate_dense_depth(
        subject, data, tmp_path / "one", protocol=PROTOCOL, workers=0, skip_broken=True
    )
    (file,) = (tmp_path / "two").glob("*/result.json")
    two = read_result(file)
    assert two.machine["processes"] == 2
    assert two.figure == pytest.approx(one.figure, rel=1e-4)
    assert two.notes == one.notes
    assert two.notes[-1].startswith("3 pairs could not be decoded")
    assert two.images == one.images
    assert one.images["test"] == 7
    assert two.baselines == pytest.approx(one.baselines, rel=1e-6)
    for ours, theirs in zip(two.heads, one.heads):
        assert ours.held_out == pytest.approx(theirs.held_out, rel=1e-4)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)


@pytest.mark.parametrize("change", [{"sums": torch.zeros(2, 3, 3)}, {"losses": 1}, {"epoch": 99}])
def test_a_state_that_does_not_fit_is_refused(subject, tmp_path, change):
    def training():
        data = open_depth("scenes:24,6")
        return DepthTraining(
            subject.model, data, PROTOCOL, data.max_depth, 0, "float32", 0, Distributed()
        )

    state = EpochState(tmp_path / "state.pt", {})
    training().train(state, False, False)
    state.save({**state.load(), **change})
    with pytest.raises(RunError, match=r"state\.pt.* is damaged: remove it"):
        training().train(state, False, False)


def test_ranges_and_units_that_cannot_hold_are_refused(subject, tmp_path):
    for wrong in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"max_depth \(--max-depth\) is .* such as 10"):
            evaluate_dense_depth(subject, "scenes:24,6", tmp_path, max_depth=wrong)
    with pytest.raises(DataError, match="depth_scale is 1000"):
        evaluate_dense_depth(subject, "scenes:24,6", tmp_path, depth_scale=1000)


def test_test_pairs_without_a_pixel_that_counts_are_told(subject, tmp_path):
    data = _folder(tmp_path)
    _write_pair(data / "test/5.png", data / "test/5_depth.png", 9, 30.0)  # beyond 10 m
    result = evaluate_dense_depth(subject, data, tmp_path / "out", workers=0, protocol=PROTOCOL)
    assert result.images["test"] == 5
    few, worse, blank = result.notes
    assert blank == "1 test pair without a pixel that counts: not among those tested"
    assert few == "chosen by 1 image only: with another seed another choice is likely"
    assert worse.startswith("worse than the mean depth map, which looks at no image (RMSE ")
    assert "train longer, epochs (--epochs)" in worse
    assert result.figure > result.baselines["rmse of the mean depth map"]


def _interrupted(load, index):
    """A read in a loader process that gets the Ctrl-C of the whole foreground group."""
    if torch.utils.data.get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGINT)
    return load(index)


def test_loader_processes_leave_interrupts_to_the_main_one(subject):
    pairs = open_depth("scenes:4,2").train
    pairs = replace(pairs, load=partial(_interrupted, pairs.load))
    feed = DepthFeed(pairs, subject.model, "cpu", workers=1)
    batches = list(feed.for_testing(np.arange(4), 2))
    assert [len(batch.depths) for batch in batches] == [2, 2]


def test_bars_leave_a_pipe_alone(subject, tmp_path, capsys):
    evaluate_dense_depth(
        subject, "scenes:24,6", tmp_path, protocol=PROTOCOL, cached=True, epochs=1, workers=0,
        progress=True,
    )  # fmt: skip
    assert capsys.readouterr().err == ""


def test_the_command_reads_nyus_own_file(tmp_path):
    h5py, matlab = pytest.importorskip("h5py"), pytest.importorskip("scipy.io")
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = rng.integers(0, 256, (14, 3, 64, 48), np.uint8)
        file["depths"] = rng.uniform(0.7, 9.9, (14, 64, 48)).astype(np.float32)
    numbers = {"trainNdxs": [[n] for n in range(1, 12)], "testNdxs": [[12], [13], [14]]}
    matlab.savemat(tmp_path / "splits.mat", numbers)
    words = ["eval", "depth", "--task", "dense", "--model", "vit_nano8_64_ijepa", "--random"]
    words += ["--epochs", "1", "--batch-size", "4", "--device", "cpu", "--quiet", "--workers", "1"]
    assert cli.main([*words, "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").glob("*/result.json")
    result = read_result(file)
    assert math.isfinite(result.figure)
    assert result.images == {"fit": 10, "choose": 1, "test": 3}
    assert result.data["test"]["split"] == "splits.mat"
    assert (result.protocol["crop"], result.protocol["max_depth"]) == ("eigen", 10)
