"""Depth and segmentation probes: heads, losses and metrics against plain ones, and whole runs."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn import metrics as reference
from small_probe import OPTIONS, save, the_one
from torch import nn

from ijepa_zoo import create_model
from ijepa_zoo.data.dense import open_depth, open_segmentation
from ijepa_zoo.errors import DataError, SettingsError
from ijepa_zoo.eval import evaluate_dense_depth, evaluate_segmentation, open_model
from ijepa_zoo.eval.dense_tasks import DEPTH, DEPTH_METRICS, SEGMENTATION, Depth, depth_metrics
from ijepa_zoo.eval.dense_training import make_dense_grid

QUICK = {"epochs": 2, "batch_size": 4, "lrs": (3e-3, 1e-2), "bins": 16, "upsample": 2}
NANO, SCENES = "vit_nano8_64_ijepa.photos", "scenes:16,5"


class PlainHead(nn.Module):
    """DINOv2's depth head as it is written there: upsample, BatchNorm, convolution, bins."""

    def __init__(self, width, bins, max_depth, upsample, batch_norm):
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.conv = nn.Conv2d(width, bins, 1)
        self.bins, self.upsample = torch.linspace(1e-3, max_depth, bins), upsample

    def forward(self, maps):
        x = F.interpolate(self.norm(maps), scale_factor=self.upsample, mode="bilinear")
        logits = torch.relu(self.conv(x)) + 0.1
        logits = logits / logits.sum(dim=1, keepdim=True)
        return torch.einsum("ikmn,k->imn", [logits, self.bins])


def test_heads_of_the_grid_equal_dinov2s_head_and_loss_alone():
    task, protocol = Depth(10, bins=7, upsample=2), replace(DEPTH, lrs=(0.01, 0.1))
    grid = make_dense_grid(task, protocol, {"last": 6, "last4": 24}, (6, 10), seed=3)
    alone = []
    for spec, head in zip(grid.specs, grid.heads):
        plain = PlainHead(6 if spec.representation == "last" else 24, 7, 10, 2, spec.kind == "bn")
        plain.load_state_dict(head.state_dict())
        alone.append((plain, torch.optim.AdamW(plain.parameters(), spec.lr / 2, weight_decay=0.01)))
    for _ in range(5):
        maps, depth = torch.randn(4, 24, 3, 5) * 2 + 1, torch.rand(4, 6, 10) * 9 + 0.5
        depth[torch.rand(4, 6, 10) < 0.2] = 0
        features = {"last": maps[:, -6:], "last4": maps}
        losses = grid.step(features, depth, 0.5)
        for spec, found, (plain, own) in zip(grid.specs, losses, alone):
            own.zero_grad()
            predicted = plain(features[spec.representation])[depth > 0]
            g = (predicted + 1e-3).log() - (depth[depth > 0] + 1e-3).log()
            loss = (g.var() + 0.15 * g.mean() ** 2).sqrt()
            loss.backward()
            own.step()
            assert float(found) == pytest.approx(float(loss.detach()), rel=1e-4)
    for head, (plain, _) in zip(grid.heads, alone):
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(head.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)
    assert not grid.step(features, torch.zeros(4, 6, 10), 0.5).any(), "no pixel counts"


def test_depth_metrics_by_hand():
    depth = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    predicted = torch.tensor([[[1.0, 3.0], [8.0, 99.0]]])
    valid = Depth(10, 8, 1).valid(depth)
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
    assert tuple(expected) == DEPTH_METRICS
    found = depth_metrics(predicted, depth, valid, 10)[0].tolist()
    assert found == pytest.approx([*expected.values()], rel=1e-6)


def test_pixels_count_up_to_the_largest_depth_and_in_the_eigen_crop():
    depth = torch.full((480, 640), 10.0)
    depth[100, 100], depth[101, 100], depth[102, 100] = 10.01, 0.0, 0.001
    task, cropped = Depth(10, 8, 1, crop="eigen"), torch.zeros(480, 640)
    cropped[45:471, 41:601] = 1
    assert int((~task.valid(depth)).sum()) == 3
    assert torch.equal(task.valid(depth, test=True), task.valid(depth) & cropped.bool())


def test_learning_rates_of_the_protocols():
    depth = [DEPTH.with_epochs(10).lr_scale(step, 30, 16) for step in range(300)]
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(300) / 300))  # as mmcv: of all steps
    assert depth == pytest.approx(np.minimum(1, np.arange(1, 301) / 100) * cosine)
    protocol = SEGMENTATION.with_epochs(10)
    classes = [protocol.lr_scale(step, 4_000, 16) for step in (0, 1_499, 20_000, 39_999)]
    assert classes == pytest.approx([1 / 1500, 1 - 1499 / 40_000, 0.5, 1 / 40_000])


# runs


@pytest.fixture(scope="module")
def model():
    return open_model("vit_nano8_64_ijepa", random=True, img_size=32)


def depth(model, data, out, **options):
    return evaluate_dense_depth(model, data, out, **{**QUICK, **OPTIONS, **options})


def write_pairs(folder, count=6, meters=2.0):
    for split in ("train", "test"):
        for n in range(count):
            save(np.full((30, 40, 3), 20 * n, np.uint8), folder / split / f"{n}.png")
            write_depth(folder / split / f"{n}_depth.png", meters)
    return folder


def write_depth(file, meters):
    save(np.full((30, 40), meters * 1000, np.uint16), file)


@torch.no_grad()
def maps_of(image, result, model, head):
    """A head on timm's features of the shipped encoder, of an image and its mirror image."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    pixels, encoder = (pixels - mean) / std, create_model(NANO).eval()
    n = 1 if result.chosen.startswith("last ") else 4
    sides = [
        encoder.get_intermediate_layers(side, n=n, reshape=True, norm=True)
        for side in (pixels, pixels.flip(-1))
    ]
    maps = [head(torch.cat(side, dim=1)) for side in sides]
    whole = F.interpolate(maps[0].view(1, -1, *maps[0].shape[-2:]), (64, 64), mode="bilinear")
    torch.testing.assert_close(model(pixels), whole, atol=1e-3, rtol=1e-4)
    return maps


def test_the_test_depths_are_those_of_the_saved_head(tmp_path):
    """Predictions by another route: features by timm, DINOv2's head with the saved weights."""
    data, result = open_depth(SCENES), depth(NANO, SCENES, tmp_path)
    folder = the_one(tmp_path, "*/model")
    saved = create_model(f"local-dir:{folder}").eval()
    assert json.loads((folder / "config.json").read_text())["unit"] == "scene units"
    args = saved.head.args
    plain = PlainHead(args["in_features"], 16, args["depth_range"][1], 2, args["batch_norm"]).eval()
    plain.load_state_dict(saved.head.state_dict())
    errors, mean = [], np.mean([data.train[i][1] for i in range(16)])
    for image, target, _ in data.test:
        sides = maps_of(image, result, saved, plain)
        full = F.interpolate((sides[0] + sides[1].flip(-1))[None] / 2, (64, 64), mode="bilinear")
        known = (target > 0) & (target <= data.max_depth)
        found = np.clip(full[0, 0].numpy(), 1e-3, data.max_depth)
        squares = [(p - target[known]).astype(float) ** 2 for p in (found[known], mean)]
        errors.append([math.sqrt(square.mean()) for square in squares])
    expected = np.mean(errors, axis=0)
    assert result.value == pytest.approx(expected[0], rel=1e-4)
    assert result.baselines["rmse of the mean depth"] == pytest.approx(expected[1], rel=0.05)
    assert result.images == {"train": 14, "val": 2, "test": 5}
    assert result.notes == ["epochs: 2 instead of the protocol's 15"]
    assert min(result.heads, key=lambda head: head.val).name == result.chosen
    assert [head.name for head in result.heads if head.test is not None] == [result.chosen]


def test_cached_features_and_heads_that_are_chosen_on_the_test_set(model, tmp_path):
    online, cached = (
        depth(model, SCENES, tmp_path / str(cached), cached=cached, select_on_test=True)
        for cached in (False, True)
    )
    assert cached.notes[0].startswith("cached: each image")
    for one, other in zip(cached.heads, online.heads):
        assert (one.loss, one.test) == pytest.approx((other.loss, other.test), rel=1e-3)
    assert online.selection == "the test set"
    assert online.value == min(head.test for head in online.heads)
    assert online.images == {"train": 16, "test": 5}


def test_depths_in_other_units_are_noticed_before_the_work(model, tmp_path):
    data = write_pairs(tmp_path / "data", meters=40.0)
    with pytest.raises(DataError, match=r"train/0\.png.*--depth-scale"):
        depth(model, data, tmp_path / "out")
    write_depth(data / "test/0_depth.png", 0)  # unknown
    result = depth(model, data, tmp_path / "out", max_depth=80)
    assert (result.protocol["max_depth"], result.images["test"]) == (80, 5)
    for wrong in ({"pool": "cls"}, {"test": data}, {"max_depth": math.nan}):
        with pytest.raises(SettingsError, match=r"--pool|--test|--max-depth"):
            depth(model, data, tmp_path, **wrong)


def test_iou_of_pixels_at_their_own_size_is_scikit_learns(tmp_path):
    """ADE20K's layout, its masks twice as large as the model's images; by the saved head."""
    ids, root = np.array([1, 5, 40, 150], np.uint8), tmp_path / "ADEChallengeData2016"
    data = open_segmentation("scenes:12,4")
    for split, short, part in (("training", "train", data.train), ("validation", "val", data.test)):
        for n, (image, mask, _) in enumerate(part):
            large = ids[mask].repeat(2, 0).repeat(2, 1)
            large[:3] = 0  # other things
            name = f"{split}/ADE_{short}_{n:08}"
            save(large, root / "annotations" / f"{name}.png")
            save(np.array(image).repeat(2, 0).repeat(2, 1), root / "images" / f"{name}.jpg")
    options = {"epochs": 2, "batch_size": 4, "lrs": (1e-2,), **OPTIONS}
    result = evaluate_segmentation(NANO, tmp_path, tmp_path / "out", **options)
    assert (result.task, result.method, result.unit) == ("ADE20K", "segmentation", "%")
    assert max(result.heads, key=lambda head: head.val).name == result.chosen
    saved = create_model(f"local-dir:{the_one(tmp_path, 'out/*/model')}").eval()
    truths, guesses = [], []
    for path in sorted(root.glob("images/validation/*")):
        mask = root / "annotations/validation" / f"{path.stem}.png"
        target = np.asarray(Image.open(mask)).astype(int) - 1
        image = Image.open(path).resize((64, 64), Image.Resampling.BICUBIC)
        full = F.interpolate(
            maps_of(image, result, saved, saved.head)[0], target.shape, mode="bilinear"
        )
        truths.append(target[target >= 0])
        guesses.append(full[0].argmax(0).numpy()[target >= 0])
    truth, guess = np.concatenate(truths), np.concatenate(guesses)
    there = sorted({*truth} | {*guess})
    assert len({*guess}) > 1
    expected = 100 * reference.jaccard_score(truth, guess, labels=there, average=None)
    found = {
        n: value for n, value in enumerate(result.metrics["IoU"].values()) if value is not None
    }
    assert found == pytest.approx(dict(zip(there, expected)), abs=0.05)
    assert result.value == pytest.approx(np.mean(expected), abs=0.05)
    recall = reference.recall_score(truth, guess, labels=np.unique(truth), average="macro")
    for name, share in {
        "pixel accuracy": reference.accuracy_score(truth, guess),
        "mean class accuracy": recall,
    }.items():
        assert result.metrics[name] == pytest.approx(100 * share, abs=0.05)
    share = 100 * np.bincount(truth).max() / len(truth)
    assert result.baselines["pixel accuracy of the most frequent class"] == pytest.approx(share)
