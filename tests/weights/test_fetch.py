import errno
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from file_server import FileServer, isolate
from safetensors import safe_open

import ijepa_zoo
from ijepa_zoo.errors import FetchError
from ijepa_zoo.weights import download, fetch, ranged, torch_file
from ijepa_zoo.weights.fetch import cache_folder, fetch_official

GOLDEN = Path(__file__).parents[1] / "golden" / "official-tiny16-64.pth.tar"
PATH = "/ijepa/IN1K-vit.t.16.pth.tar"
RECORD = 4 * 96 * 384  # bytes of the largest tensor of `_checkpoint`


def _checkpoint(seed=0, blocks=16):
    """A file in the official layout: 2.4 MB of each encoder, 9.6 MB of optimizer state."""
    generator = torch.Generator().manual_seed(seed)

    def network():
        sizes = {"mlp.fc1.weight": (384, 96), "mlp.fc1.bias": (384,), "norm1.weight": (96,)}
        return {
            f"module.blocks.{block}.{name}": torch.randn(size, generator=generator)
            for block in range(blocks)
            for name, size in sizes.items()
        }

    encoder = network()
    state = {
        number: {key: torch.randn(tensor.shape, generator=generator) for key in ("exp_avg", "sq")}
        for number, tensor in enumerate([*encoder.values()] * 2)
    }
    return {
        "encoder": encoder,
        "predictor": {"module.mask_token": torch.zeros(1, 1, 48)},
        "target_encoder": network(),
        "opt": {"state": state, "param_groups": [{"lr": 0.1}]},
        "scaler": {"scale": 65536.0},
        "epoch": 300,
        "lr": 1e-3,
    }


def _saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def checkpoint():
    return _checkpoint()


@pytest.fixture(scope="module")
def saved(checkpoint):
    return _saved(checkpoint)


@pytest.fixture
def server(saved, monkeypatch):
    isolate(monkeypatch)
    monkeypatch.setattr(ranged, "BACKOFF_SECONDS", 0.001)
    with FileServer() as server:
        server.files[PATH] = saved
        yield server


def _fetch(server, folder, network="target_encoder", **options):
    options = {"progress": False, **options}
    return fetch_official(server.url + PATH, network, cache_dir=folder, **options)


def _assert_equal(path, expected):
    read = safetensors.torch.load_file(path)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(read[name], tensor), name


def _nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


def _left(folder):
    """What a failed call has left that could be taken for a whole file."""
    return [path.name for path in folder.iterdir() if path.suffix == ".safetensors"]


# --- what arrives


@pytest.mark.parametrize("network", ["encoder", "predictor", "target_encoder"])
def test_golden_file_arrives_bit_for_bit(server, tmp_path, network):
    server.files[PATH] = GOLDEN.read_bytes()
    path = _fetch(server, tmp_path, network)
    expected = torch.load(GOLDEN, weights_only=True)[network]
    assert next(iter(expected)).startswith("module.")
    _assert_equal(path, expected)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["url"] == server.url + PATH
    assert metadata["network"] == network
    assert metadata["size"] == str(GOLDEN.stat().st_size)
    assert metadata["etag"].strip('"') == hashlib.sha256(GOLDEN.read_bytes()).hexdigest()


def test_only_the_network_travels(server, tmp_path, checkpoint, saved):
    _assert_equal(_fetch(server, tmp_path), checkpoint["target_encoder"])
    # Beside it: one block with the pickle, at most two with the directory.
    assert server.sent <= _nbytes(checkpoint["target_encoder"]) + 3 * ranged.BLOCK + 20_000
    assert server.sent < len(saved) / 3
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        optimizer = archive.infolist()[-100]
    start, stop = optimizer.header_offset, optimizer.header_offset + optimizer.file_size
    assert stop < len(saved) - 2 * ranged.BLOCK
    for request in server.answered:
        assert request.range is not None
        assert request.range[1] <= start or request.range[0] >= stop


def test_neighbours_travel_in_one_request(server, tmp_path, monkeypatch):
    _fetch(server, tmp_path / "a")
    few = len(server.answered)
    assert few <= 4
    server.forget()
    monkeypatch.setattr(download, "REQUEST", 4 * RECORD)
    _fetch(server, tmp_path / "b")
    assert few + 3 <= len(server.answered) <= few + 8


def test_strangers_between_two_tensors_do_not_travel(server, tmp_path):
    near, far, stranger = torch.randn(100), torch.randn(100), torch.randn(2_000_000)
    network = {"near": near, "far": far}
    server.files[PATH] = _saved({"first": near, "opt": stranger, "target_encoder": network})
    _assert_equal(_fetch(server, tmp_path), network)
    assert server.sent < 4 * ranged.BLOCK


def test_tensors_of_every_kind(server, tmp_path):
    base = torch.arange(600_000, dtype=torch.float32)
    network = {
        "whole": base,
        "tied": base,
        "row": base.view(600, 1000)[7],
        "column": base.view(600, 1000)[:, 3],
        "transposed": base.view(600, 1000).t(),
        "steps": base[12::3].view(-1, 2)[::2],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "element": base[5],
        "empty": torch.zeros(0, 3),
        "empty part": base[:0],
        "parameter": torch.nn.Parameter(torch.randn(3, 3)).detach(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        **{
            str(dtype): torch.randn(1001).mul(9).to(dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
        },
    }
    server.files[PATH] = _saved({"target_encoder": network, "opt": torch.randn(10)})
    _assert_equal(_fetch(server, tmp_path), network)


def test_module_parameters_and_ordered_dicts(server, tmp_path):
    module = torch.nn.Linear(3, 2)
    module.register_parameter("extra", torch.nn.Parameter(torch.ones(2)))
    server.files[PATH] = _saved({"a": module.state_dict(), "b": dict(module.named_parameters())})
    _assert_equal(_fetch(server, tmp_path, "a"), module.state_dict())
    _assert_equal(_fetch(server, tmp_path, "b"), module.state_dict())


def test_archive_without_torchs_padding(server, tmp_path, checkpoint, saved):
    """Storages lie elsewhere than torch would put them, for example after a repack."""
    repacked = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved)) as old, zipfile.ZipFile(repacked, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    server.files[PATH] = repacked.getvalue()
    _assert_equal(_fetch(server, tmp_path), checkpoint["target_encoder"])


def test_networks_and_addresses_have_files_of_their_own(server, tmp_path, checkpoint):
    server.files["/elsewhere" + PATH] = server.files[PATH]
    url = server.url + "/elsewhere" + PATH
    paths = {
        _fetch(server, tmp_path, "encoder"),
        _fetch(server, tmp_path, "target_encoder"),
        fetch_official(url, "encoder", cache_dir=tmp_path, progress=False),
    }
    assert len(paths) == 3
    assert all(path.name.startswith("IN1K-vit.t.16.") for path in paths)
    _assert_equal(_fetch(server, tmp_path, "encoder"), checkpoint["encoder"])


# --- the cache


def test_a_whole_file_needs_no_network(server, tmp_path, monkeypatch):
    path = _fetch(server, tmp_path)
    server.forget()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert _fetch(server, tmp_path) == path
    assert server.answered == []


def test_offline_without_the_file(server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match=r"HF_HUB_OFFLINE is set\. Unset it, or copy IN1K"):
        _fetch(server, tmp_path)
    assert server.answered == []


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("IJEPA_ZOO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "ijepa_zoo"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/ijepa_zoo")
    monkeypatch.setenv("IJEPA_ZOO_CACHE", "~/y")
    assert cache_folder() == tmp_path / "y"
    assert cache_folder("/z") == Path("/z")


def test_a_truncated_file_in_the_cache_is_noticed(server, tmp_path):
    path = _fetch(server, tmp_path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FetchError, match=r"is damaged .*Delete it and run again"):
        _fetch(server, tmp_path)


def test_sha256_is_that_of_the_tensors(server, tmp_path, checkpoint, saved):
    whole = safetensors.torch.save(checkpoint["target_encoder"])
    data = whole[8 + int.from_bytes(whole[:8], "little") :]
    digest = hashlib.sha256(data).hexdigest()
    path = _fetch(server, tmp_path, sha256=digest.upper(), size=len(saved))
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["sha256"] == digest
    assert path.read_bytes().endswith(data)
    assert _fetch(server, tmp_path, sha256=digest, size=len(saved)) == path
    with pytest.raises(FetchError, match=f"sha256 is {digest}, not abc"):
        _fetch(server, tmp_path, sha256="abc")
    with pytest.raises(FetchError, match=f"size is {len(saved)}, not 5"):
        _fetch(server, tmp_path, size=5)


def test_wrong_sha256_keeps_nothing(server, tmp_path):
    with pytest.raises(FetchError, match=r"has SHA-256 [0-9a-f]{64}, expected 00ff"):
        _fetch(server, tmp_path, sha256="00ff")
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_wrong_size_is_told_before_anything_travels(server, tmp_path):
    with pytest.raises(FetchError, match=r"bytes, expected 10,360,000,000: it is another file"):
        _fetch(server, tmp_path, size=10_360_000_000)
    assert len(server.answered) == 1


# --- lines that break


def test_cut_lines_are_picked_up_where_they_broke(server, tmp_path, checkpoint):
    server.faults.cut_each_after = 100_000
    _assert_equal(_fetch(server, tmp_path), checkpoint["target_encoder"])
    assert len(server.answered) > 24
    assert server.sent <= _nbytes(checkpoint["target_encoder"]) + 3 * ranged.BLOCK + 20_000


def test_busy_server_is_asked_again(server, tmp_path, checkpoint):
    server.faults.statuses = [503, 500, 429]
    _assert_equal(_fetch(server, tmp_path), checkpoint["target_encoder"])


def test_server_that_stays_busy(server, tmp_path):
    server.faults.statuses = [503] * 50
    with pytest.raises(FetchError, match=r"gave up after 5 attempts .*503.*run again to resume"):
        _fetch(server, tmp_path)
    assert len(server.answered) == 5


@pytest.mark.parametrize("workers", [1, 4])
def test_resume_fetches_only_the_rest(server, tmp_path, checkpoint, workers, monkeypatch):
    monkeypatch.setattr(download, "REQUEST", 2 * RECORD)
    server.faults.budget = 1_600_000
    with pytest.raises(FetchError, match="run again to resume"):
        _fetch(server, tmp_path, workers=workers)
    assert _left(tmp_path) == []
    first = server.sent
    assert first == 1_600_000
    server.forget()
    _assert_equal(_fetch(server, tmp_path, workers=workers), checkpoint["target_encoder"])
    assert list(tmp_path.glob("*.partial")) == []
    overhead = 3 * ranged.BLOCK + 20_000
    twice = workers * RECORD  # what was under way
    assert first + server.sent <= _nbytes(checkpoint["target_encoder"]) + 2 * overhead + twice


def test_resume_does_not_trust_the_disk(server, tmp_path, checkpoint):
    """After a power cut, blocks of a file may be gone."""
    server.faults.budget = 2_500_000
    with pytest.raises(FetchError):
        _fetch(server, tmp_path, workers=1)
    (partial,) = tmp_path.glob("*.partial")
    content = bytearray(partial.read_bytes())
    content[10_000:30_000] = bytes(20_000)
    partial.write_bytes(content)
    server.forget()
    _assert_equal(_fetch(server, tmp_path), checkpoint["target_encoder"])


def test_new_version_starts_anew_out_loud(server, tmp_path, caplog):
    server.faults.budget = 1_600_000
    with pytest.raises(FetchError):
        _fetch(server, tmp_path)
    server.forget()
    other = _checkpoint(seed=1)
    server.files[PATH] = _saved(other)
    _assert_equal(_fetch(server, tmp_path), other["target_encoder"])
    assert "changed since its download began; starting anew" in caplog.text


@pytest.mark.parametrize("versions", [True, False])
def test_file_that_changes_between_reads(server, tmp_path, versions):
    other = _saved(_checkpoint(seed=1, blocks=16 if versions else 17))

    def swap(count):
        if count == 3:
            server.files[PATH] = other

    server.faults.before, server.faults.without_versions = swap, not versions
    with pytest.raises(FetchError, match="changed on the server while it was being read"):
        _fetch(server, tmp_path)
    assert _left(tmp_path) == []


def test_server_that_ignores_ranges(server, tmp_path):
    server.faults.ignore_ranges = True
    with pytest.raises(FetchError, match=r"ignores range requests.*load it by path"):
        _fetch(server, tmp_path)
    assert len(server.answered) == 1


def test_server_that_begins_to_ignore_ranges(server, tmp_path):
    server.faults.before = lambda count: setattr(server.faults, "ignore_ranges", count > 2)
    with pytest.raises(FetchError, match="ignores range requests"):
        _fetch(server, tmp_path)
    assert _left(tmp_path) == []


def test_wrong_range(server, tmp_path):
    server.faults.before = lambda count: setattr(server.faults, "shift", 64 * (count > 2))
    with pytest.raises(FetchError, match=r"asked for bytes \d+-\d+, the server sent 'bytes"):
        _fetch(server, tmp_path)
    assert _left(tmp_path) == []


def test_corrupt_bytes_name_the_tensor_and_do_not_stay(server, tmp_path, checkpoint, saved):
    name = "module.blocks.9.mlp.fc1.weight"
    wrong = bytearray(saved)
    place = saved.index(checkpoint["target_encoder"][name].numpy().tobytes())
    wrong[place + 1000] ^= 1
    server.files[PATH], server.faults.without_versions = bytes(wrong), True
    with pytest.raises(FetchError, match=f"the bytes of {re.escape(name)} are corrupt"):
        _fetch(server, tmp_path, workers=1)
    assert _left(tmp_path) == []
    server.forget()
    server.files[PATH], server.faults.without_versions = saved, True
    _assert_equal(_fetch(server, tmp_path), checkpoint["target_encoder"])
    assert server.sent < 8 * RECORD + 3 * ranged.BLOCK  # blocks 0 to 8 had arrived


# --- refusals


@pytest.mark.parametrize(
    ("status", "message"), [(404, "no such file"), (403, "refuses"), (401, "login"), (418, "418")]
)
def test_refused(server, tmp_path, status, message):
    server.faults.statuses = [status]
    with pytest.raises(FetchError, match=message):
        _fetch(server, tmp_path)
    assert len(server.answered) == 1


def test_unreachable_server(tmp_path, monkeypatch):
    isolate(monkeypatch)
    with FileServer() as server:
        pass
    with pytest.raises(FetchError, match=r"cannot reach http.*Check the network and the proxy"):
        _fetch(server, tmp_path)


def test_other_schemes_are_refused(tmp_path, monkeypatch):
    isolate(monkeypatch)
    with pytest.raises(FetchError, match="not an http or https address"):
        fetch_official("file:///etc/passwd", "encoder", cache_dir=tmp_path)


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "416"),
        (b"no zip file at all" * 1000, "not a sound zip-format torch.save file"),
        (_saved({"encoder": {}}, _use_new_zipfile_serialization=False), "not a sound zip"),
        (_saved([1, 2]), "holds no network 'target_encoder'; it has: no dict"),
        (_saved({"encoder": {}, "opt": 1}), "no network 'target_encoder'; it has: encoder, opt"),
        (_saved({"target_encoder": {}}), "'target_encoder' is empty"),
        (_saved({"target_encoder": {"lr": 1}}), r"target_encoder\['lr'\] is no dense tensor"),
        (
            _saved({"target_encoder": {"a": torch.eye(2).to_sparse()}}),
            "cannot be read in parts|no dense tensor",  # newer and older torch
        ),
        (_saved({"target_encoder": {"a": torch.ones(2) * 1j}}), "dtype torch.complex64"),
        (_saved({"target_encoder": {"a": torch.ones(2)}, "opt": _Runs()}), "could run any code"),
    ],
    ids=[
        "empty",
        "noise",
        "legacy",
        "list",
        "missing",
        "none",
        "number",
        "sparse",
        "dtype",
        "code",
    ],
)
def test_other_contents(server, tmp_path, content, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.files[PATH] = content
    with pytest.raises(FetchError, match=message):
        _fetch(server, tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_zip_file_of_something_else(server, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    server.files[PATH] = buffer.getvalue()
    with pytest.raises(FetchError, match=r"not one that torch\.save wrote"):
        _fetch(server, tmp_path)


def test_torch_without_the_offsets(server, tmp_path, monkeypatch, checkpoint):
    network = checkpoint["target_encoder"]
    monkeypatch.setattr(torch_file, "_fake_network", lambda *arguments: network)
    with pytest.raises(FetchError, match=r"needs torch >= 2\.11"):
        _fetch(server, tmp_path)


# --- disks


def test_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FetchError, match=r"cannot be used .*IJEPA_ZOO_CACHE"):
        _fetch(server, tmp_path / "file" / "cache")


def test_read_only_folder(server, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(fetch.FileLock, "acquire", refuse)
    with pytest.raises(FetchError, match=r"cannot be used .*Read-only file system.*cache_dir="):
        _fetch(server, tmp_path)


def test_too_small_a_disk_is_told_first(server, tmp_path, monkeypatch, checkpoint):
    usage = download.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    needed = f"{_nbytes(checkpoint['target_encoder']):,} bytes are needed"
    with pytest.raises(FetchError, match=rf"{needed} .* 1,000 are free.*IJEPA_ZOO_CACHE"):
        _fetch(server, tmp_path)
    assert list(tmp_path.glob("*.partial")) == []


def _fill_disk_after(count, monkeypatch):
    write, calls = download._write_tensors, []

    def fill(*arguments):
        calls.append(arguments)
        if len(calls) > count:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(download, "_write_tensors", fill)


def test_disk_that_fills_up(server, tmp_path, monkeypatch, checkpoint):
    with monkeypatch.context() as patch:
        _fill_disk_after(10, patch)
        with pytest.raises(FetchError, match=r"is full\. Make room and run again to resume"):
            _fetch(server, tmp_path, workers=1)
    assert _left(tmp_path) == []
    _assert_equal(_fetch(server, tmp_path), checkpoint["target_encoder"])


def test_resume_is_not_fooled_by_neighbours(server, tmp_path, monkeypatch):
    """Where "a" is still missing, the file reads like the storage of "a": zeros, then "b"."""
    numbers = torch.arange(1.0, 9.0)
    network = {"b": numbers.clone(), "a": torch.cat([torch.zeros(8), numbers])[8:]}
    server.files[PATH] = _saved({"target_encoder": network})
    with monkeypatch.context() as patch:
        _fill_disk_after(1, patch)
        with pytest.raises(FetchError, match="is full"):
            _fetch(server, tmp_path)
    _assert_equal(_fetch(server, tmp_path), network)


# --- processes

SCRIPT = """
import sys
from ijepa_zoo.weights.fetch import fetch_official
print(fetch_official(sys.argv[1], "target_encoder", cache_dir=sys.argv[2], workers=2))
"""


@pytest.fixture
def start(server, tmp_path):
    """Starts a process that fetches into ``tmp_path / "cache"`` and logs to the file given."""
    root = str(Path(next(iter(ijepa_zoo.__path__))).parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    distributed = []

    def start(log):
        arguments = [sys.executable, "-c", SCRIPT, server.url + PATH, str(tmp_path / "cache")]
        with log.open("w") as file:
            distributed.append(
                subprocess.Popen(
                    arguments,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    # a shell starts background jobs with SIGINT ignored, and that is inherited
                    preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
                )
            )
        return distributed[-1]

    yield start
    for process in distributed:
        process.kill()
        process.communicate()


def test_two_processes_download_once(server, tmp_path, checkpoint, start):
    gate = threading.Event()
    server.faults.before = lambda count: gate.wait(200)
    first, log = start(tmp_path / "first.log"), tmp_path / "second.log"
    while not server.answered:
        assert first.poll() is None
        time.sleep(0.01)
    second = start(log)
    # The first gets no byte before the second says that it waits.
    while "another process fetches IN1K" not in log.read_text():
        assert second.poll() is None
        assert len(server.answered) == 1
        time.sleep(0.01)
    gate.set()
    outputs = [process.communicate(timeout=200)[0].decode() for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert outputs[0] == outputs[1]
    _assert_equal(outputs[0].strip(), checkpoint["target_encoder"])
    assert server.sent <= _nbytes(checkpoint["target_encoder"]) + 3 * ranged.BLOCK + 20_000


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_download_goes_on(server, tmp_path, checkpoint, start, how):
    server.faults.pace = 0.05
    process = start(tmp_path / "log")
    while server.sent < 1_800_000:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    process.send_signal(how)
    process.communicate(timeout=200)
    assert process.returncode != 0
    assert _left(tmp_path / "cache") == []
    first = server.sent
    server.forget()
    _assert_equal(_fetch(server, tmp_path / "cache"), checkpoint["target_encoder"])
    network = _nbytes(checkpoint["target_encoder"])
    assert server.sent < network + 3 * ranged.BLOCK - (first - 3 * ranged.BLOCK) / 2


def test_progress_bar(server, tmp_path, capsys):
    _fetch(server, tmp_path, "encoder", progress=True)
    shown = capsys.readouterr().err
    assert "encoder of IN1K-vit.t.16.pth.tar: 100%" in shown
    _fetch(server, tmp_path, "target_encoder")
    assert capsys.readouterr().err == ""
