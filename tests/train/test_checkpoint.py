import pytest
import torch

from ijepa_zoo.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def make(step):
    tensors = {
        "encoder.a.weight": torch.full((3, 2), float(step)),
        "target_encoder.a.weight": torch.full((3, 2), 2.0),
        "optimizer.encoder.a.weight.step": torch.tensor(float(step)),
    }
    return Checkpoint(step, {"lr": 0.1, "scale": [0.3, 1.0], "network": {"depth": 2}}, tensors)


def test_round_trip(tmp_path):
    path = save_checkpoint(tmp_path, make(7))
    for source in (path, tmp_path):
        loaded = load_checkpoint(source)
        assert (loaded.step, loaded.config) == (7, make(7).config)
        assert loaded.tensors.keys() == make(7).tensors.keys()
        assert torch.equal(loaded.network("encoder")["a.weight"], torch.full((3, 2), 7.0))
        assert list(loaded.network("target_encoder")) == ["a.weight"]


def test_keeps_the_previous(tmp_path):
    for step in (5, 90, 1000):
        save_checkpoint(tmp_path, make(step))
    assert [load_checkpoint(p).step for p in list_checkpoints(tmp_path)] == [90, 1000]
    assert load_checkpoint(tmp_path).step == 1000


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage", "no_metadata"])
def test_broken_newest_is_not_passed_over(tmp_path, damage):
    save_checkpoint(tmp_path, make(1))
    path = save_checkpoint(tmp_path, make(2))
    whole = path.read_bytes()
    if damage == "no_metadata":
        from safetensors.torch import save_file

        save_file(make(2).tensors, path)
    else:
        path.write_bytes({"truncate": whole[:-5], "empty": b"", "garbage": b"x" * 200}[damage])
    with pytest.raises(CheckpointError, match=r"000000002.*delete it to go on from .*000000001"):
        load_checkpoint(tmp_path)
    path.unlink()
    assert load_checkpoint(tmp_path).step == 1


def test_interrupted_write_leaves_no_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, make(1))

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ijepa_zoo.train.checkpoint.os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, make(2))
    assert load_checkpoint(tmp_path).step == 1


def test_failed_write_raises(tmp_path):
    with pytest.raises(OSError, match="gone"):
        save_checkpoint(tmp_path / "gone", make(1))


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path)
