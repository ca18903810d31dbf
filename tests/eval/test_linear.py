"""The linear probe as a whole: against torch.optim, after a kill, shared, on bad input."""

import copy
import json
import math
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import several_processes
import torch
import torch.nn.functional as F
from PIL import Image
from small_probe import PROTOCOL, TASK, encoder, features_of, pixels_of, write_pictures

import ijepa_zoo
from ijepa_zoo.errors import DataError, RunError, SettingsError
from ijepa_zoo.eval import Subject, evaluate_knn, evaluate_linear
from ijepa_zoo.eval.heads import Grid, HeadSpec, make_grid
from ijepa_zoo.eval.loaders import OnlineLoader
from ijepa_zoo.eval.sets import open_task, split_off_val


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def evaluate(pictures, tmp_path):
    def run(model=None, out=tmp_path / "out", task=TASK, data=pictures, **kwargs):
        kwargs.setdefault("skip_broken", True)
        model = encoder() if model is None else model
        return evaluate_linear(task, model, data, out, device="cpu", workers=0, **kwargs)

    return run


def _trained_alone(head, x, y, lr, weight_decay):
    """torch.optim.SGD on the whole training set at once; returns the last loss."""
    groups = [{"params": head.linear.parameters(), "weight_decay": weight_decay}]
    groups += [{"params": p} for p in head.norm.parameters()]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    head.train()
    for epoch in range(PROTOCOL.epochs):
        share = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * epoch / PROTOCOL.epochs))
        for group in optimizer.param_groups:
            group["lr"] = lr * len(x) / 256 * share
        loss = F.cross_entropy(head(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    return float(loss.detach())


@pytest.mark.parametrize("cached", [False, True])
def test_figures_are_those_of_torch_optim_on_the_extractors_features(evaluate, pictures, cached):
    result = evaluate(cached=cached)
    fit, choose = split_off_val(open_task(TASK, pictures)[0], 0)
    images, labels = pixels_of(pictures, "train")
    tests, answers = pixels_of(pictures, "test")
    x, z = (features_of(encoder(), pixels) for pixels in (images, tests))
    specs = [
        HeadSpec(name, kind, lr, 5e-4)
        for name, kind, lr in product(x, ("linear", "bn"), PROTOCOL.lrs)
    ]
    grid = make_grid(specs, {n: v.shape[1] for n, v in x.items()}, 3, PROTOCOL, 0)
    expected = {}
    for spec, start in zip(grid.specs, grid.modules):
        head, name = copy.deepcopy(start), spec.representation
        loss = _trained_alone(head, x[name][fit], labels[fit], spec.lr, spec.weight_decay)
        with torch.no_grad():
            kept = 100 * (head(x[name][choose]).argmax(1) == labels[choose]).float().mean()
            test = 100 * (head(z[name]).argmax(1) == answers).float().mean()
        expected[spec.name] = (loss, float(kept), float(test))
    assert {h.name for h in result.heads} == expected.keys()
    assert result.images == {"train": len(fit), "val": 36 - len(fit), "test": 21}
    for head in result.heads:
        loss, kept, _ = expected[head.name]
        assert head.loss == pytest.approx(loss, abs=2e-4)
        assert head.val == pytest.approx(kept, abs=1e-3)
    assert result.value == pytest.approx(expected[result.chosen][2], abs=1e-3)


def test_cached_features_with_flips_are_the_protocol_where_nothing_is_cropped(evaluate, tmp_path):
    """Pictures that flips do change; the same draws decide online and cached."""
    folder = write_pictures(tmp_path / "own", train=20)
    for file in folder.rglob("*.png"):
        pixels = np.array(Image.open(file))
        pixels[:, :16] //= 3
        Image.fromarray(pixels).save(file)
    task = replace(TASK, protocol=replace(PROTOCOL, batch_size=16))
    online, cached = (evaluate(task=task, data=folder, cached=c) for c in (False, True))

    for one, other in zip(online.heads, cached.heads):
        assert one.loss == pytest.approx(other.loss, abs=1e-4)
    assert online.value == pytest.approx(cached.value)
    assert online.protocol["features"] != cached.protocol["features"]


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("cached", [False, True])
def test_a_killed_run_goes_on_at_the_last_epoch_exactly(evaluate, tmp_path, monkeypatch, cached):
    task = replace(TASK, protocol=replace(PROTOCOL, batch_size=16))
    whole = evaluate(task=task, out=tmp_path / "whole", cached=cached)
    step, calls = Grid.step, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 6:  # of two steps an epoch: in the last one
            raise _KilledError
        return step(self, *args)

    monkeypatch.setattr(Grid, "step", dying)
    with pytest.raises(_KilledError):
        evaluate(task=task, out=tmp_path / "killed", cached=cached)
    assert len(list(tmp_path.glob("killed/*/state.pt"))) == 1
    before = len(calls)
    resumed = evaluate(task=task, out=tmp_path / "killed", cached=cached)
    assert len(calls) - before == 2
    assert resumed.heads == whole.heads
    assert resumed.value == whole.value
    assert not list(tmp_path.glob("killed/*/state.pt"))


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_killed_after_its_last_epoch_knows_what_could_not_be_decoded(
    evaluate, pictures, tmp_path, monkeypatch, cached
):
    folder = shutil.copytree(pictures, tmp_path / "copy")
    for file in (folder / "train" / "class1").iterdir():
        file.write_bytes(b"no image")
    whole = evaluate(data=folder, out=tmp_path / "whole", cached=cached)
    with monkeypatch.context() as patch:
        patch.setattr("ijepa_zoo.eval.heads.choose_and_test", None)
        with pytest.raises(TypeError, match="NoneType"):
            evaluate(data=folder, out=tmp_path / "killed", cached=cached)
    resumed = evaluate(data=folder, out=tmp_path / "killed", cached=cached)
    assert (resumed.notes, resumed.images) == (whole.notes, whole.images)
    assert any(note.startswith("images that could not be decoded: 12 ") for note in whole.notes)
    assert any("1 ('class1')" in note for note in whole.notes)


def test_a_finished_evaluation_is_not_repeated(evaluate, monkeypatch):
    first = evaluate()
    monkeypatch.setattr("ijepa_zoo.eval.heads.train", None)
    assert evaluate() == first
    with pytest.raises(TypeError, match="NoneType"):
        evaluate(seed=1)
    with pytest.raises(TypeError, match="NoneType"):
        evaluate(model=encoder(1))


def test_one_head_alone_reads_the_test_set_once(evaluate, monkeypatch):
    reads, testing = [], OnlineLoader.testing
    monkeypatch.setattr(OnlineLoader, "testing", lambda self: reads.append(1) or testing(self))
    result = evaluate()
    assert len(reads) == 1
    assert [h.name for h in result.heads if h.test is not None] == [result.chosen]
    best = max(head.val for head in result.heads)
    assert next(h for h in result.heads if h.name == result.chosen).val == best


def test_rates_and_decays_of_the_user(evaluate):
    result = evaluate(lrs=(0.1,), wds=(0.0, 1e-3))
    assert len(result.heads) == 8
    assert {h.name.split(" ", 2)[2] for h in result.heads} == {"lr=0.1 wd=0", "lr=0.1 wd=0.001"}
    with pytest.raises(SettingsError, match="--lrs"):
        evaluate(lrs=(0.0,))


@pytest.mark.parametrize("cached", [False, True])
def test_broken_images_are_named_and_count_nowhere(evaluate, pictures, tmp_path, cached):
    folder = shutil.copytree(pictures, tmp_path / "copy")
    (folder / "test" / "class0" / "3.png").write_bytes(b"no image")
    (folder / "train" / "class1" / "5.png").write_bytes(b"no image")
    result = evaluate(data=folder, cached=cached, select_on_test=True)
    assert result.images == {"train": 35, "test": 20}
    low, high = result.interval
    assert low < result.value < high
    assert round(result.value * 20 / 100, 6).is_integer()
    note = next(n for n in result.notes if "could not be decoded" in n)
    assert note.startswith("images that could not be decoded: 2 ")
    assert "class0/3.png" in note
    assert "class1/5.png" in note


def test_a_broken_image_stops_the_probe_unless_it_is_left_out(evaluate, pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "copy")
    (folder / "test" / "class0" / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"class0/3\.png"):
        evaluate(data=folder, skip_broken=False)


def test_a_class_of_which_no_training_image_can_be_decoded_is_told(evaluate, pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "copy")
    for file in (folder / "train" / "class1").iterdir():
        file.write_bytes(b"no image")
    assert "('class1')" in " ".join(evaluate(data=folder, cached=True).notes)


def test_training_images_of_which_none_can_choose_are_refused(evaluate, tmp_path):
    few = write_pictures(tmp_path / "few", train=1, test=2)
    with pytest.raises(DataError, match=r"\(3 of 3 classes\) leave none .*--select-on-test"):
        evaluate(data=few)
    with pytest.raises(DataError, match="leave none"):
        evaluate_knn(TASK, encoder(), few, tmp_path / "out", device="cpu", workers=0)
    assert evaluate(data=few, select_on_test=True).images == {"train": 3, "test": 6}


def test_baselines_have_figures_and_rows_of_their_own(evaluate, tmp_path, pictures):
    result = evaluate_linear(
        *("classes", "vit_nano8_64_ijepa", pictures, tmp_path / "out"),
        **{"epochs": 1, "cached": True, "baseline": True, "device": "cpu", "workers": 0},
    )
    names = {"vit_nano8_64_ijepa, random weights", "raw pixels"}
    assert result.baselines.keys() == names
    files = list(tmp_path.glob("out/*/result.json"))
    found = {(r := json.loads(file.read_bytes()))["model"]["name"]: r for file in files}
    assert found.keys() == names | {"vit_nano8_64_ijepa.scenes"}
    for name in names:
        assert found[name]["value"] == result.baselines[name]
        assert found[name]["model"]["weights_hash"] != result.model["weights_hash"]
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 4
    assert any("random crops" in note for note in result.notes)
    for folder in tmp_path.glob("out/*/model"):  # the head on random weights opens too
        assert ijepa_zoo.create_model(f"local-dir:{folder}").num_classes == 3


def test_options_that_decide_pixels_are_part_of_the_result(evaluate, tmp_path):
    folder = tmp_path / "deep"
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for kind in range(2):
            (folder / part / str(kind)).mkdir(parents=True)
            for number in range(12):
                pixels = rng.integers(0, 4096 // (1 + kind), (32, 32)).astype(np.uint16)
                Image.fromarray(pixels).save(folder / part / str(kind) / f"{number}.png")
    losses = {
        value_range: [head.loss for head in evaluate(data=folder, value_range=value_range).heads]
        for value_range in ((0, 4095), (0, 1000))
    }
    assert losses[0, 4095] != losses[0, 1000]


@pytest.mark.parametrize("option", [{"lrs": (float("inf"),)}, {"lrs": (1e300,)}, {"wds": (-1.0,)}])
def test_rates_out_of_range_are_refused(evaluate, option):
    with pytest.raises(SettingsError, match=next(iter(option))):
        evaluate(**option)


def test_raw_pixels_have_the_channels_of_the_model(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 16, 16, 4), dtype=np.uint8)
    np.savez(tmp_path / "four.npz", images=images, labels=np.arange(40) % 2)
    options = {"in_chans": 4, "img_size": 32}
    model = ijepa_zoo.create_model("vit_tiny16_ijepa", pretrained=False, **options)
    folder = ijepa_zoo.export(model, tmp_path / "export")
    result = evaluate_knn(
        *("classes", str(folder), str(tmp_path / "four.npz"), tmp_path / "out"),
        **{"baseline": True, "device": "cpu", "workers": 0},
    )
    assert "raw pixels" in result.baselines


def test_three_processes_give_the_figures_of_one(evaluate, pictures, tmp_path):
    script = """
        import sys
        sys.path.insert(0, sys.argv[3])
        from dataclasses import replace
        import small_probe
        from ijepa_zoo.eval import evaluate_linear, heads

        task = replace(small_probe.TASK, protocol=replace(small_probe.PROTOCOL, batch_size=16))
        if sys.argv[4] == "killed":  # after the last epoch
            heads.choose_and_test = None
        evaluate_linear(task, small_probe.encoder(), sys.argv[1], sys.argv[2],
                        cached=sys.argv[5] == "cached", device="cpu", workers=0,
                        skip_broken=True)
    """
    pictures = shutil.copytree(pictures, tmp_path / "copy")
    (pictures / "train" / "class1" / "5.png").write_bytes(b"no image")  # one process reads it
    arguments = (script, 3, pictures, tmp_path / "three", Path(__file__).parent)
    ended = several_processes.finish(several_processes.start(*arguments, "killed", "online"))
    assert [status != 0 for status, _ in ended] == [True] * 3
    for features in ("online", "cached"):
        several_processes.run(*arguments, "repeated", features)
    task = replace(TASK, protocol=replace(PROTOCOL, batch_size=16))
    for cached in (False, True):
        one = evaluate(task=task, data=pictures, cached=cached)
        features = "cached" if cached else "online"
        (file,) = tmp_path.glob(f"three/*linear-{features}*/result.json")
        three = json.loads(file.read_bytes())
        assert three["value"] == one.value
        assert (three["images"], three["notes"]) == (one.images, one.notes)
        assert "could not be decoded: 1 (" in one.notes[-1]
        assert [h["val"] for h in three["heads"]] == [h.val for h in one.heads]
        losses = [h.loss for h in one.heads]
        assert [h["loss"] for h in three["heads"]] == pytest.approx(losses, abs=1e-5)
        assert three["runtime"]["processes"] == 3


def test_features_that_are_not_finite_are_refused(evaluate):
    model = encoder()
    model.norm.weight.data[3] = torch.nan
    for cached in (False, True):
        with pytest.raises(RunError, match="NaN or infinite"):
            evaluate(model=model, cached=cached)


def test_a_model_of_one_channel_reads_greyscale(evaluate):
    assert 0 <= evaluate(model=encoder(in_chans=1)).value <= 100


def test_models_that_do_not_fit_are_refused(evaluate):
    with pytest.raises(SettingsError, match="2 blocks"):
        evaluate(model=encoder(depth=2))
    with pytest.raises(SettingsError, match="Linear"):
        evaluate(model=torch.nn.Linear(2, 2))


def test_the_papers_figure_stands_beside_those_weights_and_their_protocol_alone(evaluate):
    task = replace(TASK, paper={"some.weights": 86.7})
    some = Subject(encoder(), "a", "some.weights")
    assert evaluate(some, task=task).paper == 86.7
    assert evaluate(Subject(encoder(1), "a", "other.weights"), task=task).paper is None
    for change in ({"epochs": 1}, {"lrs": (0.1,)}, {"select_on_test": True}):
        result = evaluate(some, task=task, **change)
        assert result.paper is None
        assert any("86.7 % with another protocol" in note for note in result.notes)


@pytest.mark.parametrize("cached", [False, True])
def test_test_images_of_which_none_can_be_decoded_are_refused(evaluate, pictures, tmp_path, cached):
    folder = shutil.copytree(pictures, tmp_path / "copy")
    for file in (folder / "test").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"21 test images .*test/class0/0\.png"):
        evaluate(data=folder, cached=cached)
