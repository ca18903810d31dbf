"""Several processes compute what one does, for each engine."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import several_processes
from small_probe import OPTIONS, TASK, break_files, encoder, save, the_one
from test_dense_probes import PROTOCOL, write_pairs
from test_finetune import PLAIN
from test_saved_heads import write_labeled

from ijepa_zoo.eval import (
    EvalModel,
    evaluate_attentive,
    evaluate_dense_depth,
    evaluate_finetune,
    evaluate_knn,
    evaluate_linear,
    evaluate_logreg,
    read_result,
)

HEADS = {"epochs": 1, "batch_size": 15, "lrs": (1e-2,), "wds": (0.1,)}
RECIPE = {"recipe": replace(PLAIN, epochs=1, warmup_epochs=0), "micro_batch_size": 2}
DENSE = {"protocol": PROTOCOL, "batch_size": 3, "cached": True}
RUNS = {  # the probe, its data and options
    "linear-online": (evaluate_linear, "pictures", HEADS),
    "attentive-cached": (evaluate_attentive, "pictures", {"cached": True, **HEADS}),
    "knn": (evaluate_knn, "pictures", {}),
    "logreg-labels": (evaluate_logreg, "labels/labels.csv", {"cs": (0.1, 1.0)}),
    "finetune": (evaluate_finetune, "pictures", RECIPE),
    "dense-cached": (evaluate_dense_depth, "pairs", DENSE),
}


def run(name, data, out):
    probe, source, options = RUNS[name]
    task = () if probe is evaluate_dense_depth else (TASK,)
    options = {"skip_broken": True, **OPTIONS, **options}
    model = EvalModel(encoder(), "small")
    return probe(*task, model, Path(data) / source, Path(out) / name, **options)


@pytest.fixture
def data(pictures, tmp_path):
    """Data with images that only one of the processes reads, and cannot decode."""
    root = tmp_path / "data"
    shutil.copytree(pictures, root / "pictures")
    write_labeled(root / "labels")
    pairs = write_pairs(root / "pairs", count=9)
    for n in range(9):  # something to learn
        save(np.full((32, 32, 3), 25 * n, np.uint8), pairs / "train" / f"{n}.png")
        save(np.full((32, 32), 1000 + 500 * n, np.uint16), pairs / "train" / f"{n}_depth.png")
    break_files([root / "pictures" / "train" / "class1" / "5.png"])
    break_files(root / "pictures" / "test" / "class0" / f"{n}.png" for n in (0, 1))
    break_files(pairs / f"{name}.png" for name in ("train/5", "test/2", "test/3"))
    return root


def test_two_processes_do_what_one_does(data, tmp_path):
    script = """
        import sys
        sys.path.insert(0, sys.argv[3])
        import test_processes as t
        for name in t.RUNS:
            t.run(name, *sys.argv[1:3])
    """
    arguments = (script, 2, data, tmp_path / "two", Path(__file__).parent)
    ended = several_processes.finish(several_processes.start(*arguments), seconds=240)
    assert [status for status, _ in ended] == [0, 0], ended
    for name in RUNS:
        one = run(name, data, tmp_path / "one")
        two = read_result(the_one(tmp_path / "two" / name, "*/result.json"))
        assert two.runtime["processes"] == 2
        assert two.value == pytest.approx(one.value, rel=1e-3), name
        assert (two.images, two.notes) == (one.images, one.notes)
        assert two.baselines == pytest.approx(one.baselines, rel=1e-6)
        for ours, theirs in zip(two.heads, one.heads, strict=True):
            assert ours.val == (theirs.val and pytest.approx(theirs.val, rel=1e-3)), name
            assert ours.loss == (theirs.loss and pytest.approx(theirs.loss, rel=1e-3)), name
        if "labels" not in name:
            assert "could not be decoded: 3 (" in " ".join(one.notes)
