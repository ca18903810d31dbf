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
from small_probe import OPTIONS, break_files, the_one
from torch import nn

from ijepa_zoo import cli, create_model
from ijepa_zoo.data.dense import open_depth, open_segmentation
from ijepa_zoo.errors import DataError, ImageError, SettingsError
from ijepa_zoo.eval import evaluate_dense_depth, evaluate_segmentation, open_model, read_result
from ijepa_zoo.eval.dense_tasks import (
    DEPTH_METRICS,
    DenseProtocol,
    Depth,
    DepthProtocol,
    Segmentation,
    depth_metrics,
)
from ijepa_zoo.eval.dense_training import make_dense_grid
from ijepa_zoo.eval.runs import EpochState

PROTOCOL = DepthProtocol(epochs=2, batch_size=4, lrs=(3e-3, 1e-2), bins=16, upsample=2)
SEGMENTATION = DenseProtocol(epochs=2, batch_size=4, lrs=(3e-3, 1e-2))
NANO, SCENES = "vit_nano8_64_ijepa", "scenes:16,5"


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


def test_heads_of_the_grid_equal_dinov2s_head_trained_alone():
    task, protocol = Depth(10, bins=7, upsample=2), replace(PROTOCOL, lrs=(0.01, 0.1))
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
    before = [p.clone() for p in grid.heads.parameters()]
    depth = torch.zeros(4, 6, 10)
    depth[0, 0, 0] = 1  # one pixel has no variance
    assert not grid.step(features, depth, 0.5).any()
    assert all(torch.equal(p, q) for p, q in zip(before, grid.heads.parameters()))


def test_depth_loss_is_dinov2s():
    predicted = torch.rand(3, 1, 4, 5, dtype=torch.float64) * 5 + 1
    depth = torch.rand(3, 4, 5, dtype=torch.float64) * 5
    depth[0, :2] = 0
    logs = [np.log(part[depth > 0].numpy() + 1e-3) for part in (predicted[:, 0], depth)]
    g = logs[0] - logs[1]
    expected = math.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2)
    np.testing.assert_allclose(Depth(10, 8, 1).loss(predicted, depth), expected, rtol=1e-6)


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
    protocol = DepthProtocol(epochs=10)
    depth = [protocol.lr_scale(step, 30, 16) for step in range(300)]
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(300) / 300))  # as mmcv: of all steps
    assert depth == pytest.approx(np.minimum(1, np.arange(1, 301) / 100) * cosine)
    protocol = DenseProtocol(epochs=10)
    classes = [protocol.lr_scale(step, 4_000, 16) for step in (0, 1_499, 20_000, 39_999)]
    assert classes == pytest.approx([1 / 1500, 1 - 1499 / 40_000, 0.5, 1 / 40_000])


def test_segmentation_metrics_are_scikit_learns():
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
    per_class = reference.jaccard_score(truth, guess, average=None)
    assert list(task.more(total[0])["IoU"].values())[:5] == pytest.approx(100 * per_class)
    assert task.more(total[0])["IoU"]["5"] is None
    expected = [
        reference.jaccard_score(truth, guess, average="macro"),
        reference.accuracy_score(truth, guess),
        reference.balanced_accuracy_score(truth, guess),
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


def test_classes_outside_the_data_are_refused():
    Segmentation(3).check(torch.tensor([[0.0, 2.0, 255.0]]))
    for wrong in (-1.0, 3.0):
        with pytest.raises(ImageError, match=f"class {wrong:g}"):
            Segmentation(3).check(torch.tensor([[0.0, wrong]]))


# runs


@pytest.fixture(scope="module")
def model():
    return open_model(NANO, random=True, img_size=32)


def depth(model, data, out, **options):
    return evaluate_dense_depth(model, data, out, **{"protocol": PROTOCOL, **OPTIONS, **options})


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, depth(model, SCENES, out)


def test_a_run_leaves_a_result_and_a_head(finished):
    out, result = finished
    file = the_one(out, "*/result.json")
    assert read_result(file).value == result.value
    assert {f.name for f in file.parent.iterdir()} - {".lock"} == {"model", "result.json"}
    assert result.images == {"train": 14, "val": 2, "test": 5}
    parts = [(part["split"], part["images"], part["name"]) for part in result.data.values()]
    assert parts == [("rendered", 16, SCENES), ("rendered", 5, SCENES)]
    assert result.notes == []
    assert len(result.heads) == 8
    assert min(result.heads, key=lambda head: head.val).name == result.chosen
    assert [head.test is not None for head in result.heads].count(True) == 1
    data, baselines = open_depth(SCENES), result.baselines
    depths = np.stack([data.train[i][1] for i in range(16)])
    errors = [np.sqrt(((depths.mean() - data.test[i][1]) ** 2).mean()) for i in range(5)]
    assert baselines["rmse of the mean depth"] == pytest.approx(np.mean(errors), rel=0.05)
    assert baselines["rmse of the mean depth map"] < baselines["rmse of the mean depth"]


def test_the_test_depths_are_those_of_the_saved_head(tmp_path):
    """Predictions by another route: features by timm, DINOv2's head with the saved weights."""
    name = "vit_nano8_64_ijepa.photos"
    result = depth(name, SCENES, tmp_path)
    folder = the_one(tmp_path, "*/model")
    saved = create_model(f"local-dir:{folder}").eval()
    assert json.loads((folder / "config.json").read_text())["unit"] == "scene units"
    args, data = saved.head.args, open_depth(SCENES)
    plain = PlainHead(args["in_features"], 16, args["depth_range"][1], 2, args["batch_norm"])
    plain.load_state_dict(saved.head.state_dict())
    errors = []
    for image, target, _ in data.test:
        pixels = _normalized(image, saved)
        sides = [_maps(name, side, result, plain.eval()) for side in (pixels, pixels.flip(-1))]
        whole = F.interpolate(sides[0][None], (64, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(saved(pixels), whole, atol=1e-3, rtol=1e-4)
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


def test_cached_features_give_the_same_metrics(finished, model, tmp_path):
    cached, online = depth(model, SCENES, tmp_path, cached=True), finished[1]
    assert cached.notes[0].startswith("cached: each image")
    assert cached.value == pytest.approx(online.value, rel=1e-3)
    assert [h.val for h in cached.heads] == pytest.approx([h.val for h in online.heads], rel=1e-3)


def test_a_killed_run_resumes_with_the_same_numbers(model, tmp_path, monkeypatch):
    data, original = write_pairs(tmp_path / "data"), EpochState.save
    break_files([data / "test/3.png", data / "train/4_depth.png"])
    with pytest.raises(DataError, match=r"\d(_depth)?\.png"):
        depth(model, data, tmp_path / "whole")
    whole = depth(model, data, tmp_path / "whole", skip_broken=True)

    def kill(self, state):
        original(self, state)
        raise KeyboardInterrupt

    for _ in range(2):  # after each epoch
        with monkeypatch.context() as patch:
            patch.setattr(EpochState, "save", kill)
            with pytest.raises(KeyboardInterrupt):
                depth(model, data, tmp_path / "killed", skip_broken=True)
    result = depth(model, data, tmp_path / "killed", skip_broken=True)
    assert (result.heads, result.value) == (whole.heads, whole.value)
    assert (result.notes, result.images) == (whole.notes, whole.images)
    assert result.baselines == whole.baselines
    assert result.images == {"train": 4, "val": 1, "test": 5}
    assert all(name in result.notes[-1] for name in ("test/3.png", "train/4_depth.png"))


def test_select_on_test_reads_it_with_every_head(model, tmp_path):
    result = depth(model, SCENES, tmp_path, select_on_test=True)
    assert result.selection == "the test set"
    assert result.value == min(head.test for head in result.heads)
    assert result.images == {"train": 16, "val": 0, "test": 5}
    assert {head.val for head in result.heads} == {None}


def write_pairs(folder, count=6, meters=2.0):
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            Image.new("RGB", (40, 30), (20 * n, 0, 0)).save(folder / split / f"{n}.png")
            write_depth(folder / split / f"{n}_depth.png", meters)
    return folder


def write_depth(file, meters):
    Image.fromarray(np.full((30, 40), meters * 1000, np.uint16)).save(file)


def test_depths_in_other_units_are_noticed_before_the_work(model, tmp_path):
    data = write_pairs(tmp_path / "data", meters=40.0)
    break_files([data / "train/0_depth.png"])
    with pytest.raises(DataError, match=r"train/0\.png.*--depth-scale"):
        depth(model, data, tmp_path / "out", skip_broken=True)
    result = depth(model, data, tmp_path / "out", max_depth=80, skip_broken=True)
    assert result.protocol["max_depth"] == 80
    with pytest.raises(SettingsError, match="lrs"):
        depth(model, data, tmp_path, lrs=(0.1,))
    for wrong in (0, -1.0, math.nan, math.inf):
        with pytest.raises(SettingsError, match="--max-depth"):
            depth(model, data, tmp_path, max_depth=wrong)


def test_pairs_without_a_pixel_that_counts_are_counted(model, tmp_path):
    data = write_pairs(tmp_path / "data")
    for name, meters in (("train/0", 0), ("test/0", 0), ("test/5", 30)):  # unknown; beyond 10 m
        write_depth(data / f"{name}_depth.png", meters)
    result = depth(model, data, tmp_path / "out")
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
    words = ["eval", "depth", "--task", "dense", "--model", NANO, "--random", "--img-size", "32"]
    words += ["--epochs", "1", "--batch-size", "4", "--device", "cpu", "--quiet", "--workers", "0"]
    assert cli.main([*words, "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    result = read_result(the_one(tmp_path / "out", "*/result.json"))
    assert math.isfinite(result.value)
    assert result.images == {"train": 10, "val": 1, "test": 3}
    assert (result.protocol["crop"], result.protocol["max_depth"]) == ("eigen", 10)


# segmentation


@pytest.fixture
def masks(tmp_path):
    """Images whose color is their class: 0 black, 1 red, 2 green; a column is ignored."""
    colors = np.array([(0, 0, 0), (220, 0, 0), (0, 220, 0)], np.uint8)
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for n in range(count):
            mask = rng.integers(0, 3, (4, 4)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
            paths = [tmp_path / "data" / kind / split / f"{n}.png" for kind in ("images", "masks")]
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(colors[mask]).save(paths[0])
            mask[:, :3] = 255
            Image.fromarray(mask).save(paths[1])
    return tmp_path / "data"


def test_segmentation_learns_colors(masks, tmp_path):
    protocol, model = replace(SEGMENTATION, epochs=20), open_model(NANO, random=True)
    options = {"protocol": protocol, "cached": True, **OPTIONS}
    result = evaluate_segmentation(model, masks, tmp_path / "out", **options)
    assert result.value > 90
    assert (result.metric, result.unit, result.higher_is_better) == ("mean IoU", "%", True)
    assert max(result.heads, key=lambda head: head.val).name == result.chosen
    assert set(result.metrics) == {"pixel accuracy", "mean class accuracy", "IoU"}
    assert result.baselines["mean IoU of the most frequent class"] < 20


@pytest.mark.parametrize("mask", [np.zeros((64, 32), np.uint8), b"\x89PNG", None])
def test_masks_that_do_not_fit_are_named(model, masks, tmp_path, mask):
    path = masks / "masks/train/2.png"
    if isinstance(mask, bytes):
        path.write_bytes(mask)
    elif mask is None:
        path.unlink()
    else:
        Image.fromarray(mask).save(path)
    with pytest.raises(DataError, match=r"train/2\.png"):
        evaluate_segmentation(model, masks, tmp_path / "out", protocol=SEGMENTATION, **OPTIONS)


def test_iou_of_pixels_at_their_own_size_is_scikit_learns(tmp_path):
    """ADE20K's layout, its masks twice as large as the model's images; by the saved head."""
    ids, root = np.array([1, 5, 40, 150], np.uint8), tmp_path / "ADEChallengeData2016"
    data = open_segmentation("scenes:12,4")
    for split, short, part in (("training", "train", data.train), ("validation", "val", data.test)):
        for n, (image, mask, _) in enumerate(part):
            large = ids[mask].repeat(2, 0).repeat(2, 1)
            large[:3] = 0  # other things
            name, pixels = f"{split}/ADE_{short}_{n:08}", Image.fromarray(np.array(image))
            for path, picture in ((f"images/{name}.jpg", pixels.resize((128, 128))),
                                  (f"annotations/{name}.png", Image.fromarray(large))):  # fmt: skip
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                picture.save(root / path)
    rows = [f"{n}\t0.1\t9\t9\t1\tthing {n}, object  " for n in range(1, 151)]
    header = "Idx\tRatio\tTrain\tVal\tStuff\tName"
    (root / "objectInfo150.txt").write_text("\n".join([header, *rows]) + "\n")
    name = "vit_nano8_64_ijepa.photos"
    options = {"protocol": replace(SEGMENTATION, lrs=(1e-2,)), **OPTIONS}
    result = evaluate_segmentation(name, tmp_path, tmp_path / "out", **options)
    assert (result.task, result.method) == ("ADE20K", "segmentation")
    folder = the_one(tmp_path, "out/*/model")
    saved = create_model(f"local-dir:{folder}").eval()
    assert saved.class_names == list(result.metrics["IoU"])
    assert saved.class_names[-1] == "thing 150, object"
    truths, guesses = [], []
    for path in sorted(root.glob("images/validation/*")):
        mask = root / "annotations/validation" / f"{path.stem}.png"
        target = np.asarray(Image.open(mask)).astype(int) - 1
        image = Image.open(path).resize((64, 64), Image.Resampling.BICUBIC)
        pixels = _normalized(image, saved)
        patches = _maps(name, pixels, result, saved.head)
        whole = F.interpolate(patches, (64, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(saved(pixels), whole, atol=1e-4, rtol=1e-4)
        full = F.interpolate(patches, target.shape, mode="bilinear", align_corners=False)
        truths.append(target[target >= 0])
        guesses.append(full[0].argmax(0).numpy()[target >= 0])
    truth, guess = np.concatenate(truths), np.concatenate(guesses)
    there = sorted({*truth} | {*guess})
    assert len({*guess}) > 1
    expected = 100 * reference.jaccard_score(truth, guess, labels=there, average=None)
    found = list(result.metrics["IoU"].values())
    assert [n for n, value in enumerate(found) if value is not None] == there
    assert [found[n] for n in there] == pytest.approx(list(expected), abs=0.05)
    assert result.value == pytest.approx(np.mean(expected), abs=0.05)
    accuracy = 100 * reference.accuracy_score(truth, guess)
    assert result.metrics["pixel accuracy"] == pytest.approx(accuracy, abs=0.05)


def test_the_command_for_segmentation_with_a_baseline(tmp_path, capsys):
    words = ["eval", "segmentation", "--model", NANO, "--data", "scenes:8,4", "--img-size", "32"]
    words += ["--epochs", "1", "--batch-size", "4", "--device", "cpu", "--quiet", "--baseline"]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    assert "mean IoU (%)" in capsys.readouterr().out
    results = {r.model["name"]: r for r in map(read_result, tmp_path.glob("*/result.json"))}
    random = results.pop(f"{NANO}, random weights")
    (own,) = results.values()
    assert own.baselines[f"{NANO}, random weights"] == random.value
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3
    assert cli.main(["eval", "report", str(tmp_path), "--out", str(tmp_path / "report.md")]) == 0
    assert "the most frequent class" in (tmp_path / "report.md").read_text()
