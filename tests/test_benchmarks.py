"""The scripts of examples/benchmarks run, small, on a CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "examples" / "benchmarks"


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gpu_run_in_small(tmp_path):
    out = run(SCRIPTS / "gpu.py", "--smoke", "--minutes", "4", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    log = (tmp_path / "log.txt").read_text()
    assert {step["status"] for step in results.values()} == {"done"}, log
    assert list(results) == [
        "tests", "train bf16", "features", "train bf16 cuDNN", "train bf16 eager"
    ]  # fmt: skip
    assert set(results["features"]["ratios"]) == {
        "timm", "transformers", "timm, bare model", "transformers, bare model"
    }  # fmt: skip
    for step in results.values():
        for row in step.get("metrics", {}).values():
            assert row["images_per_second"] > 0
    assert "train bf16 eager   done" in out


def test_gpu_run_goes_on_when_a_step_fails_or_hangs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu

    monkeypatch.setattr(
        gpu,
        "steps",
        lambda args: [
            gpu.Step("fails", ["-c", "print('why'); raise SystemExit(3)"], 60),
            gpu.Step("hangs", ["-c", "import time; time.sleep(60)"], 1),
            gpu.Step("works", ["-c", "pass"], 60),
        ],
    )
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    gpu.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [one["status"] for one in results.values()] == [
        "exit code 3", "stopped after 1 s", "done"
    ]  # fmt: skip
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
def test_official_step_agrees(tmp_path, command):
    out = tmp_path / "result.json"
    script, *rest = command
    official = ("--official", os.environ["IJEPA_OFFICIAL"])
    run(SCRIPTS / script, *rest, *official, "--rounds", 3, "--seconds", 1, "--out", out)
    assert json.loads(out.read_text())["ratios"]["official"]["median"] > 0


def test_tables_are_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tables

    text = (SCRIPTS / "README.md").read_text()
    assert re.search(r"<!-- results: ", text)
    assert tables.fill(text) == text, "python examples/benchmarks/tables.py README.md"
