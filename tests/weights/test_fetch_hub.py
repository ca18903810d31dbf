from pathlib import Path

import pytest
from file_server import FileServer, Repository, point_hub_at

from ijepa_zoo.errors import FetchError
from ijepa_zoo.weights.fetch import fetch_hub

REPOSITORY = "facebook/ijepa_vith14_1k"


@pytest.fixture
def hub(monkeypatch):
    with FileServer() as server:
        server.repositories[REPOSITORY] = Repository({"config.json": b"{}", "a/b.bin": b"x" * 999})
        point_hub_at(server, monkeypatch)
        yield server


def test_hub_file_arrives_and_stays(hub, tmp_path, monkeypatch):
    path = fetch_hub(REPOSITORY, "a/b.bin", cache_dir=tmp_path)
    assert path.read_bytes() == b"x" * 999
    assert path.is_relative_to(tmp_path)
    commit = hub.repositories[REPOSITORY].commit
    assert fetch_hub(REPOSITORY, "a/b.bin", revision=commit, cache_dir=tmp_path) == path
    hub.forget()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch_hub(REPOSITORY, "a/b.bin", cache_dir=tmp_path) == path
    assert hub.answered == []


def test_hub_token(hub, tmp_path, monkeypatch):
    hub.token = "hf_secret"
    with pytest.raises(FetchError, match=r"no such repository, or it is private.*hf auth login"):
        fetch_hub(REPOSITORY, "config.json", cache_dir=tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch_hub(REPOSITORY, "config.json", cache_dir=tmp_path).read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("repository", "filename", "revision", "message"),
    [
        ("facebook/none", "config.json", None, "no such repository"),
        ("no name at all", "config.json", None, "not a repository name; write OWNER/NAME"),
        (REPOSITORY, "none.json", None, "'none.json' .*the repository has no such file"),
        (REPOSITORY, "config.json", "v9", r"\(revision v9\): no such revision"),
    ],
)
def test_hub_refusals(hub, tmp_path, repository, filename, revision, message):
    with pytest.raises(FetchError, match=message):
        fetch_hub(repository, filename, revision=revision, cache_dir=tmp_path)


def test_hub_gated(hub, tmp_path):
    hub.repositories[REPOSITORY].gated = True
    with pytest.raises(FetchError, match=r"access is restricted.*HF_TOKEN"):
        fetch_hub(REPOSITORY, "config.json", cache_dir=tmp_path)


def test_hub_offline_without_the_file(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="not in the cache and HF_HUB_OFFLINE is set"):
        fetch_hub(REPOSITORY, "config.json", cache_dir=tmp_path)


def test_hub_unreachable(tmp_path, monkeypatch):
    with FileServer() as server:
        point_hub_at(server, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library tries again for long
    with pytest.raises(FetchError, match=r"the Hub cannot be reached. Check the network"):
        fetch_hub(REPOSITORY, "config.json", cache_dir=tmp_path)


def test_hub_cache_that_cannot_be_made(hub, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FetchError, match=r"cannot write it into the cache.*HF_HOME"):
        fetch_hub(REPOSITORY, "config.json", cache_dir=tmp_path / "file" / "cache")


def test_server_speaks_enough_for_a_snapshot(hub, tmp_path):
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(REPOSITORY, cache_dir=tmp_path, endpoint=hub.url))
    assert (folder / "a" / "b.bin").read_bytes() == b"x" * 999
