"""A timed step is the trainer's, and a contender that computes something else is found out."""

import logging
import sys

import pytest
import torch
from published_stub import write_stub

from ijepa_zoo import bench
from ijepa_zoo.bench import DisagreementError
from ijepa_zoo.bench.fresh import FreshProcessError, in_fresh_process, in_ranks
from ijepa_zoo.bench.growth import time_rank
from ijepa_zoo.bench.machine import measures_memory
from ijepa_zoo.bench.published import published_code
from ijepa_zoo.bench.published_step import PublishedStep
from ijepa_zoo.bench.steps import OurStep, StepSettings
from ijepa_zoo.bench.training import compare_losses, memory_of_updates

SMALL = StepSettings(model="vit_nano8_64_ijepa", batch_size=2, device="cpu")


def same_state(one, two):
    first, second = one.trainer.tensors(), two.trainer.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_phases_are_an_update():
    whole, parts = OurStep(SMALL), OurStep(SMALL)
    for _ in range(2):
        whole.update()
        names = list(parts.phases())
    assert names == [
        "input", "target forward", "context forward", "predictor forward", "backward",
        "optimizer", "moving average",
    ]  # fmt: skip
    assert same_state(whole, parts)
    whole.passes(exchange=True)  # changes nothing but gradients
    assert same_state(whole, parts)


def test_published_code_agrees(tmp_path):
    ours = OurStep(SMALL)
    other = PublishedStep(published_code(write_stub(tmp_path)), ours, "fp32")
    found = compare_losses(ours, other, 1e-5, "fp32")
    assert found["difference"] < 1e-5
    assert list(other.phases()) == list(ours.phases())


@pytest.mark.parametrize(
    "change",
    [
        {"SLOWER = 1.0": "SLOWER = 100.0"},
        {"found = self.own": "found = 1.001 * self.own"},
        {"torch.stack(targets, dim=1)": "torch.stack(targets[::-1], dim=1)"},
        {"for m in masks]": "for m in masks[::-1]]"},
    ],
)
def test_another_method_is_an_error(tmp_path, change):
    ours = OurStep(SMALL)
    other = PublishedStep(published_code(write_stub(tmp_path, **change)), ours, "fp32")
    with pytest.raises(DisagreementError, match="losses of the first 3 updates in fp32"):
        compare_losses(ours, other, 1e-5, "fp32")


def test_train(tmp_path, monkeypatch):
    monkeypatch.setattr("ijepa_zoo.bench.training.in_fresh_process", lambda f, **unused: 1000)
    monkeypatch.setattr("ijepa_zoo.bench.training.matrix_peak", lambda *unused: 1e12)
    found = bench.train(
        model=SMALL.model, batch_size=2, precision="bf16", device="cpu", vs=["published"],
        published_path=write_stub(tmp_path), seconds=0.1, rounds=3,
    )  # fmt: skip
    assert found.agreement["published in fp32"]["difference"] <= 1e-5
    assert found.agreement["published"]["tolerance"] == 2e-2
    ours = found.results["ijepa_zoo"]
    assert ours["images_per_second"] == pytest.approx(2 / ours["seconds"]["median"])
    flops = found.extra["gflop_per_image"]
    assert flops["all"] == pytest.approx(sum(v for name, v in flops.items() if name != "all"))
    assert ours["fraction_of_peak"] == pytest.approx(
        ours["images_per_second"] * flops["all"] * 1e9 / 1e12
    )
    assert len(found.results["published"]["phases_ms"]) == 7
    assert found.ratios["published"]["count"] == 3


def test_published_code_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "src", sys)  # a user's own package of that name
    before = (sys.path[:], logging.getLogger().handlers[:], logging.getLogger().level)
    code = published_code(write_stub(tmp_path))
    assert code.helper.init_opt
    assert (sys.path, logging.getLogger().handlers, logging.getLogger().level) == before
    assert sys.modules["src"] is sys
    assert not [name for name in sys.modules if name.startswith("src.")]


def test_missing_clone_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"git clone .* and --published-path ijepa"):
        bench.train(vs=["published"])
    with pytest.raises(ValueError, match=r"it has no src/helper\.py"):
        bench.masks(vs=["published"], published_path=tmp_path)
    with pytest.raises(ValueError, match="use img_size=56 or more"):
        bench.train(model=SMALL.model, img_size=32, device="cpu")
    with pytest.raises(ValueError, match="has no contender timm: use published"):
        bench.train(vs=["timm"])


@pytest.mark.parametrize(
    ("file", "text", "error", "message"),
    [
        ("helper", "def x(:", ValueError, r"cannot be used \(src/helper\.py: SyntaxError: .*again"),
        ("helper", "1 / 0", ValueError, r"src/helper\.py: ZeroDivisionError"),
        ("helper", "import src.nothing", ValueError, r"src/helper\.py: ModuleNotFoundError"),
        ("helper", "from src.broken import x", ValueError, r"src/broken\.py: KeyError"),
        ("masks/multiblock", "", ValueError, r"src/masks/multiblock\.py: it has no MaskCollator"),
        ("transforms", "import nowhere.x", ImportError, "is not installed: pip install nowhere$"),
    ],
)
def test_broken_clone_is_a_sentence(tmp_path, file, text, error, message):
    write_stub(tmp_path)
    (tmp_path / "src" / "broken.py").write_text("{}[1]")
    (tmp_path / "src" / f"{file}.py").write_text(text)
    with pytest.raises(error, match=message) as caught:
        bench.masks(vs=["published"], published_path=tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not measures_memory(), reason="this system does not tell")
def test_memory_is_measured_in_a_process_of_its_own():
    settings = {"model": SMALL.model, "batch_size": 2, "device": "cpu"}
    most = in_fresh_process(
        memory_of_updates,
        settings=settings,
        published_path=None,
        published_precision="fp32",
        threads=1,
    )
    weights = sum(p.nbytes for p in OurStep(SMALL).trainer.model.parameters())
    assert 2 * weights < most < 1 << 30


def test_last_words_of_a_process_are_passed_on(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho 'no memory left' >&2\nexit 1\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(FreshProcessError, match="memory_of_updates failed: no memory left"):
        in_fresh_process(memory_of_updates)


def test_ranks_exchange_all_gradients():
    settings = {"model": SMALL.model, "batch_size": 2, "device": "cpu"}
    found = in_ranks(time_rank, 2, settings=settings, threads=1)
    trained = [p for p in OurStep(SMALL).trainer.model.parameters() if p.requires_grad]
    assert found["bytes_exchanged"] == sum(p.nbytes for p in trained)  # 2 (N - 1) / N = 1
    assert found["images_per_second"] == pytest.approx(4 / found["step_seconds"])
    assert 0 <= found["exchange_hidden"] <= 1


def test_scaling_goes_along_each_axis(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "ijepa_zoo.bench.growth.in_ranks", lambda f, world, **rest: asked.append(world) or {}
    )
    found = bench.scaling(
        models=[SMALL.model], img_sizes=[64, 128], batch_sizes=[1], ranks=[1, 3],
        device="cpu", gpu_model=SMALL.model, seconds=0.1, rounds=3,
    )  # fmt: skip
    assert list(found.results) == [
        f"model {SMALL.model}", "img_size 64", "img_size 128", "batch_size 1", "ranks 1", "ranks 3",
    ]  # fmt: skip
    assert asked == [1, 3]
    rows = found.results["img_size 128"], found.results["img_size 64"]
    large, small = (row["tflop_per_second"] / row["images_per_second"] for row in rows)
    assert 4 < large / small < 7  # operations per image: four times the tokens
