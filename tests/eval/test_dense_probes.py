"""Depth and segmentation probes: heads, losses and metrics against plain ones, and whole runs."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import several_processes
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ijepa_zoo import cli, create_model
from ijepa_zoo.data.dense import open_depth, open_segmentation
from ijepa_zoo.errors import DataError, RunError, SettingsError
from ijepa_zoo.eval import dense
from ijepa_zoo.eval.dense import evaluate_dense_depth, evaluate_segmentation
from ijepa_zoo.eval.dense_tasks import (
    DEPTH_METRICS,
    DenseProtocol,
    Depth,
    DepthProtocol,
    Segmentation,
    depth_metrics,
)
from ijepa_zoo.eval.dense_training import GridHead
from ijepa_zoo.eval.models import Subject, open_model
from ijepa_zoo.eval.results import read_result

PROTOCOL = DepthProtocol(epochs=2, batch_size=4, lrs=(3e-3, 1e-2), bins=16, upsample=2)
SEGMENTATION = DenseProtocol(epochs=2, batch_size=4, lrs=(3e-3, 1e-2))


class PlainHead(nn.Module):
    """DINOv2's depth head as it is written there: upsample, BatchNorm, convolution, bins."""

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


def test_heads_of_the_grid_equal_dinov2s_head_trained_alone():
    grid = [(bn, lr) for bn in (False, True) for lr in (0.01, 0.1)]
    task, alone = Depth(10, bins=7, upsample=2), []
    heads = [GridHead(task, 24, 3, "last4", *settings) for settings in grid]
    for head in heads:
        plain = PlainHead(24, 7, 10, 2, isinstance(head.head.norm, nn.BatchNorm2d))
        plain.load_state_dict(head.head.state_dict())
        alone.append((plain, torch.optim.AdamW(plain.parameters(), head.lr, weight_decay=0.01)))
    groups = [{"params": head.parameters(), "lr": head.lr} for head in heads]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    for _ in range(5):
        maps, depth = torch.randn(4, 24, 3, 5) * 2 + 1, torch.rand(4, 6, 10) * 9 + 0.5
        depth[torch.rand(4, 6, 10) < 0.2] = 0
        optimizer.zero_grad()
        for head, (plain, own) in zip(heads, alone):
            task.loss(head(maps), depth).backward()
            own.zero_grad()
            g = (plain(maps)[depth > 0] + 1e-3).log() - (depth[depth > 0] + 1e-3).log()
            (g.var() + 0.15 * g.mean() ** 2).sqrt().backward()
            own.step()
        optimizer.step()
    for head, (plain, _) in zip(heads, alone):
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(head.head.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            head.eval()(maps)[:, 0], plain.eval()(maps), atol=1e-4, rtol=1e-4
        )


def test_depth_loss_is_dinov2s():
    predicted = torch.rand(3, 1, 4, 5, dtype=torch.float64) * 5 + 1
    depth = torch.rand(3, 4, 5, dtype=torch.float64) * 5
    depth[0, :2] = 0
    loss = Depth(10, 8, 1).loss(predicted, depth)
    expected = _sig_loss(predicted[:, 0].numpy(), depth.numpy())
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_depth_metrics_by_hand():
    depth = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    predicted = torch.tensor([[[1.0, 3.0], [8.0, 99.0]]])
    valid = Depth(10, 8, 1).valid(depth)
    assert valid.tolist() == [[True, True], [True, False]]
    metrics = dict(zip(DEPTH_METRICS, depth_metrics(predicted, depth, valid, 10)[0].tolist()))
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
    assert metrics == pytest.approx(expected, rel=1e-6)


def test_pixels_count_up_to_the_largest_depth_and_in_the_eigen_crop():
    depth = torch.full((480, 640), 10.0)
    depth[100, 100], depth[101, 100], depth[102, 100] = 10.01, 0.0, 0.001
    task = Depth(10, 8, 1, crop="eigen")
    assert int((~task.valid(depth)).sum()) == 3
    cropped = task.valid(depth, test=True)
    rows, columns = cropped.nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (45, 470, 41, 600)
    assert int(cropped.sum()) == 426 * 560 - 3


def test_learning_rates_of_the_protocols():
    depth = [DepthProtocol().lr_scale(step, 300) for step in range(300)]
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(300) / 300))  # as mmcv: of all steps
    assert depth == pytest.approx(np.minimum(1, np.arange(1, 301) / 100) * cosine)
    classes = [DenseProtocol().lr_scale(step, 40_000) for step in range(40_000)]
    assert classes[0] == 1 / 1500
    assert classes[1499] == 1 - 1499 / 40_000
    assert classes[20_000] == 0.5
    assert classes[-1] == pytest.approx(1 / 40_000)


def test_segmentation_metrics_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    task, total, truths, guesses = Segmentation(6), 0, [], []
    for _ in range(3):
        target = torch.randint(0, 5, (9, 7), generator=generator).float()  # no pixel of class 5
        logits = torch.randn(5, 9, 7, generator=generator)  # nor is it predicted
        logits = torch.cat([logits, torch.full((1, 9, 7), -9.0)])
        target[0] = 255
        total = total + task.statistics([logits], torch.arange(6) % 4, target)
        truths.append(target[1:].flatten())
        guesses.append(logits.argmax(0)[1:].flatten())
    truth, guess = torch.cat(truths).numpy(), torch.cat(guesses).numpy()
    measured, constant = task.summary(total, 3).tolist()
    per_class = metrics.jaccard_score(truth, guess, average=None)
    assert list(task.more(total[0])["IoU"].values())[:5] == pytest.approx(100 * per_class)
    assert task.more(total[0])["IoU"]["5"] is None
    expected = [
        metrics.jaccard_score(truth, guess, average="macro"),
        metrics.accuracy_score(truth, guess),
        metrics.balanced_accuracy_score(truth, guess),
    ]
    assert measured == pytest.approx([100 * value for value in expected])
    assert constant[1] == pytest.approx(100 * (truth == 3).mean())


def test_segmentation_loss_ignores_pixels_without_a_class():
    logits = torch.randn(2, 3, 4, 4)
    target = torch.randint(0, 3, (2, 8, 8)).float()
    target[:, :3] = 255
    full = F.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)
    known = full.permute(0, 2, 3, 1)[target != 255]
    expected = F.cross_entropy(known, target[target != 255].long())
    torch.testing.assert_close(Segmentation(3).loss(logits, target), expected)


# runs


@pytest.fixture(scope="module")
def subject():
    return open_model("vit_nano8_64_ijepa", random=True)


@pytest.fixture(scope="module")
def finished(subject, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    result = evaluate_dense_depth(subject, "scenes:24,6", out, protocol=PROTOCOL)
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder, result


def test_a_run_leaves_a_result_and_a_head(finished):
    out, result = finished
    assert read_result(out / "result.json").value == result.value
    assert {file.name for file in out.iterdir()} - {".lock"} == {"model", "result.json"}
    assert result.images == {"train": 22, "val": 2, "test": 6}
    assert [(part["split"], part["images"]) for part in result.data.values()] == [
        ("rendered", 24),
        ("rendered", 6),
    ]
    assert result.notes == []
    assert result.data["train"]["name"] == "scenes:24,6"
    assert result.table().startswith("rendered scenes, depth: ")
    assert len(result.heads) == 8
    assert min(result.heads, key=lambda head: head.val).name == result.chosen
    assert [head.test is not None for head in result.heads].count(True) == 1


def test_the_test_depths_are_those_of_the_saved_head(tmp_path):
    """Predictions by another route: features by timm, DINOv2's head with the saved weights."""
    name = "vit_nano8_64_ijepa.scenes"
    result = evaluate_dense_depth(name, "scenes:24,6", tmp_path, protocol=PROTOCOL)
    (folder,) = tmp_path.glob("*/model")
    saved = create_model(f"local-dir:{folder}").eval()
    assert json.loads((folder / "config.json").read_text())["unit"] == "scene units"
    args, data = saved.head.args, open_depth("scenes:24,6")
    limit = args["depth_range"][1]
    plain = PlainHead(args["in_features"], 16, limit, 2, args["batch_norm"])
    plain.load_state_dict(saved.head.state_dict())
    errors = []
    for image, target, _ in data.test:
        pixels = _normalized(image, saved)
        sides = [_maps(name, side, result, plain.eval()) for side in (pixels, pixels.flip(-1))]
        depth = F.interpolate(sides[0][None], (64, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(saved(pixels), depth, atol=1e-3, rtol=1e-4)
        mean = (sides[0] + sides[1].flip(-1)) / 2
        full = F.interpolate(mean[None], (64, 64), mode="bilinear", align_corners=False)[0, 0]
        known = (target > 0) & (target <= data.max_depth)
        difference = np.clip(full.numpy(), 1e-3, data.max_depth)[known] - target[known]
        errors.append(math.sqrt((difference.astype(np.float64) ** 2).mean()))
    assert result.value == pytest.approx(np.mean(errors), rel=1e-4)


def _normalized(image, model):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


@torch.no_grad()
def _maps(name, pixels, result, head):
    """A head on the features of the named encoder."""
    layers = 1 if result.chosen.startswith("last ") else 4
    encoder = create_model(name).eval()
    maps = encoder.get_intermediate_layers(pixels, n=layers, reshape=True, norm=True)
    return head(torch.cat(maps, dim=1))


def test_kept_features_give_the_same_metrics(finished, subject, tmp_path):
    cached = evaluate_dense_depth(subject, "scenes:24,6", tmp_path, protocol=PROTOCOL, cached=True)
    online = finished[1]
    assert cached.notes[0].startswith("cached: each image")
    assert cached.value == pytest.approx(online.value, rel=1e-3)
    assert [h.val for h in cached.heads] == pytest.approx([h.val for h in online.heads], rel=1e-3)


def test_the_baseline_is_the_mean_depth_of_what_was_trained_on(finished):
    data = open_depth("scenes:24,6")
    baselines = finished[1].baselines
    depths = np.stack([data.train[i][1] for i in range(24)])
    errors = [np.sqrt(((depths.mean() - data.test[i][1]) ** 2).mean()) for i in range(6)]
    assert baselines["rmse of the mean depth"] == pytest.approx(np.mean(errors), rel=0.05)
    assert baselines["rmse of the mean depth map"] < baselines["rmse of the mean depth"]


class _KilledError(Exception):
    pass


def test_a_killed_run_resumes_with_the_same_numbers(finished, subject, tmp_path, monkeypatch):
    original = dense.EpochState.save

    def kill(self, state):
        original(self, state)
        raise _KilledError

    monkeypatch.setattr(dense.EpochState, "save", kill)
    arguments = {"protocol": PROTOCOL}
    with pytest.raises(_KilledError):
        evaluate_dense_depth(subject, "scenes:24,6", tmp_path, **arguments)
    monkeypatch.undo()
    result = evaluate_dense_depth(subject, "scenes:24,6", tmp_path, **arguments)
    assert result.heads == finished[1].heads
    assert result.value == finished[1].value
    assert result.baselines == finished[1].baselines


def test_baseline_is_the_architecture_with_random_weights(tmp_path):
    arguments = {
        "protocol": PROTOCOL,
        "epochs": 1,
    }
    result = evaluate_dense_depth(
        "vit_nano8_64_ijepa.scenes", "scenes:24,6", tmp_path, baseline=True, **arguments
    )
    (name,) = (name for name in result.baselines if "random weights" in name)
    random = open_model("vit_nano8_64_ijepa.scenes", random=True)
    alone = evaluate_dense_depth(random, "scenes:24,6", tmp_path / "other", **arguments)
    assert result.baselines[name] == alone.value != result.value


def test_select_on_test_reads_it_with_every_head(subject, tmp_path):
    result = evaluate_dense_depth(
        subject, "scenes:24,6", tmp_path, protocol=PROTOCOL, select_on_test=True
    )
    assert result.selection == "the test set"
    assert result.value == min(head.test for head in result.heads)
    assert result.images == {"train": 24, "val": 0, "test": 6}
    assert {head.val for head in result.heads} == {None}


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
    assert result.images == {"train": 4, "val": 1, "test": 5}
    assert "test/3.png: not an image" in result.notes[-1]
    assert "train/4_depth.png" in result.notes[-1]
    assert math.isfinite(result.value)


def test_a_run_killed_after_its_last_epoch_knows_what_could_not_be_decoded(
    subject, tmp_path, monkeypatch
):
    data = _folder(tmp_path)
    (data / "train/4_depth.png").write_bytes(b"nothing")
    arguments = {"workers": 0, "protocol": PROTOCOL}
    with pytest.raises(DataError, match=r"4_depth\.png"):
        evaluate_dense_depth(subject, data, tmp_path / "whole", **arguments)
    arguments["skip_broken"] = True
    whole = evaluate_dense_depth(subject, data, tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch:
        patch.setattr("ijepa_zoo.eval.dense._measure", None)
        with pytest.raises(TypeError, match="NoneType"):
            evaluate_dense_depth(subject, data, tmp_path / "killed", **arguments)
    resumed = evaluate_dense_depth(subject, data, tmp_path / "killed", **arguments)
    assert (resumed.notes, resumed.images) == (whole.notes, whole.images)
    assert "train/4_depth.png" in whole.notes[-1]


def test_depths_in_other_units_are_noticed_before_the_work(subject, tmp_path):
    data = _folder(tmp_path, meters=40.0)
    (data / "train/0_depth.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"train/5\.png.*--depth-scale"):
        evaluate_dense_depth(subject, data, tmp_path / "out", skip_broken=True)
    result = evaluate_dense_depth(
        subject, data, tmp_path / "out", workers=0, protocol=PROTOCOL, max_depth=80,
        skip_broken=True,
    )  # fmt: skip
    assert result.protocol["max_depth"] == 80


def test_features_that_are_not_finite_are_refused(tmp_path):
    model = open_model("vit_nano8_64_ijepa", random=True).model
    model.norm.weight.data[0] = math.nan
    with pytest.raises(RunError, match="not finite"):
        evaluate_dense_depth(Subject(model, "broken"), "scenes:4,2", tmp_path, protocol=PROTOCOL)


def test_pairs_of_which_none_can_be_read_are_refused_before_the_work(subject, tmp_path):
    data = _folder(tmp_path, count=5)
    for n in range(5):
        (data / f"test/{n}_depth.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"test/0\.png.*test/0_depth\.png"):
        evaluate_dense_depth(subject, data, tmp_path / "out")


TWO = """
    import sys
    from ijepa_zoo.eval.dense import evaluate_dense_depth
    from ijepa_zoo.eval.dense_tasks import DepthProtocol
    from ijepa_zoo.eval.dense_training import DenseTraining
    from ijepa_zoo.eval.models import open_model

    encode_once = DenseTraining._encode_once

    def encode_share(training):
        store = encode_once(training)
        assert len(store.rows) <= 4, store.rows  # of 8 images
        return store

    DenseTraining._encode_once = encode_share
    evaluate_dense_depth(
        open_model("vit_nano8_64_ijepa", random=True), sys.argv[1], sys.argv[2], device="cpu",
        workers=0, skip_broken=True, batch_size=3, cached=sys.argv[3] == "cached",
        protocol=DepthProtocol(epochs=2, batch_size=4, lrs=(3e-3, 1e-2), bins=16, upsample=2),
    )
"""


@pytest.mark.parametrize("features", ["online", "cached"])
def test_two_processes_do_what_one_does(subject, tmp_path, features):
    data = _folder(tmp_path, count=9)
    for n in range(9):  # something to learn, and a pair that only one process can read
        _write_pair(data / f"train/{n}.png", data / f"train/{n}_depth.png", 25 * n, 1 + n / 2)
    (data / "train/5.png").write_bytes(b"nothing")
    for n in (2, 3):  # one of each process
        (data / f"test/{n}.png").write_bytes(b"nothing")
    several_processes.run(TWO, 2, data, tmp_path / "two", features)
    one = evaluate_dense_depth(
        subject, data, tmp_path / "one", protocol=PROTOCOL, workers=0, skip_broken=True,
        batch_size=3, cached=features == "cached",
    )  # fmt: skip
    (file,) = (tmp_path / "two").glob("*/result.json")
    two = read_result(file)
    assert two.runtime["processes"] == 2
    assert two.value == pytest.approx(one.value, rel=1e-4)
    assert two.notes == one.notes
    assert all(f"{name}.png" in two.notes[-1] for name in ("train/5", "test/2", "test/3"))
    assert two.images == one.images
    assert one.images["test"] == 7
    assert two.baselines == pytest.approx(one.baselines, rel=1e-6)
    for ours, theirs in zip(two.heads, one.heads):
        assert ours.val == pytest.approx(theirs.val, rel=1e-4)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)


def test_ranges_and_units_that_cannot_hold_are_refused(subject, tmp_path):
    for wrong in (0, -1.0, math.nan, math.inf):
        with pytest.raises(SettingsError, match="--max-depth"):
            evaluate_dense_depth(subject, "scenes:24,6", tmp_path, max_depth=wrong)
    with pytest.raises(SettingsError, match="epochs is 0"):
        evaluate_dense_depth(subject, "scenes:24,6", tmp_path, epochs=0)


def test_pairs_without_a_pixel_that_counts_are_counted(subject, tmp_path):
    data = _folder(tmp_path)
    for name in ("train/0", "test/0", "test/5"):  # unknown, or beyond 10 m
        meters = 30.0 if name.endswith("5") else 0
        _write_pair(data / f"{name}.png", data / f"{name}_depth.png", 9, meters)
    result = evaluate_dense_depth(subject, data, tmp_path / "out", workers=0, protocol=PROTOCOL)
    assert result.images["test"] == 4
    assert "without a pixel that counts: 2" in result.notes[-1]


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
    assert math.isfinite(result.value)
    assert result.images == {"train": 10, "val": 1, "test": 3}
    assert result.data["test"]["split"] == "splits.mat"
    assert (result.protocol["crop"], result.protocol["max_depth"]) == ("eigen", 10)


# segmentation


@pytest.fixture
def masks(tmp_path):
    """Images whose color is their class: 0 black, 1 red, 2 green; a column is ignored."""
    colors = np.array([(0, 0, 0), (220, 0, 0), (0, 220, 0)], np.uint8)
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6)):
        for n in range(count):
            mask = rng.integers(0, 3, (4, 4)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
            paths = [tmp_path / "data" / kind / split / f"{n}.png" for kind in ("images", "masks")]
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(colors[mask]).save(paths[0])
            mask[:, :3] = 255
            Image.fromarray(mask).save(paths[1])
    return tmp_path / "data"


def test_segmentation_learns_colors(subject, masks, tmp_path):
    protocol = replace(SEGMENTATION, epochs=15)
    result = evaluate_segmentation(
        subject, masks, tmp_path / "out", protocol=protocol, workers=0, cached=True
    )
    assert result.value > 90
    assert (result.metric, result.unit, result.higher_is_better) == ("mean IoU", "%", True)
    assert max(result.heads, key=lambda head: head.val).name == result.chosen
    assert set(result.metrics) == {"pixel accuracy", "mean class accuracy", "IoU"}
    assert result.baselines["mean IoU of the most frequent class"] < 20
    assert result.protocol["num_classes"] == 3


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (np.zeros((64, 32), np.uint8), r"images/train/2\.png.* 64 x 64.* 32 x 64"),
        (np.zeros((64, 64, 3), np.uint8), r"masks/train/2\.png.* color"),
        (np.full((64, 64), 26_001, np.uint16), r"images/train/2\.png.* class ids"),
        (b"\x89PNG", r"masks/train/2\.png"),
        (None, r"images/train/2\.png"),
    ],
)
def test_masks_that_do_not_fit_are_named(subject, masks, tmp_path, mask, named):
    path = masks / "masks/train/2.png"
    path.unlink()
    if isinstance(mask, bytes):
        path.write_bytes(mask)
    elif mask is not None:
        Image.fromarray(mask).save(path)
    with pytest.raises(DataError, match=named):
        evaluate_segmentation(
            subject, masks, tmp_path / "out", workers=0, protocol=SEGMENTATION, cached=True
        )


def test_classes_outside_the_data_are_named(subject, masks, tmp_path, monkeypatch):
    monkeypatch.setattr("ijepa_zoo.data.dense._count_classes", lambda *_: 2)
    with pytest.raises(DataError, match=r"/\d+\.png.* class 2.* 0 to 1"):
        evaluate_segmentation(subject, masks, tmp_path / "out", workers=0, protocol=SEGMENTATION)


def test_masks_of_16_bits_and_of_another_size_are_read(subject, masks, tmp_path):
    arguments = {"workers": 0, "protocol": SEGMENTATION, "reduce_zero_label": False}
    plain = evaluate_segmentation(subject, masks, tmp_path / "plain", **arguments)
    for path in (masks / "masks").rglob("*.png"):
        mask = np.asarray(Image.open(path)).astype(np.uint16)
        Image.fromarray(mask.repeat(2, 0).repeat(2, 1)).save(path)
    result = evaluate_segmentation(subject, masks, tmp_path / "out", **arguments)
    assert [head.loss for head in result.heads] == [head.loss for head in plain.heads]
    assert result.value == pytest.approx(plain.value, abs=3)  # finer pixels are measured


IDS = {"ADE20K": [1, 5, 40, 150], "PASCAL VOC": [0, 7, 12, 20]}  # of the classes of scenes


def _write_layout(root, name):
    """Rendered scenes, larger than the model's images, as ADE20K's or VOC's archive unpacks."""
    data, voc = open_segmentation("scenes:24,6"), name == "PASCAL VOC"
    for split, short, part in (("training", "train", data.train), ("validation", "val", data.test)):
        names = []
        for n, (image, mask, _) in enumerate(part):
            mask = np.array(IDS[name], np.uint8)[mask].repeat(2, 0).repeat(2, 1)
            mask[:3] = 255 if voc else 0  # VOC's border, ADE20K's other things
            names.append(f"2007_{n:06}" if voc else f"ADE_{short}_{n:08}")
            paths = [f"images/{split}/{names[-1]}.jpg", f"annotations/{split}/{names[-1]}.png"]
            if voc:
                paths = [
                    f"JPEGImages/{short}{names[-1]}.jpg",
                    f"SegmentationClass/{short}{names[-1]}.png",
                ]
            for path in paths:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.array(image)).resize((128, 128)).save(root / paths[0], quality=95)
            picture = Image.fromarray(mask)
            if voc:
                picture.putpalette([v for k in range(256) for v in (k * 7 % 256, k * 5 % 256, k)])
            picture.save(root / paths[1])
        if voc:
            lists = root / "ImageSets/Segmentation"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{short}.txt").write_text("".join(f"{short}{n}\n" for n in names))
    if not voc:
        rows = [f"{n}\t0.1\t9\t9\t1\tthing {n}, object  " for n in range(1, 151)]
        header = "Idx\tRatio\tTrain\tVal\tStuff\tName"
        (root / "objectInfo150.txt").write_text("\n".join([header, *rows]) + "\n")


@pytest.mark.parametrize("name", IDS)
def test_iou_of_the_layouts_of_ade20k_and_voc_is_scikit_learns(tmp_path, name):
    """Predictions by the saved head; every pixel of the test masks at their own size."""
    metrics = pytest.importorskip("sklearn.metrics")
    voc = name == "PASCAL VOC"
    root = tmp_path / ("VOCdevkit/VOC2012" if voc else "ADEChallengeData2016")
    _write_layout(root, name)
    model = "vit_nano8_64_ijepa.scenes"
    result = evaluate_segmentation(model, tmp_path, tmp_path / "out", protocol=SEGMENTATION)
    assert (result.task, result.method) == (name, "segmentation")
    assert len(result.metrics["IoU"]) == (21 if voc else 150)
    (folder,) = tmp_path.glob("out/*/model")
    saved = create_model(f"local-dir:{folder}").eval()
    assert saved.class_names == list(result.metrics["IoU"])
    assert saved.class_names[-1] == ("tvmonitor" if voc else "thing 150, object")
    truths, guesses = [], []
    for path in sorted(root.glob("JPEGImages/val*" if voc else "images/validation/*")):
        mask = (
            root / ("SegmentationClass" if voc else "annotations/validation") / f"{path.stem}.png"
        )
        target = np.asarray(Image.open(mask)).astype(int) - (not voc)
        image = Image.open(path).resize((64, 64), Image.Resampling.BICUBIC)
        pixels = _normalized(image, saved)
        patches = _maps(model, pixels, result, saved.head)
        whole = F.interpolate(patches, (64, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(saved(pixels), whole, atol=1e-4, rtol=1e-4)
        full = F.interpolate(patches, target.shape, mode="bilinear", align_corners=False)
        known = (target >= 0) & (target < 255)
        truths.append(target[known])
        guesses.append(full[0].argmax(0).numpy()[known])
    truth, guess = np.concatenate(truths), np.concatenate(guesses)
    there = sorted(set(truth) | set(guess))
    assert len(set(guess)) > 1
    expected = 100 * metrics.jaccard_score(truth, guess, labels=there, average=None)
    found = list(result.metrics["IoU"].values())
    assert [n for n, value in enumerate(found) if value is not None] == there
    assert [found[n] for n in there] == pytest.approx(list(expected), abs=0.05)
    assert result.value == pytest.approx(np.mean(expected), abs=0.05)
    assert read_result(folder.with_name("result.json")).metrics == result.metrics
    accuracy = 100 * metrics.accuracy_score(truth, guess)
    assert result.metrics["pixel accuracy"] == pytest.approx(accuracy, abs=0.05)


def test_the_command_for_segmentation(tmp_path, capsys):
    words = ["eval", "segmentation", "--model", "vit_nano8_64_ijepa", "--data", "scenes:12,4"]
    words += ["--epochs", "1", "--batch-size", "4", "--device", "cpu", "--quiet", "--baseline"]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "mean IoU (%)" in shown
    results = [read_result(file) for file in tmp_path.glob("*/result.json")]
    (own,) = (result for result in results if result.model["name"].endswith(".scenes"))
    assert any("random weights" in name for name in own.baselines)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3
    assert cli.main(["eval", "report", str(tmp_path), "--out", str(tmp_path / "report.md")]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "mean IoU" in report
    assert "the most frequent class" in report
