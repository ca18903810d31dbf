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
    assert "note: cached: each image and its mirror image are encoded once" in shown
    assert "most frequent class" in shown
    assert main(["eval", "knn", *common]) == 0
    assert "test figure of the chosen setting" in capsys.readouterr().out
    report = tmp_path / "table.md"
    assert main(["eval", "report", str(out), "--out", str(report), "--no-picture"]) == 0
    assert capsys.readouterr().out == f"{report}\n"
    text = report.read_text()
    assert f"| {result['figure']:.1f} (" in text
    assert "**" not in text  # nothing to compare with
    assert "| most frequent class | 33.3 | 33.3 |" in text
    assert result["data"]["train"]["name"] == pictures.name


def test_random_weights_alone(pictures, tmp_path, capsys):
    command = ["eval", "knn", *NANO, "--data", str(pictures), "--out", str(tmp_path)]
    assert main([*command, "--random"]) == 0
    assert "vit_nano8_64_ijepa, random weights" in capsys.readouterr().out
    (file,) = tmp_path.glob("*/result.json")
    assert main([*command, "--baseline"]) == 0  # the same evaluation: not repeated
    assert f"done before: {file}" in capsys.readouterr().err


def test_knn_of_rendered_scenes(tmp_path, capsys):
    arguments = [*NANO, "--data", "scenes:60,20", "--out", str(tmp_path), "--task", "count"]
    assert main(["eval", "knn", *arguments]) == 0
    assert "count, knn: vit_nano8_64_ijepa.scenes" in capsys.readouterr().out


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
        (["linear", "--batch-size", "1"], 2, "(--batch-size) must be at least 2"),
        (["count"], 2, "CLEVR"),
        (["depth", "--task", "dense", "--test", "x"], 2, "--test holds for classes"),
        (["depth", "--max-depth", "5"], 2, "--max-depth is for depth maps: use --task dense"),
        (["depth", "--task", "dense", "--max-depth", "0"], 2, "max_depth (--max-depth) is 0"),
        (["linear", "--data", "scenes:60,8"], 2, "use `eval count` or `eval depth`"),
        (["finetune", "--task", "count"], 2, "fine-tuning crops images"),
        (["lowshot", "--list", "x", "--grad-checkpointing"], 2, "use finetune (--finetune)"),
        (["linear", "--model", "vit_tiny16_ijepa"], 2, "or evaluate random weights, random (--ran"),
        (["knn", "--random", "--baseline"], 2, "leave baseline (--baseline) out"),
        (["knn", "--device", "cudax"], 1, "the device 'cudax' is unknown"),
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


@pytest.mark.parametrize("probe", ["linear", "knn", "finetune", "lowshot", "count", "depth"])
def test_help_shows_layout_example_and_required_options(capsys, probe):
    with pytest.raises(SystemExit):
        main(["eval", probe, "--help"])
    shown = capsys.readouterr().out
    own = shown.split("\nrequired options:\n")[1].split("\n\n")[0]
    names = [line.split()[0] for line in own.splitlines() if line.strip().startswith("--")]
    assert names == ["--model", "--data", *(["--list"] if probe == "lowshot" else [])]
    layout = "DIR/images/{train,val}" if probe in ("count", "depth") else "DIR/train/CLASS/*.jpg"
    assert layout in shown.split("\nlayout of --data:\n")[1]
    example = shown.split("\nexample:\n")[1].split()
    assert example[:3] == ["ijepa-zoo", "eval", probe]


def test_the_example_of_the_help_is_a_command(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "lowshot", "--help"])
    words = capsys.readouterr().out.split("\nexample:\n")[1].split()[1:]
    assert main(words) == 2  # it is parsed; the data are not there
    assert "'photos'" in capsys.readouterr().err
