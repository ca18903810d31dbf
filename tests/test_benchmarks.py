"""The scripts of examples/benchmarks run, small, on a CPU."""

import json
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


def test_tables_are_made_from_the_results():
    import tables

    text = (SCRIPTS / "README.md").read_text()
    assert "<!-- results: " in text
    assert tables.fill(text) == text, "python examples/benchmarks/tables.py README.md"
