"""Cached features: computed once, of the right pixels and weights, whatever happens in between."""

import shutil

import pytest
from small_probe import TASK, encoder, the_one, write_pictures

from ijepa_zoo.distributed import Distributed
from ijepa_zoo.encode import Encoder
from ijepa_zoo.eval.features import BlockFeatures, cached_features
from ijepa_zoo.eval.models import EvalModel
from ijepa_zoo.eval.probe import EvalConfig, open_probe


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures", train=50, test=2)


@pytest.fixture
def cached(pictures, tmp_path):
    def run(model=None, precision="auto", **options):
        model = EvalModel(model or encoder(), "m")
        options = {"out": tmp_path / "out", "workers": 0, **options}
        config = EvalConfig(task=TASK, model=model, data=pictures, **options)
        probe = open_probe(config, Distributed(), model)
        return cached_features(probe, probe.train, BlockFeatures(model, precision=precision))

    return run


@pytest.fixture
def encoded(monkeypatch):
    """Numbers of images in the batches that are encoded."""
    encode, counts = Encoder.encode, []

    def counting(self, batches):
        for rows, reasons in encode(self, batches):
            counts.append(len(rows))
            yield rows, reasons

    monkeypatch.setattr(Encoder, "encode", counting)
    return counts


@pytest.mark.parametrize(
    "change",
    ["nothing", "weights", "pixels", "names", "transform", "precision", "bands", "more", "damaged"],
)
def test_a_stale_cache_is_never_used(cached, pictures, tmp_path, encoded, change):
    cached()
    file = pictures / "train" / "class1" / "3.png"
    model, kwargs = encoder(), {}
    if change == "weights":
        model.blocks[2].mlp.fc1.weight.data.mul_(1.5)
    elif change == "pixels":
        shutil.copy(pictures / "train" / "class2" / "3.png", file)
    elif change == "names":
        file.rename(file.with_name("other.png"))
    elif change == "transform":
        model.set_input_size(img_size=64)
    elif change == "precision":
        kwargs = {"precision": "bfloat16"}
    elif change == "bands":
        kwargs = {"bands": (2, 1, 0)}
    elif change == "damaged":
        rows = the_one(tmp_path, "out/cache/*/rows.npy")
        rows.write_bytes(rows.read_bytes()[:-9])
    elif change == "more":
        shutil.copy(file, file.with_name("one-more.png"))
    cached(model, **kwargs)
    assert sum(encoded) == 150 + {"nothing": 0, "more": 151}.get(change, 150)
