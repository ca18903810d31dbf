"""A timed step is the trainer's, and a contender that computes something else is found out."""

import logging
import sys

import pytest
import torch
from published_stub import write_stub

from ijepa_zoo import bench
from ijepa_zoo.bench import DisagreementError, machine
from ijepa_zoo.bench.agreement import compare_losses
from ijepa_zoo.bench.fresh import FreshProcessError, in_fresh_process, in_ranks
from ijepa_zoo.bench.growth import time_rank
from ijepa_zoo.bench.machine import data_sheet_peak, matrix_peak, measures_memory, peak_precision
from ijepa_zoo.bench.published import published_code
from ijepa_zoo.bench.published_step import PublishedStep
from ijepa_zoo.bench.steps import OurStep, StepSettings
from ijepa_zoo.bench.training import fresh_updates

PAIR = ("ijepa_zoo", "published")
SMALL = StepSettings(model="vit_nano8_64_ijepa", batch_size=2, device="cpu")


def same_state(one, two):
    first, second = one.trainer.tensors(), two.trainer.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def agreement(ours, other):
    steps, precisions = dict(zip(PAIR, (ours, other))), dict.fromkeys(PAIR, "fp32")
    return compare_losses(steps, precisions, {"published": 1e-5})["published"]


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
    found = agreement(ours, other)
    assert found["difference"] < 1e-5
    assert found["what"] == "losses of the first 3 updates in fp32, relative,"
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
        agreement(ours, other)


@pytest.fixture
def quick(monkeypatch):
    """The processes of their own that the bench started."""
    started = []

    def fresh(function, **arguments):
        started.append(arguments)
        return {"peak_memory_bytes": 1000}

    monkeypatch.setattr("ijepa_zoo.bench.training.in_fresh_process", fresh)
    monkeypatch.setattr("ijepa_zoo.bench.training.matrix_peak", lambda *unused: 1e12)
    return started


def test_train(tmp_path, quick):
    found = bench.train(
        model=SMALL.model, batch_size=2, precision="bf16", device="cpu", vs=["published"],
        published_path=write_stub(tmp_path), seconds=0.1, rounds=3,
    )  # fmt: skip
    assert found.agreement["published in fp32"]["difference"] <= 1e-5
    assert found.agreement["published"]["tolerance"] == 2e-2
    ours = found.results["ijepa_zoo"]
    assert ours["images_per_second"] == pytest.approx(2 / ours["seconds"]["median"])
    flops = found.extra["gflop_per_image"]
    parts = [v for name, v in flops.items() if name not in ("all", "published")]
    assert flops["all"] == pytest.approx(sum(parts))
    other = found.results["published"]
    rate = other["images_per_second"] * flops["published"] / 1e3
    assert other["tflop_per_second"] == pytest.approx(rate)
    assert flops["published"] != pytest.approx(flops["all"], rel=1e-3)  # counted on its own
    assert ours["fraction_of_peak"] == pytest.approx(
        ours["images_per_second"] * flops["all"] * 1e9 / 1e12
    )
    assert ours["peak_precision"] == "bf16"
    assert "of the measured bf16 peak" in str(found)
    assert len(found.results["published"]["phases_ms"]) == 7
    assert [one["published_path"] for one in quick] == [None, str(tmp_path)]
    assert found.ratios["published"]["count"] == 3


def test_float8_against_our_own_bf16(quick):
    pytest.importorskip("torchao")
    found = bench.train(
        model=SMALL.model, batch_size=2, precision="fp8", device="cpu", vs=["bf16"],
        seconds=0.1, rounds=3,
    )  # fmt: skip
    compared = found.agreement["bf16"]
    assert compared["what"] == "losses of the first 3 updates in fp8 and bf16, relative,"
    assert 0 < compared["difference"] < compared["tolerance"] == 2e-2
    assert found.ratios["bf16"]["count"] == 3
    assert [one["settings"]["precision"] for one in quick] == ["fp8", "bf16"]
    peaks = {name: figures["peak_precision"] for name, figures in found.results.items()}
    assert peaks == {"ijepa_zoo": "fp32", "bf16": "bf16"}  # float8 is emulated by float32 here
    assert "fp8: emulated in float32" in str(found)
    assert " --precision fp8 --device cpu --vs bf16 " in found.command


def test_float8_has_a_peak_of_its_own(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    multiplied, product = [], torch._scaled_mm

    def watched(left, right, **options):
        multiplied.append((left.dtype, right.dtype, options["use_fast_accum"]))
        return product(left, right, **options)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    monkeypatch.setitem(machine._SIDE, "cpu", 64)
    assert matrix_peak(cpu, "fp8", seconds=0.0) > 0
    assert multiplied == [(torch.float8_e4m3fn, torch.float8_e4m3fn, True)]
    assert peak_precision(cpu, "fp8") == "fp32"
    assert peak_precision(gpu, "fp8") == "fp8"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert data_sheet_peak(gpu, "fp8") == pytest.approx(2 * data_sheet_peak(gpu, "bf16"), rel=1e-3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert data_sheet_peak(gpu, "fp8") is None


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
    with pytest.raises(ValueError, match="has no contender timm: use published or bf16"):
        bench.train(vs=["timm"])
    with pytest.raises(ValueError, match="use --precision fp8 or fp32"):
        bench.train(vs=["bf16"], precision="bf16")
    with pytest.raises(ValueError, match="bf16 is used with --vs published only"):
        bench.train(published_precision="bf16")


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
    found = in_fresh_process(
        fresh_updates,
        settings=settings,
        published_path=None,
        published_precision="fp32",
        threads=1,
    )
    weights = sum(p.nbytes for p in OurStep(SMALL).trainer.model.parameters())
    assert 2 * weights < found["peak_memory_bytes"] < 1 << 30
    assert "compiled_graphs" not in found


def test_last_words_of_a_process_are_passed_on(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho 'no memory left' >&2\nexit 1\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(FreshProcessError, match="fresh_updates failed: no memory left"):
        in_fresh_process(fresh_updates)


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
