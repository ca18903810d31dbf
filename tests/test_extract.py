"""Extraction: the same bytes after kills, and for any number of workers, threads and ranks."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

from ijepa_zoo.data.transforms import create_transform
from ijepa_zoo.encode import Encoder, weights_fingerprint
from ijepa_zoo.errors import DataError, MissingPackageError, RunError, SettingsError
from ijepa_zoo.extract import ExtractionReport, ImageBatches, Parts, extract_features
from ijepa_zoo.features import FeatureExtractor

OPTIONS: dict[str, Any] = {"batch_size": 4, "device": "cpu", "workers": 0}


def make_model(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    heads = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    model = VisionTransformer(64, 8, embed_dim=48, depth=5, num_heads=3, **heads)
    model.pretrained_cfg = {"input_size": (3, 64, 64), "crop_pct": 1.0, "architecture": "tiny"}
    return model


def make_images(folder: Path, count: int = 22) -> Path:
    """Images of several sizes in two classes; number 3 is truncated, number 10 is empty."""
    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / ("cat" if number < count // 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        size = (int(random.integers(40, 120)), int(random.integers(40, 120)), 3)
        image = Image.fromarray(random.integers(0, 256, size, np.uint8))
        image.save(place / f"{number:02}.jpg")
    data = (folder / "cat/03.jpg").read_bytes()
    (folder / "cat/03.jpg").write_bytes(data[: len(data) // 2])
    (folder / "cat/10.jpg").write_bytes(b"")
    (folder / "notes.md").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractionReport:
    """A run from the beginning to the end in one go."""
    return extract(images, tmp_path_factory.mktemp("whole") / "features.safetensors")


def extract(inputs: Any, out: Path, model: Any = None, **options: Any) -> ExtractionReport:
    report = extract_features(inputs, model or make_model(), out, **{**OPTIONS, **options})
    assert report is not None
    return report


def load(report: ExtractionReport) -> np.ndarray:
    with safe_open(report.features, "np") as file:
        return file.get_tensor("features")


def index(report: ExtractionReport) -> list[dict[str, Any]]:
    return [json.loads(line) for line in report.index.read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_at(name: str, stop: Any) -> None:
    """Call `stop` instead of writing or removing the file of that name, in this process."""
    replace, unlink = Path.replace, Path.unlink

    def stopping_replace(self: Path, target: Path) -> Path:
        return stop() if target.name == name else replace(self, target)

    def stopping_unlink(self: Path, missing_ok: bool = False) -> None:
        return stop() if f"remove {self.name}" == name else unlink(self, missing_ok)

    Path.replace, Path.unlink = stopping_replace, stopping_unlink  # type: ignore[method-assign]


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def interrupted(images: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs an extraction that ends where a file would be written."""

    def run(out: Path, at: str = "000003.rows", **options: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", Path.replace)  # so that it is put back
            patch.setattr(Path, "unlink", Path.unlink)
            stop_at(at, interrupt)
            with pytest.raises(KeyboardInterrupt):
                extract(images, out, **options)

    return run


@torch.no_grad()
def test_rows_are_the_features_of_their_images(whole: ExtractionReport) -> None:
    model = make_model().eval()
    features, lines = load(whole), index(whole)
    assert features.shape == whole.shape == (20, 48)
    assert [line["row"] for line in lines if line["row"] is not None] == list(range(20))
    for line in lines:
        if line["row"] is not None:
            pixels = create_transform(model)(Image.open(line["path"]).convert("RGB"))
            expected = FeatureExtractor(model)(pixels[None])[0]
            torch.testing.assert_close(torch.from_numpy(features[line["row"]]), expected)


def test_index_has_every_file_in_order(whole: ExtractionReport, images: Path) -> None:
    lines = index(whole)
    expected = sorted(str(path) for path in images.rglob("*.*"))
    assert [line["path"] for line in lines] == expected
    assert [line["label"] for line in lines] == ["cat"] * 11 + ["dog"] * 11 + [None]
    assert [i for i, line in enumerate(lines) if "error" in line] == [3, 10]
    assert lines[3]["row"] is None
    assert lines[22]["row"] is None
    assert ".md" in lines[22]["skipped"]
    assert [path for path, _ in whole.failed] == [expected[3], expected[10]]
    assert whole.skipped == 1


def test_settings_are_recorded(whole: ExtractionReport) -> None:
    with safe_open(whole.features, "np") as file:
        metadata = file.metadata()
    assert metadata["model"] == "tiny"
    assert metadata["layers"] == "[4]"
    assert metadata["pool"] == "avg"
    assert metadata["weights_hash"] == weights_fingerprint(make_model())
    assert metadata["transform"].startswith("bicubic resize, center crop 1 to 64x64")
    record = json.loads(whole.record.read_text())
    assert (record["rows"], record["failed"], record["skipped"]) == (20, 2, 1)
    assert record["bytes"] == [len(p.read_bytes()) for p in (whole.features, whole.index)]
    written = {whole.features.name, whole.index.name, whole.record.name}
    assert set(files(whole.features.parent)) == written


@pytest.mark.parametrize("options", [{"workers": 2}, {"threads": 1}, {"threads": 3, "workers": 1}])
def test_same_bytes_on_any_number_of_workers_and_threads(
    whole: ExtractionReport, images: Path, tmp_path: Path, options: dict[str, int]
) -> None:
    before = torch.get_num_threads()
    extract(images, tmp_path / "features.safetensors", **options)
    assert files(tmp_path) == files(whole.features.parent)
    assert torch.get_num_threads() == before


def run_and_die(images: Path, out: Path, at: str) -> None:
    stop_at(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    extract(images, out)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("at", "left"),
    [
        ("settings.json", 6),
        ("000003.json", 3),
        ("features.index.jsonl", 0),
        ("features.run.json", 0),
        ("remove 000004.rows", 0),
        ("remove settings.json", 0),
        ("remove lock", 0),
    ],
)
def test_same_bytes_after_kill_9(
    whole: ExtractionReport, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    at: str, left: int, overwrite: bool,
) -> None:  # fmt: skip
    out = tmp_path / "features.safetensors"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ijepa_zoo.extract"])
    child = context.Process(target=run_and_die, args=(images, out, at))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    written: list[int] = []
    write = Parts.write
    monkeypatch.setattr(
        Parts, "write", lambda self, part, *rest: (written.append(part), write(self, part, *rest))
    )
    extract(images, out, overwrite=overwrite)
    assert files(tmp_path) == files(whole.features.parent)
    if not overwrite:
        assert written == list(range(6 - left, 6))


RANK = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_extract import OPTIONS, extract_features, make_model
report = extract_features([Path({images!r})], make_model(), {out!r}, **OPTIONS)
assert report is None or report.shape == (20, 48)
"""


def test_same_bytes_from_two_processes_under_torchrun(
    whole: ExtractionReport, images: Path, tmp_path: Path
) -> None:
    script, out = tmp_path / "rank.py", tmp_path / "out/features.safetensors"
    script.write_text(
        RANK.format(tests=str(Path(__file__).parent), images=str(images), out=str(out))
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run(
        [*launcher, "--standalone", str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert files(out.parent) == files(whole.features.parent)


def test_ranks_with_different_models_all_fail(images: Path, tmp_path: Path) -> None:
    from several_processes import finish, start

    script = f"""
        import os
        from test_extract import OPTIONS, extract_features, make_model
        model = make_model(int(os.environ["RANK"]))
        extract_features({str(images)!r}, model, {str(tmp_path / "f.npy")!r}, **OPTIONS)
    """
    results = finish(start(script, 2))
    assert all(status == 1 for status, _ in results)
    assert "weights_hash" in results[1][1]
    assert not (tmp_path / "f.npy").exists()


def test_formats_agree(whole: ExtractionReport, images: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    npy = extract(images, tmp_path / "f.npy")
    table = extract(images, tmp_path / "g.parquet")
    np.testing.assert_array_equal(np.load(npy.features), load(whole))
    rows = parquet.read_table(table.features)
    np.testing.assert_array_equal(np.stack(rows["features"].to_numpy()), load(whole))
    good = [line for line in index(whole) if line["row"] is not None]
    assert rows["path"].to_pylist() == [line["path"] for line in good]
    assert rows["label"].to_pylist() == [line["label"] for line in good]
    assert npy.index.read_bytes() == table.index.read_bytes() == whole.index.read_bytes()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_dtypes(whole: ExtractionReport, images: Path, tmp_path: Path, name: str) -> None:
    report = extract(images, tmp_path / "f.st", dtype=name, format="safetensors")
    with safe_open(report.features, "pt") as file:
        got = file.get_tensor("features")
    assert torch.equal(got, torch.from_numpy(load(whole)).to(getattr(torch, name)))


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16-weights"])
def test_precision(whole: ExtractionReport, images: Path, tmp_path: Path, precision: str) -> None:
    model = make_model()
    report = extract(images, tmp_path / "f.npy", model, precision=precision)
    got, exact = np.load(report.features), load(whole)
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.02
    assert model.patch_embed.proj.weight.dtype == torch.float32


def test_maps_and_several_layers(whole: ExtractionReport, images: Path, tmp_path: Path) -> None:
    report = extract(images, tmp_path / "f.npy", layers=[0, -1], pool=None)
    maps = np.load(report.features)
    assert maps.shape == (20, 96, 8, 8)
    np.testing.assert_allclose(maps[:, 48:].mean((2, 3)), load(whole), atol=1e-5)


def test_a_resnet(images: Path, tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=0)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    pooled = np.load(extract(images, tmp_path / "f.npy", model).features)
    maps = np.load(extract(images, tmp_path / "m.npy", model, pool=None).features)
    assert maps.shape == (20, 512, 2, 2)
    np.testing.assert_allclose(maps.mean((2, 3)), pooled, atol=1e-5)


def test_neighbors_do_not_change_a_row(images: Path, tmp_path: Path) -> None:
    """A row has the same bits whether its neighbors are there or broken."""
    copy = make_images(tmp_path / "copy")
    for number in (0, 1, 5, 6):
        (copy / f"cat/{number:02}.jpg").write_bytes(b"broken")
    rows = {}
    for folder in (images, copy):
        report = extract(folder, tmp_path / f"{folder.name}.npy")
        features, lines = np.load(report.features), index(report)
        good = [line for line in lines if line["row"] is not None]
        rows[folder] = {Path(line["path"]).name: features[line["row"]] for line in good}
    assert len(rows[copy]) == 16
    for name, row in rows[copy].items():
        np.testing.assert_array_equal(row, rows[images][name])


def test_finished_run_is_not_repeated(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = extract(images, tmp_path / "f.npy")
    record = json.loads(first.record.read_text())
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("computed again"))
    again = extract(images, tmp_path / "f.npy")
    assert again.already_done
    assert again.failed == first.failed
    del record["bytes"]  # as version 0.1 wrote it
    first.record.write_text(json.dumps(record))
    assert extract(images, tmp_path / "f.npy").already_done


@pytest.mark.parametrize("damaged", ["f.npy", "f.index.jsonl", "f.run.json"])
def test_truncated_files_are_not_taken_for_finished(
    images: Path, tmp_path: Path, damaged: str
) -> None:
    out = tmp_path / "f.npy"
    extract(images, out)
    before = files(tmp_path)
    os.truncate(tmp_path / damaged, len(before[damaged]) - 4)
    with pytest.raises(RunError, match=str(out)):
        extract(images, out)
    extract(images, out, overwrite=True)
    assert files(tmp_path) == before


def test_other_settings_are_refused(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.npy"
    extract(images, out)
    before, rows = files(tmp_path), np.load(out)
    with pytest.raises(RunError, match=r"layers: was \[4\]"):
        extract(images, out, layers="last4")
    with pytest.raises(RunError, match=r"weights_hash"):
        extract(images, out, make_model(1))
    with pytest.raises(RunError, match="images: was 22"):
        extract(images / "dog", out)
    with pytest.raises(RunError, match=r"f\.index\.jsonl"):  # same stem
        extract(images, tmp_path / "f.safetensors")
    assert files(tmp_path) == before
    extract(images, out, make_model(1), overwrite=True)
    assert not np.isclose(np.load(out), rows).all(1).any()


def test_files_of_somebody_else_are_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "f.index.jsonl").write_text("mine")
    with pytest.raises(RunError, match=r"f\.index\.jsonl"):
        extract(images, tmp_path / "f.npy")
    assert (tmp_path / "f.index.jsonl").read_text() == "mine"


def test_parts_of_other_settings_are_refused(
    images: Path, tmp_path: Path, interrupted: Any
) -> None:
    out = tmp_path / "f.npy"
    interrupted(out)
    with pytest.raises(RunError, match="dtype: was float32"):
        extract(images, out, dtype="float16")
    report = extract(images, out, dtype="float16", overwrite=True)
    assert np.load(report.features).dtype == np.float16


@pytest.mark.parametrize(
    "damage",
    [
        lambda parts: os.truncate(parts / "000001.rows", 100),
        lambda parts: (parts / "000001.rows").unlink(),
        lambda parts: (parts / "000001.json").write_text("{"),
        lambda parts: (parts / "000001.json").write_text("[null]"),
        lambda parts: (parts / "settings.json").write_text("{"),
    ],
)
def test_damaged_parts_are_computed_again(
    whole: ExtractionReport, images: Path, tmp_path: Path, interrupted: Any, damage: Any
) -> None:
    out = tmp_path / "features.safetensors"
    interrupted(out)
    damage(tmp_path / "features.safetensors.parts")
    extract(images, out)
    assert files(tmp_path) == files(whole.features.parent)


def test_second_process_is_refused(images: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "features.npy", tmp_path / "features.npy.parts"
    parts.mkdir()
    with FileLock(parts / "lock"), pytest.raises(RunError, match=str(out)):
        extract(images, out)
    assert extract(images, out).shape == (20, 48)
    assert not parts.exists()


def test_strict_stops_at_the_first_failure(images: Path, tmp_path: Path, interrupted: Any) -> None:
    out = tmp_path / "f.npy"
    with pytest.raises(RunError, match=r"03\.jpg"):
        extract(images, out, strict=True)
    assert not out.exists()
    interrupted(out)
    with pytest.raises(RunError, match=r"03\.jpg"):  # of the earlier session
        extract(images, out, strict=True)
    extract(images / "dog", out, overwrite=True, strict=True)


def test_output_inside_the_input(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "photos")
    first = extract(folder, folder / "features.npy")
    assert extract(folder, folder / "features.npy").already_done
    lines = index(first)
    extract(folder, folder / "features.npy", overwrite=True)
    assert index(first) == lines


def test_shard_gives_the_same_features_as_its_files(
    whole: ExtractionReport, images: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
        for path in sorted(images.rglob("*.jpg")):
            tar.add(path, path.relative_to(images))
    report = extract(tmp_path / "s.tar.gz", tmp_path / "f.npy", workers=2)
    np.testing.assert_array_equal(np.load(report.features), load(whole))
    lines, expected = index(report), index(whole)[:22]
    assert [line["label"] for line in lines] == [line["label"] for line in expected]
    assert [line.get("error") for line in lines] == [line.get("error") for line in expected]
    assert lines[0]["path"] == str(tmp_path / "s.tar.gz/cat/00.jpg")


def test_names_that_are_not_utf8(images: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    folder = os.fsencode(tmp_path) + b"/in/\xffclass"
    os.makedirs(folder)
    for name in (b"line\nbreak.png", "日本.png".encode(), b"\xfe.png"):
        shutil.copy(images / "cat/00.jpg", folder + b"/" + name)
    model = make_model()
    model.weights_origin = os.fsdecode(b"weights \xff")
    report = extract(tmp_path / "in", tmp_path / "f.parquet", model)
    lines = report.index.read_bytes().splitlines()
    paths = [os.fsencode(json.loads(line)["path"]) for line in lines]
    assert all(os.path.exists(path) for path in paths)
    assert len(set(paths)) == 3
    assert parquet.read_table(report.features)["label"].to_pylist() == ["\\udcffclass"] * 3
    table = extract(tmp_path / "in", tmp_path / "g.safetensors", model)
    with safe_open(table.features, "np") as file:
        assert file.metadata()["weights"] == "weights \\udcff"


def test_nothing_decodes(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    report = extract(tmp_path, tmp_path / "out/f.npy")
    assert np.load(report.features).shape == (0, 48)
    assert len(report.failed) == 1


def test_features_that_are_not_finite_are_refused(images: Path, tmp_path: Path) -> None:
    model = make_model()
    torch.nn.init.constant_(model.norm.bias, 1e5)  # above the largest float16
    with pytest.raises(RunError, match=r"00\.jpg"):
        extract(images, tmp_path / "f.npy", model, dtype="float16")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"out": "f.npy", "dtype": "bfloat16"}, "bfloat16"),
        ({"out": "f.csv"}, "f.csv"),
        ({"out": "f.parquet", "pool": None}, "parquet"),
        ({"out": "f.npy", "dtype": "float64"}, "float64"),
        ({"out": "f.npy", "precision": "fp8"}, "fp8"),
        ({"out": "f.npy", "precision": "float16"}, "GPU"),
        ({"out": "f.npy", "batch_size": 0}, "batch_size"),
        ({"out": "f.npy", "layers": [7]}, "from 0 to 4"),
        ({"out": "f.npy", "pool": "cls"}, "cls"),
    ],
)
def test_wrong_arguments(images: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        extract_features([images], make_model(), **{**OPTIONS, **options})
    with pytest.raises(DataError, match="absent"):
        extract(images / "absent", Path("f.npy"))


def test_parquet_needs_pyarrow(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ijepa_zoo.extract.find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match="pyarrow"):
        extract(images, Path("f.parquet"))


def test_batches_fill_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(make_model(), device="cpu")
    assert encoder.batch_size == 32
    encoder.device = torch.device("cuda", 0)
    assert encoder.batch_size == 1024  # of 64 patches


def test_training_mode_is_kept(images: Path, tmp_path: Path) -> None:
    model = make_model().train()
    model.norm.eval()
    extract(images, tmp_path / "f.npy", model)
    assert model.training
    assert model.blocks[0].training
    assert not model.norm.training


def test_killed_workers_are_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageBatches, "__getitem__", lambda *_: os.kill(os.getpid(), 9))
    with pytest.raises(RunError, match="fewer workers"):
        extract(images, tmp_path / "f.npy", workers=1)


def test_parts_stay_few(tmp_path: Path) -> None:
    many = Parts(tmp_path, 1_281_167, 32, 192)
    assert len(many) <= 4096
    assert sum(many.size(part) for part in range(len(many))) == 1_281_167
    batches = [batch for part in range(len(many)) for batch in many.batches(part)]
    assert batches == list(range(-(-1_281_167 // 32)))
    few = Parts(tmp_path, 10, 4, 192)
    assert [few.size(part) for part in range(len(few))] == [4, 4, 2]


def test_an_input_is_never_written_over(images: Path, tmp_path: Path) -> None:
    array = tmp_path / "images.npy"
    np.save(array, np.zeros((3, 64, 64, 3), np.uint8))
    before = array.read_bytes()
    with pytest.raises(SettingsError, match=str(array)):
        extract(array, array, overwrite=True)
    assert array.read_bytes() == before


def test_settings_of_a_run_without_finished_parts_may_change(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.npy"
    model = make_model()
    with torch.no_grad():
        model.norm.weight.fill_(1e5)
    with pytest.raises(RunError, match="float32"):
        extract(images, out, model, dtype="float16")
    assert extract(images, out, model).shape == (20, 48)


def test_fingerprint_sees_every_element() -> None:
    model = make_model()
    before = weights_fingerprint(model)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[5, 7] += 1e-3
    assert weights_fingerprint(model) != before
