import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
import time
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from file_server import FileServer, Repository, go_offline, isolate, point_hub_at

from ijepa_zoo.errors import FetchError
from ijepa_zoo.weights import download, remote
from ijepa_zoo.weights.download import cache_folder, fetch_hub, fetch_official

PATH = "/ijepa/IN1K-vit.t.16.pth.tar"
REPOSITORY = "facebook/ijepa_vith14_1k"


def make_checkpoint(seed=0, blocks=16):
    """Official structure: 2.4 MB of each encoder, 9.6 MB of optimizer state."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"mlp.fc1.weight": (384, 96), "mlp.fc1.bias": (384,), "norm1.weight": (96,)}

    def network():
        return {
            f"module.blocks.{block}.{name}": torch.randn(shape, generator=generator)
            for block in range(blocks)
            for name, shape in shapes.items()
        }

    encoder = network()
    moments = [torch.randn(tensor.shape, generator=generator) for tensor in encoder.values()]
    return {
        "encoder": encoder,
        "predictor": {"module.mask_token": torch.zeros(1, 1, 48)},
        "target_encoder": network(),
        "opt": {"state": [{"avg": m, "sq": m * m, "m": m + 1, "s": m + 2} for m in moments]},
        "scaler": {"scale": 65536.0},
        "epoch": 300,
    }


def save(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def checkpoint():
    return make_checkpoint()


@pytest.fixture(scope="module")
def saved(checkpoint):
    return save(checkpoint)


@pytest.fixture
def server(saved, monkeypatch):
    isolate(monkeypatch)
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.001)
    with FileServer() as server:
        server.files[PATH] = saved
        yield server


def fetch(server, folder, network="target_encoder", **options):
    url = server.url + PATH
    return fetch_official(url, network, cache_dir=folder, progress=False, **options)


def assert_equal(path, expected):
    tensors = safetensors.torch.load_file(path)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


def finished(folder):
    return list(folder.glob("*.safetensors"))


def most(tensors):
    """Most bytes sent for a network: its own, zip headers, blocks with pickle and directory."""
    return sum(tensor.nbytes for tensor in tensors.values()) + 3 * remote.BLOCK + 20_000


def test_golden_file_arrives_bit_for_bit(server, tmp_path, official):
    server.files[PATH] = official.read_bytes()
    for network in ("encoder", "predictor", "target_encoder"):
        expected = torch.load(official, weights_only=True)[network]
        assert_equal(fetch(server, tmp_path, network), expected)


def test_only_the_network_is_downloaded_in_few_requests(server, tmp_path, checkpoint, saved):
    assert_equal(fetch(server, tmp_path), checkpoint["target_encoder"])
    assert server.sent <= most(checkpoint["target_encoder"]) < len(saved) / 3
    assert len(server.answered) <= 8
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        optimizer = archive.infolist()[-100].header_offset  # far from pickle and directory
    assert not any(start <= optimizer < stop for start, stop in (r.range for r in server.answered))


def test_tensors_of_every_kind_in_an_archive_without_padding(server, tmp_path, monkeypatch):
    network = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with attributes
    network |= {
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "large": torch.arange(60_000, dtype=torch.float32).view(60, 1000),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
    }
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool):
        network[str(dtype)] = torch.randn(1001).mul(9).to(dtype)
    repacked = io.BytesIO()
    padded = zipfile.ZipFile(io.BytesIO(save({"target_encoder": network})))
    with zipfile.ZipFile(repacked, "w") as archive:
        for name in padded.namelist():
            archive.writestr(name, padded.read(name))
    server.files[PATH] = repacked.getvalue()
    monkeypatch.setattr(download, "REQUEST", 100_000)
    assert_equal(fetch(server, tmp_path), network)
    assert server.sent < 2 * len(repacked.getvalue()) + 10  # once as blocks, once as tensors


def test_other_tensors_in_between_are_not_downloaded(server, tmp_path):
    near, far, other = torch.randn(100), torch.randn(100), torch.randn(2_000_000)
    network = {"near": near, "far": far}
    server.files[PATH] = save({"first": near, "opt": other, "target_encoder": network})
    assert_equal(fetch(server, tmp_path), network)
    assert server.sent < most(network)


def test_cached_file_needs_no_request(server, tmp_path, monkeypatch):
    path = fetch(server, tmp_path)
    server.forget()
    go_offline(monkeypatch)
    assert fetch(server, tmp_path) == path
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE"):
        fetch(server, tmp_path, "encoder")
    assert server.answered == []


def test_cached_file_of_version_0_1(server, tmp_path, checkpoint):
    path = fetch(server, tmp_path)
    metadata = {"format": "pt", "url": server.url, "size": "5", "etag": "e", "sha256": "abc"}
    safetensors.torch.save_file(checkpoint["encoder"], path, metadata)
    for record in tmp_path.glob("*.json"):
        record.unlink()
    server.forget()
    assert fetch(server, tmp_path) == fetch(server, tmp_path, sha256="abc") == path
    with pytest.raises(FetchError, match="abc"):
        fetch(server, tmp_path, sha256="abd")
    assert server.answered == []


def test_name_of_a_cached_file_stays_as_in_version_0_1(tmp_path):
    name = "IN1K-vit.h.14-300e.target_encoder-74d0f5ce13f4.safetensors"
    (tmp_path / name).touch()
    url = "https://dl.fbaipublicfiles.com/ijepa/IN1K-vit.h.14-300e.pth.tar"
    assert fetch_official(url, "target_encoder", cache_dir=tmp_path) == tmp_path / name


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


def test_size_and_sha256_are_recorded_and_can_be_pinned(server, tmp_path, checkpoint, saved):
    whole = safetensors.torch.save(checkpoint["target_encoder"])
    digest = hashlib.sha256(whole[8 + int.from_bytes(whole[:8], "little") :]).hexdigest()
    with pytest.raises(FetchError, match=f"{len(saved)}, expected 5"):
        fetch(server, tmp_path, size=5)
    assert len(server.answered) == 1
    with pytest.raises(FetchError, match=f"{digest}, expected abc"):
        fetch(server, tmp_path, sha256="abc")
    assert finished(tmp_path) == []
    path = fetch(server, tmp_path, sha256=digest, size=len(saved))
    (record,) = tmp_path.glob("*.json")
    etag = '"' + hashlib.sha256(saved).hexdigest() + '"'
    assert json.loads(record.read_text()) == {
        **{"url": server.url + PATH, "size": len(saved), "etag": etag},
        "sha256": {"target_encoder": digest},
    }
    server.forget()
    assert fetch(server, tmp_path, sha256=digest, size=len(saved)) == path
    for pinned in ({"sha256": "abc"}, {"size": 5}):
        with pytest.raises(FetchError, match=r"expected (abc|5)"):
            fetch(server, tmp_path, **pinned)
    assert server.answered == []


def test_a_file_replaced_on_the_server_is_noticed_later(server, tmp_path, saved, caplog):
    path = fetch(server, tmp_path)
    path.unlink()
    server.files[PATH] = save(make_checkpoint(blocks=2))
    for network in ("target_encoder", "encoder"):
        with pytest.raises(FetchError, match=f"expected {len(saved)}"):
            fetch(server, tmp_path, network)
    server.files[PATH] = save(make_checkpoint(seed=1))  # same size
    with pytest.raises(FetchError, match="SHA-256 of target_encoder"):
        fetch(server, tmp_path)
    assert finished(tmp_path) == []
    caplog.clear()
    fetch(server, tmp_path, "encoder")
    assert "ETag" in caplog.text
    for record in tmp_path.glob("*.json"):
        record.unlink()
    caplog.clear()
    assert_equal(fetch(server, tmp_path), make_checkpoint(seed=1)["target_encoder"])
    assert caplog.text == ""


def test_cut_connections_and_a_busy_server(server, tmp_path, checkpoint):
    server.faults.statuses = [503, 500, 429]
    server.faults.cut_after = 100_000
    assert_equal(fetch(server, tmp_path), checkpoint["target_encoder"])
    assert len(server.answered) > 24
    assert server.sent <= most(checkpoint["target_encoder"])


def test_resume_after_giving_up(server, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(download, "REQUEST", 300_000)
    server.faults.before = lambda count: count == 8 and server.faults.statuses.extend([503] * 5)
    with pytest.raises(FetchError, match="503"):
        fetch(server, tmp_path, workers=1)
    assert finished(tmp_path) == []
    (partial,) = tmp_path.glob("*.partial")
    content = bytearray(partial.read_bytes())
    content[10_000:30_000] = bytes(20_000)  # lost in a power cut
    partial.write_bytes(content)
    first = server.sent
    server.forget()
    assert_equal(fetch(server, tmp_path), checkpoint["target_encoder"])
    assert server.sent < most(checkpoint["target_encoder"]) - (first - 3 * remote.BLOCK) / 2
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.parametrize(
    ("after", "fault", "message"),
    [
        (2, {"ignore_ranges": True}, "asked for bytes"),
        (2, {"shift": 64}, "asked for bytes"),
        (0, {"statuses": [404]}, "404"),
    ],
)
def test_faults_of_the_server(server, tmp_path, after, fault, message):
    server.faults.before = lambda count: count == after and vars(server.faults).update(fault)
    with pytest.raises(FetchError, match=message):
        fetch(server, tmp_path)
    assert finished(tmp_path) == []


def test_file_that_changes_during_the_download(server, tmp_path):
    other = save(make_checkpoint(seed=1))
    server.faults.before = lambda count: count == 3 and server.files.update({PATH: other})
    with pytest.raises(FetchError, match="changed on the server"):
        fetch(server, tmp_path)
    assert finished(tmp_path) == []


def test_damaged_bytes(server, tmp_path, checkpoint, saved):
    name = "module.blocks.9.mlp.fc1.weight"
    damaged = bytearray(saved)
    damaged[saved.index(checkpoint["target_encoder"][name].numpy().tobytes()) + 1000] ^= 1
    server.files[PATH] = bytes(damaged)
    with pytest.raises(FetchError, match=name):
        fetch(server, tmp_path)
    assert finished(tmp_path) == []


def test_unreachable_servers(tmp_path, monkeypatch):
    isolate(monkeypatch)
    with FileServer() as closed:
        pass
    for url in (closed.url, Path(__file__).as_uri()):
        with pytest.raises(FetchError, match=url):
            fetch_official(url, "encoder", cache_dir=tmp_path)


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a zip file" * 1000, "zip"),
        (save({"target_encoder": {}}, _use_new_zipfile_serialization=False), "zip"),
        (save({"encoder": {}, "opt": 1}), "'target_encoder', but encoder, opt"),
        (save({"target_encoder": {"lr": 1}}), "'target_encoder'"),
        (save({"target_encoder": {"part": torch.zeros(9)[3:]}}), "part"),
        (save({"target_encoder": {"turned": torch.eye(3)[:, :2].t()}}), "turned"),
        (save({"target_encoder": {"a": torch.eye(2)}, "opt": _Runs()}), "posix.mkdir"),
    ],
)
def test_other_contents_are_refused_and_run_no_code(
    server, tmp_path, content, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    server.files[PATH] = content
    with pytest.raises(FetchError, match=message):
        fetch(server, tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def start(server, tmp_path):
    """Starts a process that downloads into ``tmp_path``."""
    started = []

    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        download.REQUEST = 300_000
        fetch(server, tmp_path, workers=2)

    def start():
        started.append(multiprocessing.get_context("fork").Process(target=run))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def test_two_processes_download_once(server, tmp_path, checkpoint, start):
    gate = threading.Event()
    server.faults.before = lambda count: gate.wait(200)
    processes = start(), start()
    while not server.answered:
        time.sleep(0.01)
    time.sleep(0.3)  # the other one may reach the lock
    gate.set()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    assert_equal(finished(tmp_path)[0], checkpoint["target_encoder"])
    assert server.sent <= most(checkpoint["target_encoder"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_download_resumes(server, tmp_path, checkpoint, start, how):
    gate = threading.Event()
    server.faults.before = lambda count: count < 10 or gate.wait(200)
    process = start()
    while len(server.answered) <= 10:
        assert process.is_alive()
        time.sleep(0.01)
    first = server.sent
    os.kill(process.pid, how)
    gate.set()
    process.join(200)
    assert process.exitcode != 0
    assert finished(tmp_path) == []
    server.forget()
    assert_equal(fetch(server, tmp_path), checkpoint["target_encoder"])
    assert server.sent < most(checkpoint["target_encoder"]) - (first - 3 * remote.BLOCK) / 2


@pytest.fixture
def hub(monkeypatch):
    with FileServer() as server:
        server.repositories[REPOSITORY] = Repository({"config.json": b"{}", "a/b.bin": b"x" * 999})
        point_hub_at(server, monkeypatch)
        yield server


def test_hub_file_is_cached(hub, tmp_path, monkeypatch):
    path = fetch_hub(REPOSITORY, "a/b.bin", cache_dir=tmp_path)
    assert path.read_bytes() == b"x" * 999
    commit = hub.repositories[REPOSITORY].commit
    assert fetch_hub(REPOSITORY, "a/b.bin", revision=commit, cache_dir=tmp_path) == path
    hub.forget()
    go_offline(monkeypatch)
    assert fetch_hub(REPOSITORY, "a/b.bin", cache_dir=tmp_path) == path
    with pytest.raises(FetchError, match=REPOSITORY):
        fetch_hub(REPOSITORY, "config.json", cache_dir=tmp_path)
    assert hub.answered == []


def test_hub_token(hub, tmp_path, monkeypatch):
    hub.token = "hf_secret"
    with pytest.raises(FetchError, match=REPOSITORY):
        fetch_hub(REPOSITORY, "config.json", cache_dir=tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch_hub(REPOSITORY, "config.json", cache_dir=tmp_path).read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("repository", "filename", "revision"),
    [
        ("facebook/none", "config.json", None),
        ("no name at all", "config.json", None),
        (REPOSITORY, "none.json", None),
        (REPOSITORY, "config.json", "v9"),
    ],
)
def test_hub_refusals(hub, tmp_path, repository, filename, revision):
    with pytest.raises(FetchError, match=f"{filename}.*{repository}.*{revision or 'main'}"):
        fetch_hub(repository, filename, revision=revision, cache_dir=tmp_path)
