"""`ijepa-zoo eval`."""

import inspect
import json

import pytest
from small_probe import write_pictures

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
    """In place of a result."""

    def table(self):
        return "the table"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


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
        probes.EvalConfig(**{"model": "m", "data": "d", **shared})


def test_pixel_options_have_defaults(monkeypatch):
    calls = []

    def evaluate(*args, **kwargs):
        calls.append(kwargs)
        return Table()

    monkeypatch.setattr("ijepa_zoo.cli.eval.evaluate_knn", evaluate)
    assert main(["eval", "knn", "--model", "m", "--data", "d"]) == 0
    given = {"value_range": None, "bands": None, "skip_broken": False, "img_size": None}
    assert calls[0].items() >= given.items()


def test_linear_knn_and_report(pictures, tmp_path, capsys):
    out = tmp_path / "results"
    common = (*NANO, "--data", str(pictures), "--out", str(out))
    assert main(["eval", "linear", *common, "--cached", "--epochs", "2"]) == 0
    shown = capsys.readouterr().out
    (file,) = out.glob("classes-linear-cached-*/result.json")
    result = json.loads(file.read_bytes())
    assert f"{result['value']:.1f}" in shown
    assert main(["eval", "knn", *common]) == 0
    report = tmp_path / "table.md"
    capsys.readouterr()
    assert main(["eval", "report", str(out), "--out", str(report)]) == 0
    assert capsys.readouterr().out == f"{report}\n"
    assert f"| {result['value']:.1f} (" in report.read_text()


def test_a_saved_head_on_other_data(pictures, tmp_path, capsys):
    data = ("--data", str(pictures), "--out", str(tmp_path))
    assert main(["eval", "linear", *NANO, *data, "--cached", "--epochs", "1"]) == 0
    (model,) = tmp_path.glob("*/model")
    assert main(["eval", "linear", "--head", str(model), *data, "--device", "cpu", "--quiet"]) == 0
    figures = {json.loads(file.read_bytes())["value"] for file in tmp_path.glob("*/result.json")}
    assert len(figures) == 1
    capsys.readouterr()
    assert main(["eval", "linear", *data]) == 2
    assert "--head" in capsys.readouterr().err


def test_random_weights_at_another_size(pictures, tmp_path, capsys):
    command = ["eval", "knn", *NANO, "--data", str(pictures), "--out", str(tmp_path)]
    assert main([*command, "--random", "--img-size", "32,64"]) == 0
    assert "random weights" in capsys.readouterr().out


def test_rendered_scenes(tmp_path, capsys):
    arguments = [*NANO, "--data", "scenes:60,20", "--out", str(tmp_path)]
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


def test_another_process_in_the_folder_is_an_error(pictures, tmp_path, capsys):
    from filelock import FileLock

    command = ["eval", "knn", *NANO, "--data", str(pictures), "--out", str(tmp_path)]
    assert main(command) == 0
    (file,) = tmp_path.glob("*/result.json")
    file.unlink()
    capsys.readouterr()
    with FileLock(file.with_name(".lock")):
        assert main(command) == 1
    assert str(file.parent) in capsys.readouterr().err


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
