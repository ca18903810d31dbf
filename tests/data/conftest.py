"""Fixtures of the data layer."""

import pickle

import pytest
from inputs import noise
from torchvision.datasets import CIFAR10


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """The folder above CIFAR-10 of 10 images a file, for torchvision with its checksums off."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for seed, name in enumerate(names):
        data = {"data": noise(10, 3072, 1, seed), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(data))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    return tmp_path
