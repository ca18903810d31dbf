"""The extraction run: the same bytes after kills, on any number of workers, threads and ranks."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

from ijepa_zoo.data.transforms import create_transform
from ijepa_zoo.errors import DataError, RunError
from ijepa_zoo.extraction import ExtractionReport, extract_features
from ijepa_zoo.extraction import encoder as encoder_module
from ijepa_zoo.extraction.encoder import Encoder, weights_fingerprint
from ijepa_zoo.extraction.parts import Parts
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
    out = tmp_path_factory.mktemp("whole") / "features.safetensors"
    return extract_features([images], make_model(), out, **OPTIONS)


def load(report: ExtractionReport) -> np.ndarray:
    with safe_open(report.features, "np") as file:
        return file.get_tensor("features")


def index(report: ExtractionReport) -> list[dict[str, Any]]:
    return [json.loads(line) for line in report.index.read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    assert lines[3]["row"] is None
    assert lines[3]["error"].startswith("truncated image: ")
    assert lines[10]["error"] == "empty file"
    assert lines[22] == {
        **{"row": None, "path": expected[22], "label": None},
        "skipped": "not an image by its name (.md)",
    }
    assert [path for path, _ in whole.failed] == [expected[3], expected[10]]
    assert whole.skipped == 1


def test_metadata_says_what_the_features_are(whole: ExtractionReport) -> None:
    with safe_open(whole.features, "np") as file:
        metadata = file.metadata()
    assert metadata["model"] == "tiny"
    assert metadata["layers"] == "[4]"
    assert metadata["weights_hash"] == weights_fingerprint(make_model())
    assert metadata["transform"].startswith("bicubic resize, center crop 1 to 64x64")
    record = json.loads(whole.record.read_text())
    assert (record["rows"], record["failed"], record["skipped"]) == (20, 2, 1)
    assert sorted(files(whole.features.parent)) == [
        *("features.index.jsonl", "features.run.json", "features.safetensors")
    ]


@pytest.mark.parametrize("options", [{"workers": 2}, {"threads": 1}, {"threads": 3, "workers": 1}])
def test_same_bytes_on_any_number_of_workers_and_threads(
    whole: ExtractionReport, images: Path, tmp_path: Path, options: dict[str, int]
) -> None:
    before = torch.get_num_threads()
    extract_features(
        [images], make_model(), tmp_path / "features.safetensors", **{**OPTIONS, **options}
    )
    assert files(tmp_path) == files(whole.features.parent)
    assert torch.get_num_threads() == before


def killed_while_writing_a_part(images: Path, out: Path) -> None:
    write = Parts.write

    def kill(self: Parts, part: int, *rest: Any) -> None:
        if part == 3:
            self.rows_file(part).write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, part, *rest)

    Parts.write = kill  # type: ignore[method-assign]
    extract_features([images], make_model(), out, **OPTIONS)


def killed_while_merging(images: Path, out: Path) -> None:
    replace = Path.replace

    def kill(self: Path, target: Path) -> Path:
        if target.name.endswith(".run.json"):
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = kill  # type: ignore[method-assign]
    extract_features([images], make_model(), out, **OPTIONS)


@pytest.mark.parametrize(
    ("run", "done"), [(killed_while_writing_a_part, 3), (killed_while_merging, 6)]
)
def test_same_bytes_after_kill_9(
    whole: ExtractionReport,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[Path, Path], None],
    done: int,
) -> None:
    out = tmp_path / "features.safetensors"
    distributed = multiprocessing.get_context("forkserver")
    distributed.set_forkserver_preload(["ijepa_zoo.extraction"])
    child = distributed.Process(target=run, args=(images, out))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    written: list[int] = []
    write = Parts.write
    monkeypatch.setattr(
        Parts, "write", lambda self, part, *rest: (written.append(part), write(self, part, *rest))
    )
    extract_features([images], make_model(), out, **OPTIONS)
    assert written == list(range(done, 6))
    assert files(tmp_path) == files(whole.features.parent)


RANK = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_extraction import OPTIONS, extract_features, make_model
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


def as_rank(rank: int, port: int, seed: int, images: Path, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    extract_features([images], make_model(seed), out, **OPTIONS)


def test_ranks_that_differ_all_fail(images: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    distributed = multiprocessing.get_context("forkserver")
    ranks = [
        distributed.Process(target=as_rank, args=(rank, port, rank, images, tmp_path / "f.npy"))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [1, 1]
    assert not (tmp_path / "f.npy").exists()


def test_interrupted_run_goes_on(
    whole: ExtractionReport, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Parts.write

    def interrupt(self: Parts, part: int, *rest: Any) -> None:
        if part == 2:
            raise KeyboardInterrupt
        write(self, part, *rest)

    out = tmp_path / "features.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            extract_features([images], make_model(), out, **OPTIONS)
    extract_features([images], make_model(), out, **OPTIONS)
    assert files(tmp_path) == files(whole.features.parent)


def test_formats_agree(whole: ExtractionReport, images: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    npy = extract_features([images], make_model(), tmp_path / "f.npy", **OPTIONS)
    table = extract_features([images], make_model(), tmp_path / "g.parquet", **OPTIONS)
    np.testing.assert_array_equal(np.load(npy.features), load(whole))
    rows = parquet.read_table(table.features)
    np.testing.assert_array_equal(np.stack(rows["features"].to_numpy()), load(whole))
    good = [line for line in index(whole) if line["row"] is not None]
    assert rows["path"].to_pylist() == [line["path"] for line in good]
    assert rows["label"].to_pylist() == [line["label"] for line in good]
    assert npy.index.read_bytes() == table.index.read_bytes() == whole.index.read_bytes()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_dtypes(whole: ExtractionReport, images: Path, tmp_path: Path, name: str) -> None:
    report = extract_features([images], make_model(), tmp_path / "f.st", dtype=name,
                              format="safetensors", **OPTIONS)  # fmt: skip
    with safe_open(report.features, "pt") as file:
        got = file.get_tensor("features")
    assert torch.equal(got, torch.from_numpy(load(whole)).to(getattr(torch, name)))


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16-weights"])
def test_precision(whole: ExtractionReport, images: Path, tmp_path: Path, precision: str) -> None:
    model = make_model()
    report = extract_features([images], model, tmp_path / "f.npy", precision=precision, **OPTIONS)
    got, exact = np.load(report.features), load(whole)
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.02
    assert model.patch_embed.proj.weight.dtype == torch.float32


def test_maps_and_several_layers(whole: ExtractionReport, images: Path, tmp_path: Path) -> None:
    report = extract_features([images], make_model(), tmp_path / "f.npy", layers=[0, -1],
                              pool=None, **OPTIONS)  # fmt: skip
    maps = np.load(report.features)
    assert maps.shape == (20, 96, 8, 8)
    np.testing.assert_allclose(maps[:, 48:].mean((2, 3)), load(whole), atol=1e-5)


def test_neighbours_do_not_change_a_row(images: Path, tmp_path: Path) -> None:
    """A row has the same bits whether its neighbours are there or broken."""
    copy = make_images(tmp_path / "copy")
    for number in (0, 1, 5, 6):
        (copy / f"cat/{number:02}.jpg").write_bytes(b"broken")
    whole_rows = {}
    for place in (images, copy):
        report = extract_features([place], make_model(), tmp_path / f"{place.name}.npy", **OPTIONS)
        rows, lines = np.load(report.features), index(report)
        whole_rows[place] = {
            Path(line["path"]).name: rows[line["row"]] for line in lines if line["row"] is not None
        }
    assert len(whole_rows[copy]) == 16
    for name, row in whole_rows[copy].items():
        np.testing.assert_array_equal(row, whole_rows[images][name])


def test_finished_run_is_not_repeated(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.npy"
    first = extract_features([images], make_model(), out, **OPTIONS)
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("computed again"))
    again = extract_features([images], make_model(), out, **OPTIONS)
    assert again.already_done
    assert again.failed == first.failed
    assert not (tmp_path / "f.npy.parts").exists()


def test_other_settings_are_refused(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.npy"
    extract_features([images], make_model(), out, **OPTIONS)
    before, rows = files(tmp_path), np.load(out)
    with pytest.raises(RunError, match=r"layers: \[4\] then, \[1, 2, 3, 4\] now"):
        extract_features([images], make_model(), out, layers="last4", **OPTIONS)
    with pytest.raises(RunError, match=r"weights_hash: .* --overwrite"):
        extract_features([images], make_model(1), out, **OPTIONS)
    with pytest.raises(RunError, match="images: 22 then, 11 now"):
        extract_features([images / "dog"], make_model(), out, **OPTIONS)
    with pytest.raises(RunError, match=r"f.index.jsonl' exists"):  # same stem
        extract_features([images], make_model(), tmp_path / "f.safetensors", **OPTIONS)
    assert files(tmp_path) == before
    report = extract_features([images], make_model(1), out, overwrite=True, **OPTIONS)
    assert not np.isclose(np.load(report.features), rows).all(1).any()
    out.unlink()
    out.with_suffix(".index.jsonl").write_text("mine")
    with pytest.raises(RunError, match="is not from a finished run"):
        extract_features([images], make_model(1), out, **OPTIONS)


def test_parts_of_other_settings_are_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.npy"
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract_features([images], make_model(), out, **OPTIONS)
    with pytest.raises(RunError, match=r"unfinished run .*dtype: float32 then, float16 now"):
        extract_features([images], make_model(), out, dtype="float16", **OPTIONS)
    report = extract_features(
        [images], make_model(), out, dtype="float16", overwrite=True, **OPTIONS
    )
    assert np.load(report.features).dtype == np.float16


def interrupted(*_: object) -> Any:
    yield from ()
    raise KeyboardInterrupt


def test_folder_of_somebody_else_is_left_alone(images: Path, tmp_path: Path) -> None:
    (tmp_path / "f.npy.parts").mkdir()
    (tmp_path / "f.npy.parts/thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"thesis\.tex"):
        extract_features([images], make_model(), tmp_path / "f.npy", overwrite=True, **OPTIONS)
    assert (tmp_path / "f.npy.parts/thesis.tex").exists()


def test_second_process_is_told(images: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    out = tmp_path / "f.npy"
    (tmp_path / "f.npy.parts").mkdir()
    with (
        FileLock(tmp_path / "f.npy.parts/rank0.lock"),
        pytest.raises(RunError, match="another process is writing"),
    ):
        extract_features([images], make_model(), out, **OPTIONS)
    assert extract_features([images], make_model(), out, **OPTIONS).shape == (20, 48)


def test_strict_stops_at_the_first(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.npy"
    with pytest.raises(RunError, match=r"03\.jpg"):
        extract_features([images], make_model(), out, strict=True, **OPTIONS)
    assert not out.exists()
    extract_features([images / "dog"], make_model(), out, overwrite=True, strict=True, **OPTIONS)


def test_strict_sees_failures_of_an_earlier_session(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ijepa_zoo.extraction.run.merge", lambda *_: next(interrupted()))
        with pytest.raises(KeyboardInterrupt):
            extract_features([images], make_model(), tmp_path / "f.npy", **OPTIONS)
    with pytest.raises(RunError, match=r"03\.jpg"):
        extract_features([images], make_model(), tmp_path / "f.npy", strict=True, **OPTIONS)


def test_output_inside_the_input(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "photos")
    out = folder / "features.npy"
    first = extract_features([folder], make_model(), out, **OPTIONS)
    assert extract_features([folder], make_model(), out, **OPTIONS).already_done
    lines = index(first)
    extract_features([folder], make_model(), out, overwrite=True, **OPTIONS)
    assert index(first) == lines


def test_shard_gives_the_same_features_as_its_files(
    whole: ExtractionReport, images: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
        for path in sorted(images.rglob("*.jpg")):
            tar.add(path, path.relative_to(images))
    report = extract_features(
        [tmp_path / "s.tar.gz"], make_model(), tmp_path / "f.npy", **{**OPTIONS, "workers": 2}
    )
    np.testing.assert_array_equal(np.load(report.features), load(whole))
    lines, expected = index(report), index(whole)[:22]
    assert [line["label"] for line in lines] == [line["label"] for line in expected]
    assert [line.get("error") for line in lines] == [line.get("error") for line in expected]
    assert lines[0]["path"] == str(tmp_path / "s.tar.gz/cat/00.jpg")


def test_odd_file_names(tmp_path: Path) -> None:
    from pyarrow import parquet

    folder = os.fsencode(tmp_path) + b"/in/\xffclass"
    os.makedirs(folder)
    for name in (b"line\nbreak.png", "日本.png".encode(), b"\xfe.png"):
        image = io.BytesIO()
        Image.new("RGB", (8, 8)).save(image, "PNG")
        with open(folder + b"/" + name, "wb") as file:
            file.write(image.getvalue())
    report = extract_features([tmp_path / "in"], make_model(), tmp_path / "f.parquet", **OPTIONS)
    lines = report.index.read_bytes().splitlines()
    paths = [os.fsencode(json.loads(line)["path"]) for line in lines]
    names = [path.rpartition(b"/")[2] for path in paths]
    assert names == [b"line\nbreak.png", "日本.png".encode(), b"\xfe.png"]
    assert all(os.path.exists(path) for path in paths)
    assert parquet.read_table(report.features)["label"].to_pylist() == ["\\udcffclass"] * 3


def test_nothing_decodes(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    report = extract_features([tmp_path], make_model(), tmp_path / "out/f.npy", **OPTIONS)
    assert np.load(report.features).shape == (0, 48)
    assert len(report.failed) == 1


def test_features_that_are_not_finite_are_refused(images: Path, tmp_path: Path) -> None:
    model = make_model()
    torch.nn.init.constant_(model.norm.bias, 1e5)  # above the largest float16
    with pytest.raises(RunError, match="not finite: use float32"):
        extract_features([images], model, tmp_path / "f.npy", dtype="float16", **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "f.npy", "dtype": "bfloat16"}, "npy cannot hold bfloat16"),
        ({"out": "f.csv"}, "format of 'f.csv' is not clear"),
        ({"out": "f.parquet", "pool": None}, "parquet holds one vector per image"),
        ({"out": "."}, "format of '.' is not clear"),
        ({"out": ".", "format": "npy"}, "is a folder; name a file"),
        ({"out": "f.npy", "dtype": "float64"}, "dtype is 'float64'"),
        ({"out": "f.npy", "precision": "fp8"}, "precision is 'fp8'"),
        ({"out": "f.npy", "precision": "float16"}, "needs a GPU"),
        ({"out": "f.npy", "batch_size": 0}, "at least 1"),
        ({"out": "f.npy", "layers": [7]}, "from 0 to 4"),
    ],
)
def test_wrong_arguments(images: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract_features([images], make_model(), **{**OPTIONS, **options})
    with pytest.raises(DataError, match="absent"):
        extract_features([images / "absent"], make_model(), "f.npy", **OPTIONS)


def test_defaults_fill_a_gpu_and_are_recorded(
    whole: ExtractionReport, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = extract_features([images], make_model(), tmp_path / "f.npy", device="cpu", workers=0)
    assert report.settings["precision"] == "float32"
    assert report.settings["batch_size"] == 22  # all images, fewer than 32
    with safe_open(whole.features, "np") as file:
        expected = file.get_tensor("features")
    np.testing.assert_allclose(np.load(report.features), expected, atol=1e-5)
    capability = {"nvidia": (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability["nvidia"])
    encoder = Encoder(make_model(), device="cpu")
    assert encoder.batch_size == 32
    assert encoder_module._fast_precision(torch.device("mps")) == "float32"
    encoder.device = torch.device("cuda", 0)
    assert encoder.batch_size == 1024  # of 64 patches
    encoder.grid = (64, 64)
    assert encoder.batch_size == 32
    assert encoder_module._fast_precision(encoder.device) == "bfloat16"
    capability["nvidia"] = (7, 5)
    assert encoder_module._fast_precision(encoder.device) == "float16"


def test_training_mode_is_kept(images: Path, tmp_path: Path) -> None:
    model = make_model().train()
    model.norm.eval()
    extract_features([images], model, tmp_path / "f.npy", **OPTIONS)
    assert model.training
    assert model.blocks[0].training
    assert not model.norm.training


def test_parts_stay_few(tmp_path: Path) -> None:
    many = Parts(tmp_path, 1_281_167, 32, 192)
    assert len(many) <= 4096
    assert sum(many.size(part) for part in range(len(many))) == 1_281_167
    batches = [batch for part in range(len(many)) for batch in many.batches(part)]
    assert batches == list(range(-(-1_281_167 // 32)))
    few = Parts(tmp_path, 10, 4, 192)
    assert [few.size(part) for part in range(len(few))] == [4, 4, 2]
