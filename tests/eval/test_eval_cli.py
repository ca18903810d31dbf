"""`ijepa-zoo eval`."""

import inspect
import json

import pytest
from small_probe import the_one

from ijepa_zoo import eval as probes
from ijepa_zoo.cli import main

NANO = ("--model", "vit_nano8_64_ijepa", "--device", "cpu", "--workers", "0", "--quiet")
HEADS = ["--lrs", "0.1,0.01", "--with-encoder"]
WITH_HEADS = {"lrs": (0.1, 0.01), "wds": None, "with_encoder": True}
FINETUNE = ["--micro-batch-size", "4", "--list", "l"]
DENSE = ["depth", "--task", "dense", "--max-depth", "5"]
PROBES = [  # the command, its function, and arguments of that
    (["linear", *HEADS], "linear", {"task": "classes", **WITH_HEADS}),
    (["count", *HEADS], "linear", {"task": "count", **WITH_HEADS}),
    (["depth", *HEADS], "linear", {"task": "depth", **WITH_HEADS}),
    (["attentive", *HEADS], "attentive", {"task": "classes", **WITH_HEADS}),
    (DENSE, "dense_depth", {"max_depth": 5.0, "depth_scale": None}),
    (["segmentation"], "segmentation", {"reduce_zero_label": None}),
    (["knn"], "knn", {"task": "classes"}),
    (["finetune", *FINETUNE], "finetune", {"micro_batch_size": 4, "list": "l"}),
    (["logreg", "--list", "l"], "logreg", {"list": "l", "per_class": None}),
]


@pytest.mark.parametrize(("command", "function", "given"), PROBES)
def test_options_are_arguments_of_the_function(monkeypatch, capsys, command, function, given):
    name, calls = f"evaluate_{function}", []
    signature = inspect.signature(getattr(probes, name))

    class Table:
        def table(self):
            return "the table"

    monkeypatch.setattr(f"ijepa_zoo.cli.eval.{name}", lambda **kw: calls.append(kw) or Table())
    words = ["eval", *command, "--model", "m", "--data", "d", "--out", "o", "--seed", "3"]
    words += ["--value-range", "0,4095", "--bands", "2,1,0", "--skip-broken", "--img-size", "64,32"]
    assert main(words) == 0
    assert "the table" in capsys.readouterr().out
    (kwargs,) = calls
    shared = {"model": "m", "data": "d", "out": "o", "seed": 3, "value_range": (0.0, 4095.0)}
    shared |= {"bands": (2, 1, 0), "skip_broken": True, "img_size": (64, 32), "progress": True}
    shared |= {"precision": "auto", "device": "auto"}
    assert kwargs.items() >= (shared | given).items()
    signature.bind(**kwargs)
    config = probes.HeadsConfig if "cached" in kwargs else probes.EvalConfig
    config(
        **{"model": "m", "data": "d"},
        **{k: v for k, v in kwargs.items() if k not in signature.parameters},
    )


def test_probes_report_and_saved_head(pictures, tmp_path, capsys):
    data = ("--data", str(pictures), "--out", str(tmp_path))
    assert main(["eval", "linear", *NANO, *data, "--cached", "--epochs", "1"]) == 0
    result = json.loads(the_one(tmp_path, "classes-linear-cached-*/result.json").read_bytes())
    assert f"{result['value']:.1f}" in capsys.readouterr().out
    scenes = ["--task", "count", "--data", "scenes:40,20", "--out", str(tmp_path)]
    assert main(["eval", "knn", *NANO, *scenes, "--random", "--img-size", "32,64"]) == 0
    assert "random weights" in capsys.readouterr().out
    head = str(the_one(tmp_path, "*/model"))
    assert main(["eval", "linear", "--head", head, *data, "--device", "cpu", "--quiet"]) == 0
    again = json.loads(the_one(tmp_path, "*saved-head*/result.json").read_bytes())
    assert again["value"] == result["value"]
    capsys.readouterr()
    report = tmp_path / "table.md"
    assert main(["eval", "report", str(tmp_path), "--out", str(report)]) == 0
    assert capsys.readouterr().out == f"{report}\n"
    assert f"| {result['value']:.1f} (" in report.read_text().replace("*", "")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["linear", "--task", "cifar99"], "'cifar99'"),
        (["linear", "--data", "nowhere"], "nowhere"),
        (["linear", "--head", "x"], "--model"),
        (["depth", "--task", "dense", "--test", "more"], "--test"),
        (["depth", "--max-depth", "5"], "--max-depth"),
        (["knn", "--device", "cudax"], "'cudax'"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_wrong_values_are_named(pictures, tmp_path, capsys, words, named):
    data = [*NANO, "--data", str(pictures), "--out", str(tmp_path / "out")]
    shared = [] if words[0] == "report" else data
    assert main(["eval", words[0], *shared, *words[1:]]) in (1, 2)
    errors = capsys.readouterr().err
    assert errors.startswith("ijepa-zoo: error: ")
    assert named in errors
    assert not list(tmp_path.rglob("result.json"))
