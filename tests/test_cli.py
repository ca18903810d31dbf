"""The command line: exit statuses, errors, and `list` and `features`."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

import ijepa_zoo
from ijepa_zoo import errors
from ijepa_zoo.cli import main
from ijepa_zoo.models.classifier import Classifier, LinearHead, save_classifier
from ijepa_zoo.parts import Parts

ROOT = Path(__file__).parents[1]
NANO = "vit_nano8_64_ijepa"
EXPORT = ["export", "weights.pth", "folder", "--to", "timm"]
FEATURES = ["features", "photos", "--model", NANO, "--out", "f.npy"]
USER_ERRORS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.UserError)
]


@pytest.fixture
def failing(monkeypatch):
    """`failing(error)` makes the commands raise it."""

    def fail(error):
        def work(*args, **kwargs):
            raise error

        monkeypatch.setattr("ijepa_zoo.weights.export.export", work)
        monkeypatch.setattr("ijepa_zoo.extract.extract_features", work)

    return fail


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Six images in two classes; the current folder holds them."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "photos" / ("cat" if number < 3 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (70, 80, 3), np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def extraction(monkeypatch):
    """The arguments that `features` calls `extract_features` with."""
    call = {}
    monkeypatch.setattr(
        "ijepa_zoo.extract.extract_features",
        lambda *args, **kwargs: call.update(args=args, kwargs=kwargs),
    )
    return call


def features(*arguments):
    options = ["--device", "cpu", "--workers", "0", "--batch-size", "2"]
    return main([*FEATURES, *options, *arguments])


@pytest.mark.parametrize("kind", USER_ERRORS)
def test_user_errors_are_a_sentence_and_an_exit_status(failing, capsys, kind):
    failing(kind("'a.jpg' is broken"))
    assert main(EXPORT) == kind.exit_code
    assert capsys.readouterr() == ("", "ijepa-zoo: error: 'a.jpg' is broken\n")
    for command in (["--debug", *EXPORT], [*EXPORT, "--debug"]):
        assert main(command) == kind.exit_code
        assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (OSError(errno.EACCES, "Permission denied", "a/b"), "Permission denied: 'a/b'"),
        (OSError("a bug"), None),
        (FileNotFoundError(errno.ENOENT, "of no file"), None),
        (ValueError("a bug"), None),
        (ImportError("a bug"), None),
    ],
)
def test_errors_of_the_system_are_a_sentence_and_bugs_a_traceback(failing, capsys, error, named):
    failing(error)
    if named:
        assert main(EXPORT) == 1
        err = capsys.readouterr().err
        assert err.startswith("ijepa-zoo: error: ")
        assert named in err
    else:
        with pytest.raises(type(error)) as caught:
            main(EXPORT)
        assert caught.value is error


def test_interrupted_work_resumes(photos, failing, capsys):
    failing(KeyboardInterrupt())
    assert main(FEATURES) == 130
    assert "resume" in capsys.readouterr().err
    assert main(EXPORT) == 130
    assert "resume" not in capsys.readouterr().err


def start(tmp_path, script, *words, **kwargs):
    """Run a script whose name is that of the command."""
    path = tmp_path / "ijepa-zoo"
    path.write_text(f"import sys\n{script}\nfrom ijepa_zoo.cli import main; sys.exit(main())")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-u", path, *words]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
    return subprocess.run(command, env=environment, timeout=200, **output)


def test_command_has_the_names_of_the_package_and_bears_a_reader_that_leaves(tmp_path):
    names = "import ijepa_zoo; assert ijepa_zoo.list_models() and not hasattr(ijepa_zoo, 'absent')"
    read, write = os.pipe()
    os.close(read)
    done = start(tmp_path, names, "list", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_names_beyond_the_encoding_of_the_terminal(photos, tmp_path):
    words = [*FEATURES[:-1], "f日.npy", "--device", "cpu", "--workers", "0"]
    done = start(tmp_path, "", *words)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"f\u65e5.npy" in done.stdout


@pytest.mark.parametrize(
    ("words", "status", "printed"),
    [
        (["--help"], 0, b"pretrain on your own images"),
        (["features", "--help"], 0, b"--picture"),
        (["predict"], 2, b"--model"),
        (["export", NANO, "--to", "tensorrt"], 2, b"tensorrt"),
        (["lits"], 2, b"'lits'"),
    ],
)
def test_help_and_wrong_usage_need_no_torch(tmp_path, words, status, printed):
    done = start(tmp_path, "sys.modules.update(torch=None, timm=None, numpy=None)", *words)
    assert done.returncode == status
    assert printed in done.stdout + done.stderr


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


def test_features_and_picture(photos, capsys):
    assert features("--picture", "new/p.png", "--picture-images", "2") == 0
    assert np.load("f.npy").shape == (6, 128)
    with Image.open("new/p.png") as picture:
        assert picture.width > picture.height / 2
    printed = capsys.readouterr()
    for value in (NANO, "[6 x 128] float32", "f.index.jsonl", "f.run.json", "p.png"):
        assert value in printed.out
    assert printed.err == ""
    arguments = ["--layers", "0,-1", "--pool", "none", "--dtype", "float16"]
    assert features(*arguments) == 1
    assert "layers" in capsys.readouterr().err
    assert features(*arguments, "--overwrite") == 0
    maps = np.load("f.npy")
    assert (maps.shape, maps.dtype) == ((6, 256, 8, 8), np.float16)


def test_features_of_a_classifier_are_those_of_its_encoder_and_prefixes_are_reported(
    photos, caplog
):
    caplog.handler.setLevel(logging.INFO)  # the command sets that of the logger
    encoder = ijepa_zoo.create_model(NANO)
    save_classifier("head", Classifier(encoder, LinearHead(encoder.embed_dim, 3)), encoder=NANO)
    state = encoder.state_dict()
    save_file({f"module.{k}": v.contiguous() for k, v in state.items()}, "w.safetensors")
    assert features("--checkpoint", "w.safetensors") == 0
    assert "'module.'" in caplog.text
    assert features("--model", "local-dir:head", "--out", "g.npy") == 0
    assert np.array_equal(np.load("f.npy"), np.load("g.npy"))


def test_failed_images_are_listed_and_interrupted_features_resumed(photos, monkeypatch, capsys):
    for number in range(25):
        (photos / f"broken{number:02}.jpg").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert features("--max-pixels", "5599") == 130
    capsys.readouterr()
    for _ in range(2):  # also when all is done
        assert features("--max-pixels", "5599") == 3
        err = capsys.readouterr().err
        assert "'photos/broken00.jpg'" in err
        assert err.count("failed: ") == 20
    assert Path("f.index.jsonl").read_text().count('"error"') == 31
    assert features("--strict", "--out", "g.npy") == 1
    assert "'photos/broken00.jpg'" in capsys.readouterr().err


def test_options_reach_the_extraction(photos, extraction, capsys):
    assert main(FEATURES) == 0
    defaults = {"value_range": None, "bands": None, "max_pixels": 178_956_970}
    assert extraction["kwargs"].items() >= defaults.items()
    options = ["--value-range=-1,4095", "--bands", "3,2,1", "--max-pixels", "9", "--threads", "2"]
    picture = ["--picture", "p.png", "--img-size", "32,64"]
    assert main([*FEATURES, *options, *picture, "--workers", "0", "--precision", "bfloat16"]) == 0
    inputs, model, out = extraction["args"]
    assert (inputs, out) == (["photos"], "f.npy")
    assert tuple(model.patch_embed.img_size) == (32, 64)
    assert not model.training
    given = {"value_range": (-1.0, 4095.0), "bands": (3, 2, 1), "max_pixels": 9, "threads": 2}
    given |= {"workers": 0, "precision": "bfloat16", "layers": "last", "pool": "auto"}
    assert extraction["kwargs"].items() >= given.items()
    # of another rank than 0, which prints and draws
    assert capsys.readouterr() == ("", "")
    assert not Path("p.png").exists()


def test_features_of_a_model_of_timm(photos, monkeypatch, extraction, capsys):
    create = timm.create_model
    random = {"pretrained": False, "img_size": 32}
    monkeypatch.setattr(timm, "create_model", lambda name, **kw: create(name, **{**kw, **random}))
    assert features("--model", "deit_tiny_patch16_224") == 0
    assert extraction["args"][1].pretrained_cfg["architecture"] == "deit_tiny_patch16_224"
    assert features("--model", "deit_tiny_patch16_224", "--network", "encoder") == 2
    assert "--network" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["--out", "f.csv"], 2, "'f.csv'"),
        (["--model", "vit_huge"], 2, "vit_huge"),
        (["--checkpoint", "absent.safetensors"], 1, "absent.safetensors"),
        (["--picture", "a.jpg"], 2, "a.jpg"),
        (["--picture", "photos/a.png"], 2, "photos/a.png"),
        (["--pool", "cls"], 2, "class token"),
        (["--device", "cuda:99"], 1, "device 'cuda:99'"),
    ],
)
def test_wrong_values_are_named(photos, capsys, arguments, status, named):
    assert main([*FEATURES, *arguments]) == status
    err = capsys.readouterr().err
    assert err.startswith("ijepa-zoo: error: ")
    assert named in err
    assert not Path("f.npy").exists()


@pytest.mark.parametrize("path", ["phtos", "photos/*.tif"])
def test_wrong_paths_are_found_before_the_weights(photos, capsys, path):
    assert main(["features", path, "--model", "vit_huge14_ijepa", "--out", "f.npy"]) == 1
    assert path in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--layers", "first"), ("--workers", "-1"), ("--batch-size", "0"), ("--img-size", "1,2,3"),
     ("--img-size", "0"), ("--value-range", "5"), ("--value-range", "5,5"), ("--bands", "1,")],
)  # fmt: skip
def test_values_are_checked_by_the_parser(capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        main([*FEATURES, f"{option}={value}"])
    err = capsys.readouterr().err
    assert option in err
    assert repr(value) in err
