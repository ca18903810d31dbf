"""`ijepa-zoo eval`."""

import inspect
import json

import pytest
from small_probe import the_one

from ijepa_zoo import eval as probes
from ijepa_zoo.cli import main

NANO = ("--model", "vit_nano8_64_ijepa", "--device", "cpu", "--workers", "0", "--quiet")
HEADS = ["--lrs", "0.1,0.01", "--with-encoder"]
PROBES = {  # the functions of the package, their task, and further options
    "linear": ("evaluate_linear", "classes", HEADS),
    "count": ("evaluate_linear", "count", HEADS),
    "depth": ("evaluate_linear", "depth", HEADS),
    "dense": ("evaluate_dense_depth", None, ["--task", "dense", "--max-depth", "5"]),
    "knn": ("evaluate_knn", "classes", []),
    "finetune": (
        "evaluate_finetune", "classes", ["--micro-batch-size", "4", "--list", "l"]
    ),
    "attentive": ("evaluate_attentive", "classes", HEADS),
    "logreg": ("evaluate_logreg", "classes", ["--list", "l"]),
}  # fmt: skip


class Table:
    """Instead of a result."""

    def table(self):
        return "the table"


@pytest.mark.parametrize("probe", PROBES)
def test_options_are_arguments_of_the_function(monkeypatch, capsys, probe):
    name, task, own = PROBES[probe]
    signature = inspect.signature(getattr(probes, name))
    calls = []

    def evaluate(**kwargs):
        calls.append(kwargs)
        return Table()

    monkeypatch.setattr(f"ijepa_zoo.cli.eval.{name}", evaluate)
    command = ["eval", "depth" if probe == "dense" else probe, *own]
    command += ["--model", "m", "--data", "d", "--out", "o", "--value-range", "0,4095"]
    command += ["--bands", "2,1,0", "--skip-broken", "--img-size", "64,32", "--seed", "3"]
    assert main(command) == 0
    assert "the table" in capsys.readouterr().out
    (kwargs,) = calls
    given = {"model": "m", "data": "d", "out": "o"} | ({"task": task} if task else {})
    given |= {"value_range": (0.0, 4095.0), "bands": (2, 1, 0), "skip_broken": True, "seed": 3}
    given |= {"img_size": (64, 32), "progress": True, "precision": "auto", "device": "auto"}
    given |= {"max_depth": 5.0, "depth_scale": None} if probe == "dense" else {}
    given |= {"micro_batch_size": 4, "list": "l"} if probe == "finetune" else {}
    given |= {"list": "l", "per_class": None} if probe == "logreg" else {}
    if own is HEADS:
        given |= {"lrs": (0.1, 0.01), "wds": None, "with_encoder": True}
    assert kwargs.items() >= given.items()
    signature.bind(**kwargs)
    if name in ("evaluate_linear", "evaluate_attentive", "evaluate_knn", "evaluate_logreg"):
        shared = {k: v for k, v in kwargs.items() if k not in signature.parameters}
        config = probes.HeadsConfig if own is HEADS else probes.EvalConfig
        config(**{"model": "m", "data": "d", **shared})


def test_probes_report_and_saved_head(pictures, tmp_path, capsys):
    data = ("--data", str(pictures), "--out", str(tmp_path))
    assert main(["eval", "linear", *NANO, *data, "--cached", "--epochs", "1"]) == 0
    result = json.loads(the_one(tmp_path, "classes-linear-cached-*/result.json").read_bytes())
    assert f"{result['value']:.1f}" in capsys.readouterr().out
    assert main(["eval", "knn", *NANO, *data, "--random", "--img-size", "32,64"]) == 0
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
    assert main(["eval", "linear", *data]) == 2
    assert "--head" in capsys.readouterr().err


def test_rendered_scenes(tmp_path):
    arguments = [*NANO, "--data", "scenes:40,20", "--out", str(tmp_path), "--img-size", "32"]
    assert main(["eval", "knn", *arguments, "--task", "count"]) == 0
    for probe in ("count", "depth"):
        assert main(["eval", probe, *arguments, "--cached", "--epochs", "1"]) == 0


@pytest.mark.parametrize(
    ("words", "statuses", "named"),
    [
        (["linear", "--task", "cifar100"], (1, 2), "100"),
        (["linear", "--task", "cifar99"], (1, 2), "'cifar99'"),
        (["linear", "--model", "resnet50"], (2,), "ResNet"),
        (["linear", "--model", "vit_nano"], (2,), "'vit_nano'"),
        (["linear", "--data", "nowhere"], (1,), "nowhere"),
        (["linear", "--batch-size", "1"], (2,), "--batch-size"),
        (["depth", "--task", "dense", "--test", "x"], (2,), "--test"),
        (["depth", "--max-depth", "5"], (2,), "--max-depth"),
        (["depth", "--task", "dense", "--max-depth", "0"], (2,), "--max-depth"),
        (["finetune", "--task", "count"], (1, 2), "eval count"),
        (["depth", "--task", "dense", "--lrs", "0.1"], (2,), "--lrs"),
        (["logreg", "--list", "x"], (1,), "'x'"),
        (["linear", "--model", "vit_tiny16_ijepa"], (1, 2), "vit_tiny16_ijepa"),
        (["knn", "--random", "--baseline"], (2,), "--baseline"),
        (["knn", "--device", "cudax"], (1,), "'cudax'"),
        (["report", "nowhere"], (1,), "nowhere"),
    ],
)
def test_wrong_values_are_named(pictures, tmp_path, capsys, words, statuses, named):
    command = ["eval", *words]
    if words[0] != "report":
        command[2:2] = [*NANO, "--data", str(pictures), "--out", str(tmp_path / "out")]
    assert main(command) in statuses
    errors = capsys.readouterr().err
    assert errors.startswith("ijepa-zoo: error: ")
    assert named in errors
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize(
    "probe", ["linear", "attentive", "knn", "finetune", "logreg", "count", "depth"]
)
def test_help_shows_layout_and_an_example_that_is_a_command(tmp_path, monkeypatch, capsys, probe):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(["eval", probe, "--help"])
    shown = capsys.readouterr().out
    layout = "DIR/images/{train,val}" if probe in ("count", "depth") else "DIR/train/CLASS/*.jpg"
    assert layout in shown.split("\nlayout of --data:\n")[1]
    words = shown.split("\nexample:\n")[1].split()
    assert words[:3] == ["ijepa-zoo", "eval", probe]
    if "scenes:" not in words[6]:
        assert main(words[1:]) in (1, 2)  # it is parsed; the data are not there
        assert "'photos'" in (err := capsys.readouterr().err) or "nyu" in err
