"""Several processes compute what one does, for each engine."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import several_processes
import torch
from PIL import Image
from small_probe import OPTIONS, TASK, break_files, encoder, the_one
from test_dense_probes import PROTOCOL, write_pairs
from test_finetune import PLAIN
from test_heads import batches, grid_of, specs_of
from test_multi_label import write_pictures as write_labeled

from ijepa_zoo.distributed import init_distributed
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

HEADS = {"epochs": 1, "batch_size": 16, "lrs": (1e-2,), "wds": (0.1,)}
RECIPE = replace(PLAIN, epochs=1, warmup_epochs=0)
RUNS = {  # the probe, its data and options
    "linear-online": (evaluate_linear, "pictures", HEADS),
    "attentive-cached": (evaluate_attentive, "pictures", {"cached": True, **HEADS}),
    "knn": (evaluate_knn, "pictures", {}),
    "logreg-labels": (evaluate_logreg, "labels/labels.csv", {"cs": (0.1, 1.0)}),
    "finetune": (evaluate_finetune, "pictures", {"recipe": RECIPE, "micro_batch_size": 2}),
    "dense-cached": (
        evaluate_dense_depth, "pairs", {"protocol": PROTOCOL, "batch_size": 3, "cached": True}
    ),
}  # fmt: skip


def run(name, data, out):
    probe, source, options = RUNS[name]
    model = EvalModel(encoder(), "small")
    task = () if probe is evaluate_dense_depth else (TASK,)
    options = {"skip_broken": True, **OPTIONS, **options}
    return probe(*task, model, Path(data) / source, Path(out) / name, **options)


@pytest.fixture
def data(pictures, tmp_path):
    """Data with images that only one of the processes reads, and cannot decode."""
    root = tmp_path / "data"
    shutil.copytree(pictures, root / "pictures")
    break_files([root / "pictures" / "train" / "class1" / "5.png"])
    break_files(root / "pictures" / "test" / "class0" / f"{n}.png" for n in (0, 1))
    write_labeled(root / "labels")
    write_pairs(root / "pairs", count=9)
    for n in range(9):  # something to learn
        color = np.full((32, 32, 3), 25 * n, np.uint8)
        Image.fromarray(color).save(root / "pairs" / "train" / f"{n}.png")
        depth = np.full((32, 32), 1000 + 500 * n, np.uint16)
        Image.fromarray(depth).save(root / "pairs" / "train" / f"{n}_depth.png")
    break_files(root / "pairs" / f"{name}.png" for name in ("train/5", "test/2", "test/3"))
    return root


def test_two_processes_do_what_one_does(data, tmp_path):
    script = """
        import sys
        sys.path.insert(0, sys.argv[3])
        import test_processes as t
        for name in t.RUNS:
            t.run(name, *sys.argv[1:3])
        t.average_gradients(sys.argv[2])
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
    whole = grid_of(specs_of()[2:4])
    for features, labels in batches(4, size=30):
        whole.step(features, labels, 1.0)
    for rank in range(2):
        for name, tensor in torch.load(tmp_path / "two" / f"{rank}.pt").items():
            torch.testing.assert_close(tensor, whole.heads.state_dict()[name])


def average_gradients(out):
    """Heads of two processes that have unequal shares of each batch."""
    grid = grid_of(specs_of()[2:4])
    with init_distributed("cpu") as distributed:
        for features, labels in batches(4, size=30):
            rows = slice(0, 11) if distributed.is_main else slice(11, 30)
            part = {name: x[rows] for name, x in features.items()}
            grid.step(part, labels[rows], 1.0, distributed, 30)
    torch.save(grid.heads.state_dict(), f"{out}/{distributed.rank}.pt")
