"""The command line: exit statuses, errors, and `list` and `features`."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import ijepa_zoo
from ijepa_zoo import errors
from ijepa_zoo.cli import main
from ijepa_zoo.extract import Parts
from ijepa_zoo.models.classifier import Classifier, LinearHead, save_classifier

ROOT = Path(__file__).parents[1]
NANO = "vit_nano8_64_ijepa"
EXPORT = ["export", "weights.pth", "folder", "--to", "timm"]
FEATURES = ["features", "photos", "--model", NANO, "--out", "f.npy"]
PROBE = ["--model", NANO, "--data", "photos"]
# commands of the long works, and the function of the package that each calls
WORKS = {
    "features": (FEATURES, "ijepa_zoo.cli.images.extract_features"),
    "pretrain": (
        ["pretrain", "nano", "--data", "photos", "--out", "run"],
        "ijepa_zoo.cli.pretrain.pretrain",
    ),
    "linear": (["eval", "linear", *PROBE], "ijepa_zoo.cli.eval.evaluate_linear"),
    "knn": (["eval", "knn", *PROBE], "ijepa_zoo.cli.eval.evaluate_knn"),
    "finetune": (["eval", "finetune", *PROBE], "ijepa_zoo.cli.eval.evaluate_finetune"),
}


@pytest.fixture
def failing(monkeypatch):
    """`failing(error)` makes every work raise it."""

    def fail(error):
        def work(*args, **kwargs):
            raise error

        for target in ("ijepa_zoo.cli.models.export", *(target for _, target in WORKS.values())):
            monkeypatch.setattr(target, work)

    return fail


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = ijepa_zoo.create_model(NANO, pretrained=False)
    path = tmp_path_factory.mktemp("weights") / "nano.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Six images in two classes; the current folder holds them."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for number in range(6):
        place = tmp_path / "photos" / ("cat" if number < 3 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random.integers(0, 256, (70, 80, 3), np.uint8))
        image.save(place / f"{number}.png")
    return tmp_path / "photos"


def features(weights, *arguments):
    options = ["--device", "cpu", "--workers", "0", "--batch-size", "2", "--out", "f.npy"]
    return main(["features", *options, "--model", NANO, "--checkpoint", weights, *arguments])


def start(*command, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **kwargs.pop("env", {})}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, timeout=100, **kwargs
    )


KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.UserError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_user_errors_are_a_sentence_and_an_exit_status(failing, capsys, kind):
    failing(kind("'a.jpg' is broken"))
    assert main(EXPORT) == kind.exit_code
    assert capsys.readouterr() == ("", "ijepa-zoo: error: 'a.jpg' is broken\n")


@pytest.mark.parametrize("command", [["--debug", *EXPORT], [*EXPORT, "--debug"]])
def test_debug_adds_the_traceback(failing, capsys, command):
    failing(errors.DataError("'a.jpg' is broken"))
    assert main(command) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("ijepa-zoo: error: 'a.jpg' is broken\n")


@pytest.mark.parametrize("probe", ["linear", "knn", "report"])
def test_debug_may_follow_a_probe(tmp_path, capsys, probe):
    with pytest.raises(SystemExit, match="0"):
        main(["eval", probe, "--help"])
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"), TypeError("a bug"), RuntimeError("a bug"), ImportError("a bug"),
        OSError("a bug"), FileNotFoundError(errno.ENOENT, "of no file"),
        OSError(errno.EBADF, "Bad file descriptor", "a"),
    ],
)  # fmt: skip
def test_unexpected_errors_keep_their_traceback(failing, error):
    failing(error)
    with pytest.raises(type(error)) as caught:
        main(EXPORT)
    assert caught.value is error


def test_unexpected_errors_end_the_process_with_1():
    code = "import sys, ijepa_zoo.cli.models as m; m.checkpoints = lambda: 1 / 0; "
    done = start("-c", f"{code} from ijepa_zoo.cli import main; sys.exit(main(['list']))")
    assert done.returncode == 1
    assert b"Traceback" in done.stderr
    assert b"ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (errno.ENOSPC, None), (errno.ENOSPC, "a/b"), (errno.EDQUOT, None), (errno.ENOENT, "a/b"),
        (errno.EACCES, "a/b"), (errno.EPERM, "a/b"), (errno.EROFS, "a/b"),
        (errno.ENOTDIR, Path("a/b")), (errno.EISDIR, "a/b"), (errno.EEXIST, "a/b"),
    ],
)  # fmt: skip
def test_errors_of_the_system_name_the_file(failing, capsys, number, name):
    failing(OSError(number, os.strerror(number), name))
    assert main(EXPORT) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"ijepa-zoo: error: {os.strerror(number)}")
    assert err.count("\n") == 1
    assert name is None or f"'{name}'" in err


@pytest.mark.parametrize(
    ("work", "options"),
    [
        ("features", ["--batch-size", "--workers", "--precision"]),
        ("pretrain", ["runtime.micro_batch_size", "runtime.activation_checkpointing"]),
        ("linear", ["--batch-size", "--img-size", "--precision"]),
        ("knn", ["--img-size", "--precision"]),
        ("finetune", ["--micro-batch-size", "--grad-checkpointing"]),
    ],
)
def test_lack_of_memory_names_options_of_the_command(photos, failing, capsys, work, options):
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    command, _ = WORKS[work]
    with pytest.raises(SystemExit):
        main([*command[: 1 + (command[0] == "eval")], "--help"])
    usage = capsys.readouterr().out
    for error in (
        *(real.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nMore")),
        OSError(errno.ENOMEM, "Cannot allocate memory"),  # to start workers
        RuntimeError("can't start new thread"),
        RuntimeError("unable to mmap 9 bytes from file </torch_1>: Cannot allocate memory (12)"),
    ):
        failing(error)
        assert main(command) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert [option for option in options if option not in err] == []
        assert set(re.findall(r"--[a-z-]+", err)) <= set(re.findall(r"--[a-z-]+", usage))
    if work == "knn":
        assert "--batch-size" not in err  # it has none


def test_lack_of_memory_elsewhere(failing, capsys):
    failing(MemoryError("Unable to allocate 3 GiB"))
    assert main(EXPORT) == 1
    assert "3 GiB" in capsys.readouterr().err


@pytest.mark.parametrize("work", WORKS)
def test_interrupted_work_can_be_resumed(photos, failing, capsys, work):
    failing(KeyboardInterrupt())
    assert main(WORKS[work][0]) == 130
    assert "resume" in capsys.readouterr().err


def test_interrupted_exports_cannot(photos, failing, monkeypatch, capsys):
    failing(KeyboardInterrupt())
    monkeypatch.setattr("ijepa_zoo.cli.models.create_model", ijepa_zoo.cli.models.export)
    for command in (EXPORT, ["export", NANO, "served", "--to", "torch-export"]):
        assert main(command) == 130
        assert "resume" not in capsys.readouterr().err


def test_reader_of_the_output_that_leaves(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-u", "-m", "ijepa_zoo", "list"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=write, stderr=subprocess.PIPE,
        timeout=100,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_list(capsys):
    assert main(["list"]) == 0
    everything = capsys.readouterr().out
    assert main(["list", "--pretrained"]) == 0
    pretrained = capsys.readouterr().out
    assert "vit_tiny16_ijepa " in everything
    assert "vit_tiny16_ijepa " not in pretrained
    row = next(line for line in pretrained.splitlines() if "vit_huge14_ijepa.in1k " in line)
    for value in ("target_encoder", "630.", "224x224", "CC-BY-NC-4.0"):
        assert value in row


def test_python_m():
    done = start("-m", "ijepa_zoo", "list", "--pretrained")
    assert (done.returncode, done.stderr) == (0, b"")
    assert NANO.encode() in done.stdout


def test_features_and_picture(photos, weights, capsys):
    assert features(weights, "photos", "--picture", "p.png", "--picture-images", "2") == 0
    assert np.load("f.npy").shape == (6, 128)
    with Image.open("p.png") as picture:
        assert picture.width > picture.height / 2
    printed = capsys.readouterr()
    for value in (NANO, weights, "[6 x 128] float32", "f.index.jsonl", "f.run.json", "p.png"):
        assert value in printed.out
    assert printed.err == ""


def test_features_of_a_classifier_folder_are_those_of_its_encoder(photos):
    encoder = ijepa_zoo.create_model(NANO)
    head = LinearHead(encoder.embed_dim, 3)
    save_classifier("head", Classifier(encoder, head), encoder=NANO)
    for source, out in ((NANO, "f.npy"), ("local-dir:head", "g.npy")):
        assert main(["features", "photos", "--model", source, "--out", out, "--workers", "0"]) == 0
    assert np.array_equal(np.load("f.npy"), np.load("g.npy"))


def test_layers_pool_dtype_and_format(photos, weights):
    arguments = ["--layers", "0,-1", "--pool", "none", "--dtype", "float16", "--out", "maps"]
    assert features(weights, "photos", *arguments, "--format", "npy") == 0
    maps = np.load("maps")
    assert (maps.shape, maps.dtype) == ((6, 256, 8, 8), np.float16)
    assert json.loads(Path("maps.run.json").read_text())["settings"]["layers"] == [0, 5]


def test_failed_images_are_listed(photos, weights, capsys):
    for number in range(25):
        (photos / f"broken{number:02}.jpg").write_bytes(b"")
    (photos / "large.png").write_bytes((photos / "cat/0.png").read_bytes())
    assert features(weights, "photos/", "--max-pixels", "5599") == 3
    err = capsys.readouterr().err
    assert "'photos/broken00.jpg'" in err
    assert err.count("failed: ") == 20
    lines = [json.loads(line) for line in Path("f.index.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "error" in line]) == 32
    assert features(weights, "photos/", "--max-pixels", "5599") == 3  # also when all is done


def test_strict(photos, weights, capsys):
    (photos / "broken.jpg").write_bytes(b"")
    assert features(weights, "photos", "--strict") == 1
    assert "'photos/broken.jpg'" in capsys.readouterr().err


def test_other_settings_and_overwrite(photos, weights, capsys):
    assert features(weights, "photos") == 0
    assert features(weights, "photos", "--layers", "last4") == 1
    assert "layers" in capsys.readouterr().err
    assert features(weights, "photos", "--layers", "last4", "--overwrite") == 0
    assert np.load("f.npy").shape == (6, 512)


def test_interrupted_features_are_resumed(photos, weights, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", interrupt)
        assert features(weights, "photos") == 130
    assert features(weights, "photos") == 0


def record_call(monkeypatch, target, result=None):
    """The arguments that a function of the package is called with."""
    calls = {}

    def function(*args, **kwargs):
        calls["args"], calls["kwargs"] = args, kwargs
        return result

    monkeypatch.setattr(target, function)
    return calls


def test_options_reach_the_extraction(photos, monkeypatch, capsys):
    call = record_call(monkeypatch, "ijepa_zoo.cli.images.extract_features")
    options = ["--value-range=-1,4095", "--bands", "3,2,1", "--max-pixels", "9", "--threads", "2"]
    picture = ["--picture", "p.png", "--img-size", "32,64"]
    assert main([*FEATURES, *options, *picture, "--workers", "0", "--precision", "bfloat16"]) == 0
    inputs, model, out = call["args"]
    assert (inputs, out) == (["photos"], "f.npy")
    assert tuple(model.patch_embed.img_size) == (32, 64)
    assert not model.training
    given = {"value_range": (-1.0, 4095.0), "bands": (3, 2, 1), "max_pixels": 9, "threads": 2}
    given |= {"workers": 0, "precision": "bfloat16", "layers": "last", "pool": "auto"}
    assert call["kwargs"].items() >= given.items()
    # of another rank than 0, which prints and draws
    assert capsys.readouterr() == ("", "")
    assert not Path("p.png").exists()


def test_pixel_options_have_defaults(photos, monkeypatch):
    call = record_call(monkeypatch, "ijepa_zoo.cli.images.extract_features")
    assert main(FEATURES) == 0
    given = {"value_range": None, "bands": None, "max_pixels": 178_956_970}
    assert call["kwargs"].items() >= given.items()


@pytest.mark.parametrize("path", ["phtos", "photos/*.tif", "photos/none.png"])
def test_wrong_paths_are_found_before_the_weights(photos, monkeypatch, capsys, path):
    monkeypatch.setattr("ijepa_zoo.cli.images.open_model", None)
    assert main(["features", path, "--model", NANO, "--out", "f.npy"]) == 1
    assert f"'{path}'" in capsys.readouterr().err


def test_a_dataset_of_torchvision_needs_its_folder(capsys):
    assert main(["features", "torch/cifar10", "--model", NANO, "--out", "f.npy"]) == 1
    assert "torch/cifar10:root=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["--out", "f.csv"], 2, "'f.csv'"),
        (["--layers", "6"], 2, "5"),
        (["--model", "vit_huge"], 2, "vit_huge"),
        (["--checkpoint", "absent.safetensors"], 1, "absent.safetensors"),
        (["--picture", "a.xyz"], 2, "a.xyz"),
        (["--picture", "absent/a.png"], 2, "absent"),
        (["--pool", "cls"], 2, "class token"),
    ],
)
def test_wrong_values_are_named(photos, weights, capsys, arguments, status, named):
    assert features(weights, "photos", *arguments) == status
    err = capsys.readouterr().err
    assert err.startswith("ijepa-zoo: error: ")
    assert named in err
    assert not Path("f.npy").exists()


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99", ""])
def test_devices_that_are_not_there(photos, weights, capsys, device):
    assert features(weights, "photos", "--device", device) in (1, 2)
    assert f"device {device!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--layers", "first"), ("--workers", "-1"), ("--batch-size", "0"), ("--img-size", "1,2,3"),
        ("--img-size", "x"), ("--value-range", "5"), ("--value-range", "5,5"),
        ("--value-range", "a,b"), ("--bands", "1,"), ("--max-pixels", "0"),
    ],
)  # fmt: skip
def test_values_are_checked_by_the_parser(capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        main([*FEATURES, f"{option}={value}"])
    assert option in capsys.readouterr().err


def test_inputs_are_required(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["features", "--model", NANO, "--out", "f.npy"])


def test_names_beyond_the_encoding_of_the_terminal(photos, weights):
    out = os.fsdecode(b"f\xff.npy")
    arguments = ["photos", "--model", NANO, "--checkpoint", weights, "--out", out]
    done = start(
        *("-m", "ijepa_zoo", "features", *arguments, "--device", "cpu", "--workers", "0"),
        env={"PYTHONIOENCODING": "ascii:strict"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"f\udcff.npy" in done.stdout


def test_features_of_a_model_of_timm(photos, monkeypatch, capsys):
    create = timm.create_model

    def random_weights(name, pretrained=False, **kwargs):
        return create(name, pretrained=False, img_size=32, **kwargs)

    monkeypatch.setattr(timm, "create_model", random_weights)
    call = record_call(monkeypatch, "ijepa_zoo.cli.images.extract_features")
    assert main(["features", "photos", "--model", "deit_tiny_patch16_224", "--out", "f.npy"]) == 0
    assert call["args"][1].pretrained_cfg["architecture"] == "deit_tiny_patch16_224"
    arguments = ["features", "photos", "--model", "deit_tiny_patch16_224", "--out", "f.npy"]
    assert main([*arguments, "--network", "encoder"]) == 2
    assert "--network" in capsys.readouterr().err


def test_removed_prefixes_are_reported(tmp_path, caplog):
    caplog.handler.setLevel(logging.INFO)  # the command sets that of the logger
    state = ijepa_zoo.create_model(NANO).state_dict()
    save_file({f"module.{k}": v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    photos, out = ROOT / "examples" / "images" / "photos", tmp_path / "f.npy"
    given = ["--model", NANO, "--checkpoint", str(tmp_path / "w.safetensors"), "--workers", "0"]
    assert main(["features", str(photos), *given, "--out", str(out), "--device", "cpu"]) == 0
    assert "'module.'" in caplog.text
