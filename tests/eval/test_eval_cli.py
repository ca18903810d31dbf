"""`ijepa-zoo eval` as a user types it."""

import json

import pytest
from small_probe import write_pictures

from ijepa_zoo.cli import main

NANO = ("--model", "vit_nano8_64_ijepa", "--device", "cpu", "--workers", "0", "--quiet")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def test_linear_knn_and_report(pictures, tmp_path, capsys):
    out = tmp_path / "results"
    common = (*NANO, "--data", str(pictures), "--out", str(out))
    assert main(["eval", "linear", *common, "--cached", "--epochs", "2"]) == 0
    shown = capsys.readouterr().out
    (file,) = out.glob("classes-linear-cached-*/result.json")
    result = json.loads(file.read_bytes())
    assert f"{result['figure']:.1f}" in shown
    assert "note: 2 epochs in the place of the protocol's 28" in shown
    assert main(["eval", "knn", *common]) == 0
    capsys.readouterr()
    report = tmp_path / "table.md"
    assert main(["eval", "report", str(out), "--out", str(report), "--no-picture"]) == 0
    assert capsys.readouterr().out == f"{report}\n"
    assert f"**{result['figure']:.1f}**" in report.read_text()


def test_count_and_distance_of_rendered_scenes(tmp_path, capsys):
    for probe, task in (("count", "count"), ("depth", "depth")):
        arguments = [*NANO, "--data", "scenes:60,20", "--out", str(tmp_path), "--epochs", "1"]
        assert main(["eval", probe, *arguments, "--cached"]) == 0
        assert f"{task}, linear: vit_nano8_64_ijepa.scenes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["linear", "--task", "cifar100"], 2, "CIFAR-100 has 100 classes, these data have 3"),
        (["linear", "--task", "cifar99"], 2, "there is no task 'cifar99': did you mean"),
        (["linear", "--model", "resnet50"], 2, "no timm ViT"),
        (["linear", "--model", "vit_nano"], 2, "no model is called 'vit_nano'; similar:"),
        (["linear", "--data", "nowhere"], 2, "nowhere"),
        (["linear", "--batch-size", "1"], 2, "batch_size must be at least 2"),
        (["count"], 2, "CLEVR"),
        (["depth", "--task", "dense", "--test", "x"], 2, "--test holds for classes"),
        (["report", "nowhere"], 1, "nowhere does not exist"),
    ],
)
def test_wrong_usage_is_one_sentence(pictures, tmp_path, capsys, words, status, message):
    common = [] if words[0] == "report" else [*NANO, "--data", str(pictures)]
    command = ["eval", words[0], *common, *words[1:]]
    if words[0] != "report":
        command += ["--out", str(tmp_path / "out")]
    assert main(command) == status
    errors = capsys.readouterr().err
    assert errors.startswith("ijepa-zoo: error: ")
    assert message in errors
    assert not list(tmp_path.rglob("result.json"))


def test_another_process_in_the_folder_is_named(pictures, tmp_path, capsys):
    from filelock import FileLock

    command = ["eval", "knn", *NANO, "--data", str(pictures), "--out", str(tmp_path)]
    assert main(command) == 0
    (file,) = tmp_path.glob("*/result.json")
    file.unlink()
    capsys.readouterr()
    with FileLock(file.with_name(".lock")):
        assert main(command) == 1
    assert "another process evaluates in" in capsys.readouterr().err
