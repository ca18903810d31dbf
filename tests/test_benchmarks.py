"""The scripts of examples/benchmarks run, small, on a CPU."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_gpu_run_in_small(tmp_path, monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--out", str(tmp_path)])
    gpu.main()
    results = json.loads((tmp_path / "results.json").read_text())
    log = (tmp_path / "log.txt").read_text()
    assert {name: step["status"] for name, step in results.items()} == {
        "tests": "done", "train bf16": "done", "features": "done"
    }, log  # fmt: skip
    assert set(results["features"]["ratios"]) == {
        "timm", "transformers", "timm, bare model", "transformers, bare model"
    }  # fmt: skip
    for step in results.values():
        for row in step.get("metrics", {}).values():
            assert row["images_per_second"] > 0
    assert "train bf16         done" in capsys.readouterr().out


def test_gpu_run_goes_on_when_a_step_fails_or_hangs(tmp_path, monkeypatch):
    import gpu

    planned = [
        gpu.Step("fails", ["-c", "print('why'); raise SystemExit(3)"], 60),
        gpu.Step("hangs", ["-c", "import time; time.sleep(60)"], 1),
        gpu.Step("works", ["-c", "pass"], 60),
    ]
    monkeypatch.setattr(gpu, "steps", lambda args: planned)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    gpu.main()
    results = json.loads((tmp_path / "results.json").read_text())
    status = [one["status"] for one in results.values()]
    assert status == ["exit code 3", "stopped after 1 s", "done"]
    assert "why" in (tmp_path / "log.txt").read_text()


@pytest.mark.skipif("IJEPA_OFFICIAL" not in os.environ, reason="IJEPA_OFFICIAL: the official clone")
@pytest.mark.parametrize(
    "command",
    [
        ("train_step.py", "--model", "vit_nano8_64_ijepa", "--vs", "official"),
        ("masks.py",),
        ("crops.py",),
    ],
)
def test_official_step_agrees(tmp_path, monkeypatch, command):
    out = tmp_path / "result.json"
    options = ["--official", os.environ["IJEPA_OFFICIAL"], "--rounds", "3", "--seconds", "1"]
    monkeypatch.setattr(sys, "argv", [*command, *options, "--out", str(out)])
    runpy.run_path(str(SCRIPTS / command[0]), run_name="__main__")
    assert json.loads(out.read_text())["ratios"]["official"]["median"] > 0


def test_tables_are_made_from_the_results():
    import tables

    text = (SCRIPTS / "README.md").read_text()
    assert "<!-- results: " in text
    assert tables.fill(text) == text, "python examples/benchmarks/tables.py README.md"
