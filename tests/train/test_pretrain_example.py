import json
import runpy
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[2] / "examples" / "pretrain_scenes"


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    threads = torch.get_num_threads()
    runpy.run_path(str(FOLDER / script), run_name="__main__")
    torch.set_num_threads(threads)


def test_train_and_probe(tmp_path, monkeypatch, capsys):
    short = ("optim.duration=2 steps", "optim.warmup=1 steps", "runtime.workers=0")
    run(monkeypatch, "train.py", tmp_path / "run", "--scenes", 70, "--set", *short)
    assert "done" in capsys.readouterr().out
    out = tmp_path / "probe.json"
    run(monkeypatch, "probe.py", tmp_path / "run", "--out", out, "--train", 120, "--test", 60,
        "--random-seeds", 1)  # fmt: skip
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["rows"]] == ["random 0", "trained"]
    for row in result["rows"]:
        assert len(row) == 5
        assert all(0 < row[key] <= 100 for key in row if key != "name")


def test_probe_learns_a_separable_task(monkeypatch):
    probe = runpy.run_path(str(FOLDER / "probe.py"))["probe"]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (600,), generator=generator)
    features = torch.randn(600, 5, generator=generator)
    features[:, 1] += 6.0 * labels
    figure = probe(features[:400], features[400:], labels[:400], labels[400:])
    assert figure > 95
    shuffled = labels[torch.randperm(400, generator=generator)]
    assert probe(features[:400], features[400:], shuffled, labels[400:]) < 60
