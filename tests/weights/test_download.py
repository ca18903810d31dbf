"""Official files by ranged reads."""

import hashlib
import io
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from file_server import FileServer, go_offline

from ijepa_zoo.errors import FetchError
from ijepa_zoo.weights import download, remote
from ijepa_zoo.weights.download import cache_folder, fetch_official

PATH = "/ijepa/IN1K-vit.t.16.pth.tar"


def make_checkpoint(seed=0, blocks=16):
    """Official structure: 2.4 MB of each encoder, 9.6 MB of optimizer state."""
    random = torch.Generator().manual_seed(seed)
    names = [f"module.blocks.{block}.{kind}" for block in range(blocks) for kind in ("w", "b")]
    shapes = {name: (384, 96) if name.endswith("w") else (384,) for name in names}
    encoder, target = (
        {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
        for _ in range(2)
    )
    state = [{name: t + k for name, t in encoder.items()} for k in range(4)]
    return {"encoder": encoder, "target_encoder": target, "opt": state, "epoch": 300}


def save(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


CHECKPOINT = make_checkpoint()
TARGET = CHECKPOINT["target_encoder"]
SAVED = save(CHECKPOINT)
# Most bytes sent for a network: its own, zip headers, blocks with pickle and directory.
MOST = sum(tensor.nbytes for tensor in TARGET.values()) + 3 * remote.BLOCK + 20_000


@pytest.fixture
def server(monkeypatch):
    go_offline(monkeypatch, False)
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.001)
    with FileServer() as server:
        server.files[PATH] = SAVED
        yield server


@pytest.fixture
def fetch(server, tmp_path):
    def fetch(network="target_encoder", **options):
        url = server.url + PATH
        return fetch_official(url, network, cache_dir=tmp_path, progress=False, **options)

    return fetch


def assert_equal(path, expected):
    tensors = safetensors.torch.load_file(path)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


def test_only_the_network_is_downloaded_in_few_requests_and_cached(server, fetch, monkeypatch):
    path = fetch()
    assert_equal(path, TARGET)
    assert server.sent <= MOST < len(SAVED) / 3
    assert len(server.answered) <= 8
    server.forget()
    go_offline(monkeypatch)
    assert fetch() == path
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE"):
        fetch("encoder")
    assert not server.answered


def test_tensors_of_every_kind_in_an_archive_without_padding(server, fetch, monkeypatch):
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
    assert_equal(fetch(), network)
    assert server.sent < 2 * len(repacked.getvalue()) + 10  # once as blocks


def test_names_in_the_cache_stay_as_in_version_0_1(monkeypatch, tmp_path):
    name = "IN1K-vit.h.14-300e.target_encoder-74d0f5ce13f4.safetensors"
    (tmp_path / "ijepa_zoo").mkdir()
    (tmp_path / "ijepa_zoo" / name).touch()
    url = "https://dl.fbaipublicfiles.com/ijepa/IN1K-vit.h.14-300e.pth.tar"
    monkeypatch.delenv("IJEPA_ZOO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch_official(url, "target_encoder") == tmp_path / "ijepa_zoo" / name
    monkeypatch.setenv("IJEPA_ZOO_CACHE", "/x")
    assert cache_folder() == Path("/x")


def test_a_file_replaced_on_the_server_is_noticed(server, fetch, tmp_path, caplog):
    whole = safetensors.torch.save(TARGET)
    digest = hashlib.sha256(whole[8 + int.from_bytes(whole[:8], "little") :]).hexdigest()
    with pytest.raises(FetchError, match=f"{digest}, expected abc"):
        fetch(sha256="abc")
    fetch(sha256=digest).unlink()
    (record,) = tmp_path.glob("*.json")
    assert json.loads(record.read_text())["sha256"] == {"target_encoder": digest}
    server.files[PATH] = save(make_checkpoint(blocks=2))
    with pytest.raises(FetchError, match=f"expected {len(SAVED)}"):
        fetch("encoder")
    other = make_checkpoint(seed=1)  # of the same size
    server.files[PATH] = save(other)
    with pytest.raises(FetchError, match="SHA-256 of target_encoder"):
        fetch()
    assert not list(tmp_path.glob("*.safetensors"))
    caplog.clear()
    assert_equal(fetch("encoder"), other["encoder"])
    assert "ETag" in caplog.text
    record.unlink()
    assert_equal(fetch(), other["target_encoder"])


def test_cut_connections_and_a_busy_server(server, fetch):
    server.statuses = [503, 500, 429]
    server.cut_after = 100_000
    assert_equal(fetch(), TARGET)
    assert len(server.answered) > 24
    assert server.sent <= MOST


def damage(server):
    content = bytearray(SAVED)
    content[SAVED.index(TARGET["module.blocks.9.w"].numpy().tobytes()) + 1000] ^= 1
    server.files[PATH] = bytes(content)


@pytest.mark.parametrize(
    ("after", "fault", "named"),
    [
        (0, damage, r"blocks\.9\.w"),
        (0, lambda server: server.statuses.append(404), "404"),
        (3, lambda server: server.statuses.extend([503] * 8 * remote.ATTEMPTS), "503"),
        (2, lambda server: setattr(server, "ignores_ranges", True), "asked for bytes"),
        (3, lambda server: server.files.update({PATH: SAVED[:-1]}), "changed on the server"),
    ],
)
def test_faults_of_the_server(server, fetch, tmp_path, after, fault, named):
    server.before = lambda count: count == after and fault(server)
    with pytest.raises(FetchError, match=named):
        fetch()
    assert not list(tmp_path.glob("*.safetensors"))


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"not a zip file" * 1000, "zip"),
        (save({"encoder": {}, "opt": 1}), "'target_encoder', but encoder, opt"),
        (save({"target_encoder": {"lr": 1}}), "'target_encoder'"),
        (save({"target_encoder": {"part": torch.zeros(9)[3:]}}), "part"),
        (save({"target_encoder": {"turned": torch.eye(3)[:, :2].t()}}), "turned"),
        (save({"target_encoder": {"a": torch.eye(2)}, "opt": _Runs()}), "posix.mkdir"),
    ],
)
def test_other_contents_are_refused_and_run_no_code(server, fetch, tmp_path, content, named):
    server.files[PATH] = content
    with pytest.raises(FetchError, match=named):
        fetch()
    assert not Path("ran").exists()


def test_two_at_a_time_download_once(server, fetch):
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(fetch, ["target_encoder"] * 2)
    assert one == two
    assert_equal(one, TARGET)
    assert server.sent <= MOST


def test_interrupted_download_resumes(server, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "REQUEST", 300_000)
    monkeypatch.setattr(download, "CONNECTIONS", 1)
    server.before = lambda count: count == 9 and server.statuses.append(404)
    with pytest.raises(FetchError, match="404"):
        fetch()
    first = server.sent
    (partial,) = tmp_path.glob("*.partial")
    content = bytearray(partial.read_bytes())
    content[10_000:30_000] = bytes(20_000)  # lost in a power cut
    partial.write_bytes(content)
    server.forget()
    assert_equal(fetch(), TARGET)
    assert server.sent < MOST - (first - 3 * remote.BLOCK) / 2
