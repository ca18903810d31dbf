"""Extraction: the same bytes after kills, and for any number of workers, threads and ranks."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from safetensors import safe_open
from several_processes import finish, start
from timm.models.vision_transformer import VisionTransformer

from ijepa_zoo.data.transforms import create_transform
from ijepa_zoo.encode import Encoder, weights_fingerprint
from ijepa_zoo.errors import DataError, MissingPackageError, RunError, SettingsError
from ijepa_zoo.extract import extract_features
from ijepa_zoo.features import FeatureExtractor
from ijepa_zoo.parts import Parts

COUNT, GOOD = 14, 12
NAME = "features.safetensors"


def make_model(seed=0):
    torch.manual_seed(seed)
    heads = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    model = VisionTransformer(32, 8, embed_dim=48, depth=4, num_heads=3, **heads)
    model.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0, "architecture": "tiny"}
    return model


def make_images(folder):
    """Images of several sizes in two classes; number 3 is truncated, number 5 is empty."""
    random = np.random.default_rng(0)
    for number in range(COUNT):
        path = folder / ("cat" if number < COUNT // 2 else "dog") / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (*random.integers(40, 120, 2), 3)
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(path)
    os.truncate(folder / "cat/03.jpg", 500)
    (folder / "cat/05.jpg").write_bytes(b"")
    (folder / "notes.md").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run from the beginning to the end in one go."""
    return extract(images, tmp_path_factory.mktemp("whole") / NAME)


def extract(inputs, out, model=None, **options):
    defaults = {"batch_size": 4, "device": "cpu", "workers": 0}
    return extract_features(inputs, model or make_model(), out, **{**defaults, **options})


def load(path):
    if Path(path).suffix == ".npy":
        return torch.from_numpy(np.load(path))
    with safe_open(path, "pt") as file:
        return file.get_tensor("features")


def index(report):
    return [json.loads(line) for line in report.index.read_text().splitlines()]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def interrupted(images, tmp_path, monkeypatch):
    """Output of an extraction that ended before its third part was written."""
    write = Parts.write

    def stop(self, part, *rest):
        if part == 2:
            raise KeyboardInterrupt
        write(self, part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(images, tmp_path / NAME)
    return tmp_path / NAME


@torch.no_grad()
def test_rows_index_and_record(whole, images):
    model, features, lines = make_model().eval(), load(whole.features), index(whole)
    assert features.shape == whole.shape == (GOOD, 48)
    paths = sorted(str(path) for path in images.rglob("*.jpg"))
    assert [line["path"] for line in lines] == paths
    assert [line["label"] for line in lines] == ["cat"] * 7 + ["dog"] * 7
    rows = [0, 1, 2, None, 3, None, *range(4, GOOD)]
    assert [line["row"] for line in lines] == rows
    assert [i for i, line in enumerate(lines) if "error" in line] == [3, 5]
    assert [path for path, _ in whole.failed] == [paths[3], paths[5]]
    good = [line["path"] for line in lines if line["row"] is not None]
    pixels = [create_transform(model)(Image.open(path).convert("RGB")) for path in good]
    torch.testing.assert_close(features, FeatureExtractor(model)(torch.stack(pixels)))
    settings = whole.settings
    assert (settings["model"], settings["layers"], settings["pool"]) == ("tiny", [3], "avg")
    assert settings["weights_hash"] == weights_fingerprint(make_model())
    with safe_open(whole.features, "np") as file:
        assert file.metadata()["layers"] == "[3]"
    record = json.loads(whole.record.read_text())
    assert (record["rows"], record["failed"]) == (GOOD, 2)
    assert [Path(path).name for path, _ in whole.skipped] == ["notes.md"]
    assert set(files(whole.features.parent)) == {NAME, whole.index.name, whole.record.name}


@pytest.mark.parametrize("options", [{"workers": 2}, {"threads": 1}, {"threads": 3}], ids=str)
def test_same_bytes_on_any_number_of_workers_and_threads(whole, images, tmp_path, options):
    before, model = torch.get_num_threads(), make_model().train()
    model.norm.eval()
    extract(images, tmp_path / NAME, model, **options)
    assert files(tmp_path) == files(whole.features.parent)
    assert torch.get_num_threads() == before
    assert (model.training, model.blocks[0].training, model.norm.training) == (True, True, False)


def run_and_die(images, out, number):
    """Kill this process instead of renaming or removing a file for the given time."""
    numbers = itertools.count(1)

    def dying(method):
        def call(*args, **kwargs):
            if next(numbers) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*args, **kwargs)

        return call

    Path.replace, Path.unlink = dying(Path.replace), dying(Path.unlink)
    extract(images, out)


@pytest.mark.parametrize(
    ("number", "kept"),
    [(1, 0), (3, 0), (4, 1), (7, 4), (9, 4), (10, 4), (12, 4), (14, 4), (15, 4)],
)
def test_same_bytes_after_kill_9(whole, images, tmp_path, monkeypatch, number, kept):
    """While settings, parts, index and record are written, and the parts and the lock removed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ijepa_zoo.extract"])
    child = context.Process(target=run_and_die, args=(images, tmp_path / NAME, number))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    written, write = [], Parts.write
    monkeypatch.setattr(Parts, "write", lambda *args: written.append(args[1]) or write(*args))
    extract(images, tmp_path / NAME)
    assert files(tmp_path) == files(whole.features.parent)
    assert written == list(range(kept, 4))


def test_damaged_parts_are_computed_again(whole, images, interrupted):
    for number, size in enumerate((1, 500)):
        os.truncate(interrupted.with_name(f"{NAME}.parts") / f"00000{number}.safetensors", size)
    extract(images, interrupted)
    assert files(interrupted.parent) == files(whole.features.parent)


def test_same_bytes_from_two_processes_under_torchrun(whole, images, tmp_path):
    script, out = tmp_path / "rank.py", tmp_path / "out" / NAME
    script.write_text(f"""
from test_extract import extract
report = extract([{str(images)!r}], {str(out)!r})
assert report is None or report.shape == ({GOOD}, 48)
""")
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([*launcher, script], env=environment, capture_output=True, timeout=250)
    assert run.returncode == 0, run.stderr.decode()
    assert files(out.parent) == files(whole.features.parent)


def test_ranks_with_different_models_all_fail(images, tmp_path):
    script = f"""
        import os
        from test_extract import extract, make_model
        extract({str(images)!r}, {str(tmp_path / "f.npy")!r}, make_model(int(os.environ["RANK"])))
    """
    results = finish(start(script, 2))
    assert all(status == 1 for status, _ in results)
    assert "weights_hash" in results[1][1]
    assert not (tmp_path / "f.npy").exists()


def test_table(whole, images, tmp_path):
    report = extract(images, tmp_path / "new/folder/g.parquet")
    rows = parquet.read_table(report.features)
    np.testing.assert_array_equal(np.stack(rows["features"].to_numpy()), load(whole.features))
    good = [line for line in index(whole) if line["row"] is not None]
    for name in ("path", "label"):
        assert rows[name].to_pylist() == [line[name] for line in good]
    assert report.index.read_bytes() == whole.index.read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("f.npy", {}, 0),
        ("half.npy", {"dtype": "float16"}, 1e-3),
        ("f.safetensors", {"dtype": "bfloat16"}, 1e-2),
        ("f.npy", {"precision": "bfloat16"}, 2e-2),
        ("f.npy", {"precision": "bfloat16-weights"}, 2e-2),
    ],
    ids=str,
)
def test_formats_and_precisions(whole, images, tmp_path, name, options, error):
    model, exact = make_model(), load(whole.features)
    report = extract(images, tmp_path / name, model, **options)
    found = load(report.features)
    assert str(found.dtype) == f"torch.{report.dtype}" == f"torch.{options.get('dtype', 'float32')}"
    relative = (found.float() - exact).norm() / exact.norm()
    assert error / 1000 <= relative <= error
    assert model.patch_embed.proj.weight.dtype == torch.float32


def test_neighbors_do_not_change_a_row(whole, tmp_path):
    """A row has the same bits whether its neighbors are there or broken."""
    copy = make_images(tmp_path / "copy")
    for number in range(5):  # all images of the first batch
        (copy / f"cat/{number:02}.jpg").write_bytes(b"broken")
    report = extract(copy, tmp_path / "f.npy")
    assert torch.equal(load(report.features), load(whole.features)[4:])
    assert len(report.failed) == 6


def test_finished_run_is_not_repeated_and_others_are_refused(images, tmp_path, monkeypatch):
    out = tmp_path / "f.npy"
    first = extract(images, out)
    before, rows = files(tmp_path), np.load(out)
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", lambda *_: pytest.fail("computed again"))
        again = extract(images, out)
        assert (again.already_done, again.failed) == (True, first.failed)
        with pytest.raises(RunError, match="strict"):
            extract(images, out, strict=True)
        for inputs, name, model, options, named in (
            (images, "f.npy", None, {"layers": "last4"}, r"layers: was \[3\]"),
            (images, "f.npy", make_model(1), {}, "weights_hash"),
            (images / "dog", "f.npy", None, {}, "images: was 14"),
            (images, "f.safetensors", None, {}, r"f\.index\.jsonl"),  # same stem
        ):
            with pytest.raises(RunError, match=named):
                extract(inputs, tmp_path / name, model, **options)
    assert files(tmp_path) == before
    extract(images, out, make_model(1), overwrite=True)
    assert not np.isclose(np.load(out), rows).all(1).any()


def test_a_run_that_another_process_finishes_meanwhile_is_taken(images, tmp_path, monkeypatch):
    out, acquire = tmp_path / "f.npy", FileLock.acquire
    extract(images, tmp_path / "f.npy")
    whole = files(tmp_path)
    for name in whole:
        (tmp_path / name).unlink()

    def finish(lock, *args, **kwargs):
        for name, content in whole.items():
            (tmp_path / name).write_bytes(content)
        return acquire(lock, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", finish)
    assert extract(images, out).already_done
    assert files(tmp_path) == whole


@pytest.mark.parametrize("damaged", ["f.npy", "f.index.jsonl", "f.run.json"])
def test_truncated_files_and_those_of_the_user_are_refused(images, tmp_path, damaged):
    (tmp_path / damaged).write_text("mine")
    with pytest.raises(RunError, match=f"{damaged}' is not from a finished run"):
        extract(images, tmp_path / "f.npy")
    assert (tmp_path / damaged).read_text() == "mine"
    extract(images, tmp_path / "f.npy", overwrite=True)
    before = files(tmp_path)
    os.truncate(tmp_path / damaged, len(before[damaged]) - 4)
    with pytest.raises(RunError, match=str(tmp_path / "f.npy")):
        extract(images, tmp_path / "f.npy")
    extract(images, tmp_path / "f.npy", overwrite=True)
    assert files(tmp_path) == before


def test_an_input_is_not_overwritten(tmp_path):
    array = tmp_path / "images.npy"
    np.save(array, np.zeros((3, 32, 32, 3), np.uint8))
    before = array.read_bytes()
    with pytest.raises(SettingsError, match=str(array)):
        extract(array, array, overwrite=True)
    assert array.read_bytes() == before


def test_unfinished_run_is_resumed_only_with_its_settings(images, interrupted):
    other = FileLock(interrupted.with_name(f"{NAME}.parts") / "lock")
    with other, pytest.raises(RunError, match=str(interrupted)):  # as of a second process
        extract(images, interrupted)
    with pytest.raises(RunError, match="dtype: was float32"):
        extract(images, interrupted, dtype="float16")
    with pytest.raises(RunError, match=r"03\.jpg"):  # of the earlier session
        extract(images, interrupted, strict=True)
    report = extract(images, interrupted, dtype="float16", overwrite=True)
    assert load(report.features).dtype == torch.float16
    extract(images / "dog", interrupted, overwrite=True, strict=True)


def test_output_inside_the_input(tmp_path):
    folder = make_images(tmp_path / "photos")
    first = index(extract(folder, folder / "features.npy"))
    assert extract(folder, folder / "features.npy").already_done
    assert index(extract(folder, folder / "features.npy", overwrite=True)) == first


def test_shard_gives_the_same_features_as_its_files(whole, images, tmp_path):
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
        tar.add(images, "")
    report = extract(tmp_path / "s.tar.gz", tmp_path / "f.npy", workers=2)
    assert torch.equal(load(report.features), load(whole.features))
    lines = index(report)
    assert [line["label"] for line in lines] == ["cat"] * 7 + ["dog"] * 7
    assert lines[0]["path"] == str(tmp_path / "s.tar.gz/cat/00.jpg")


def test_names_that_are_not_utf8(images, tmp_path):
    folder = os.fsencode(tmp_path) + b"/in/\xffclass"
    os.makedirs(folder)
    for name in (b"line\nbreak.png", "日本.png".encode(), b"\xfe.png"):
        shutil.copy(images / "cat/00.jpg", folder + b"/" + name)
    model = make_model()
    model.weights_origin = os.fsdecode(b"weights \xff")
    report = extract(tmp_path / "in", tmp_path / "f.parquet", model)
    paths = {line["path"] for line in index(report)}
    assert len(paths) == 3
    assert all(map(os.path.exists, paths))
    assert parquet.read_table(report.features)["label"].to_pylist() == ["\\udcffclass"] * 3
    table = extract(tmp_path / "in", tmp_path / "g.safetensors", model)
    with safe_open(table.features, "np") as file:
        assert file.metadata()["weights"] == "weights \\udcff"


def test_features_that_are_not_finite_are_refused_and_float32_helps(images, tmp_path):
    model = make_model()
    torch.nn.init.constant_(model.norm.bias, 1e5)  # above the largest float16
    with pytest.raises(RunError, match=r"00\.jpg"):
        extract(images, tmp_path / "f.npy", model, dtype="float16")
    assert extract(images, tmp_path / "f.npy", model).shape == (GOOD, 48)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"out": "f.npy", "dtype": "bfloat16"}, SettingsError, "bfloat16"),
        ({"out": "\udcff.npy"}, SettingsError, "udcff"),
        ({"out": "f.csv"}, SettingsError, r"f\.csv"),
        ({"out": "f.parquet", "pool": None}, SettingsError, "parquet"),
        ({"out": "f.npy", "dtype": "float64"}, SettingsError, "float64"),
        ({"out": "f.npy", "precision": "fp8"}, SettingsError, "fp8"),
        ({"out": "f.npy", "precision": "float16"}, SettingsError, "GPU"),
        ({"out": "f.npy", "batch_size": 0}, SettingsError, "batch_size"),
        ({"out": "f.npy", "layers": [7]}, SettingsError, "from 0 to 3"),
        ({"out": "f.npy", "inputs": "absent"}, DataError, "absent"),
        ({"out": "f.parquet"}, MissingPackageError, "pyarrow"),
    ],
    ids=str,
)
def test_wrong_arguments(images, tmp_path, monkeypatch, options, error, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ijepa_zoo.extract.find_spec", lambda _: None)
    with pytest.raises(error, match=named):
        extract(**{"inputs": images, **options})


@settings(deadline=None, max_examples=30)
@given(images=st.integers(1, 2_000_000), batch_size=st.integers(1, 5000))
def test_parts_have_every_image_once_and_stay_few(images, batch_size):
    parts = Parts(Path(), images, batch_size)
    numbers = range(len(parts))
    assert len(parts) <= 4096
    assert sum(map(parts.size, numbers)) == images
    assert min(map(parts.size, numbers)) > 0
    batches = [parts.batches(part) for part in numbers]
    assert batches[0].start == 0
    assert all(one.stop == two.start for one, two in itertools.pairwise(batches))
    assert batches[-1].stop == -(-images // batch_size)


def test_fingerprints_see_every_element():
    model = make_model()
    before = weights_fingerprint(model)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[5, 7] += 1e-3
    assert weights_fingerprint(model) != before
