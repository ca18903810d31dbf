"""Each probe with broken images: killed and resumed, and in two processes, it is the same."""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import several_processes
from small_probe import OPTIONS, TASK, break_files, encoder, save, the_one
from test_dense_probes import QUICK as QUICK_DENSE
from test_dense_probes import write_pairs
from test_finetune import PLAIN, QUICK
from test_saved_heads import write_labeled

from ijepa_zoo import eval as probes
from ijepa_zoo.eval.runs import EpochState

HEADS = {"epochs": 2, "batch_size": 15, "lrs": (1e-2,), "wds": (0.1,)}
DENSE = QUICK_DENSE | {"batch_size": 3}
RECIPE = {"recipe": replace(QUICK, epochs=2, drop_path=0.2)}
PLAIN_RECIPE = {"recipe": replace(PLAIN, epochs=1), "micro_batch_size": 2}
CACHED = {"cached": True}
RUNS = {  # the probe, its data and options
    "linear-online": ("linear", "pictures", HEADS),
    "linear-cached": ("linear", "pictures", HEADS | CACHED),
    "attentive-online": ("attentive", "pictures", HEADS),
    "attentive-cached": ("attentive", "pictures", HEADS | CACHED),
    "knn": ("knn", "pictures", {}),
    "logreg": ("logreg", "labels/labels.csv", {"cs": (0.1, 1.0)}),
    "finetune": ("finetune", "pictures", RECIPE),
    "finetune-plain": ("finetune", "pictures", PLAIN_RECIPE),
    "dense-online": ("dense_depth", "pairs", DENSE),
    "dense-cached": ("dense_depth", "pairs", DENSE | CACHED),
}
IN_TWO = ["linear-online", "attentive-cached", "knn", "logreg", "finetune-plain", "dense-cached"]
KILLED = [name for name in RUNS if name not in ("knn", "logreg", "finetune-plain")]


@cache
def run(name, data, out):
    probe, source, options = RUNS[name]
    options = {"skip_broken": True, **OPTIONS, **options}
    if probe != "dense_depth":
        options["task"] = TASK
    function, model = getattr(probes, f"evaluate_{probe}"), probes.EvalModel(encoder(), "small")
    return function(model=model, data=Path(data) / source, out=Path(out) / name, **options)


@pytest.fixture(scope="module")
def data(pictures, tmp_path_factory):
    """Data with images that only one of the processes reads, and cannot decode."""
    root = tmp_path_factory.mktemp("data")
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


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_resumes_exactly(data, tmp_path, monkeypatch, name):
    whole = run(name, data, data / "one")
    save_state = EpochState.save

    def kill(self, state):
        save_state(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EpochState, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            run(name, data, tmp_path)
    resumed = run(name, data, tmp_path)
    assert (resumed.heads, resumed.value) == (whole.heads, whole.value)
    assert (resumed.notes, resumed.images) == (whole.notes, whole.images)
    assert "could not be decoded: 3 (" in " ".join(whole.notes)
    assert not list(tmp_path.rglob("state.pt"))


def test_two_processes_do_what_one_does(data, tmp_path):
    script = """
        import sys
        sys.path.insert(0, sys.argv[3])
        import test_processes as t
        for name in t.IN_TWO:
            t.run(name, *sys.argv[1:3])
    """
    arguments = (script, 2, data, tmp_path, Path(__file__).parent)
    ended = several_processes.finish(several_processes.start(*arguments), seconds=240)
    assert [status for status, _ in ended] == [0, 0], ended
    for name in IN_TWO:
        one = run(name, data, data / "one")
        two = probes.read_result(the_one(tmp_path / name, "*/result.json"))
        assert two.runtime["processes"] == 2
        assert two.value == pytest.approx(one.value, rel=1e-3), name
        assert (two.images, two.notes) == (one.images, one.notes)
        for ours, theirs in zip(two.heads, one.heads, strict=True):
            assert ours.val == (theirs.val and pytest.approx(theirs.val, rel=1e-3)), name
            assert ours.loss == (theirs.loss and pytest.approx(theirs.loss, rel=1e-3)), name
