"""Heads, and classifiers as folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError, RunError, SettingsError
from ijepa_zoo.models.classifier import (
    AttentiveHead,
    Classifier,
    DenseHead,
    LinearHead,
    save_classifier,
)

NANO = "vit_nano8_64_ijepa"
NAMES = ["cube", "sphere", "cylinder"]


def make_classifier(kind="linear", **kwargs):
    """A classifier with random weights, in evaluation mode."""
    encoder = ijepa_zoo.create_model(**{"name": NANO, **kwargs})
    width = encoder.embed_dim
    head, layers = {
        "linear": (LinearHead(4 * width, 3, batch_norm=True), "last4"),
        "attentive": (AttentiveHead(width, 3, num_heads=4), "last"),
        "dense": (DenseHead(width, 3, batch_norm=True), [2]),
        "depth": (DenseHead(width, 8, depth_range=(0.1, 10.0), upsample=2), "last"),
    }[kind]
    return Classifier(encoder, head, layers, class_names=None if kind == "depth" else NAMES).eval()


@pytest.mark.parametrize("with_encoder", [False, True])
@pytest.mark.parametrize("kind", ["linear", "attentive", "dense", "depth"])
@torch.no_grad()
def test_a_saved_classifier_gives_the_same_outputs(kind, with_encoder, tmp_path):
    classifier, images = make_classifier(kind, img_size=96), torch.randn(2, 3, 96, 96)
    folder = save_classifier(
        tmp_path / "probe", classifier, encoder=NANO, with_encoder=with_encoder, top1=61.5
    )
    opened = ijepa_zoo.create_model(f"local-dir:{folder}").eval()
    expected = classifier(images)
    shapes = {"dense": (2, 3, 96, 96), "depth": (2, 1, 96, 96)}
    assert expected.shape == shapes.get(kind, (2, 3))
    assert torch.equal(opened(images), expected)
    if kind == "depth":
        assert ((expected > 0.1) & (expected < 10)).all()
    assert opened.class_names == classifier.class_names
    assert json.loads((folder / "config.json").read_text())["top1"] == 61.5


def test_an_encoder_of_other_weights_is_refused(tmp_path):
    source = f"local-dir:{ijepa_zoo.export(ijepa_zoo.create_model(NANO), tmp_path / 'encoder')}"
    save_classifier(tmp_path / "probe", make_classifier(name=source), encoder=source)
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    weights["norm.bias"] += 1e-3
    save_file(weights, tmp_path / "encoder" / "model.safetensors")
    with pytest.raises(CheckpointError, match="encoder"):
        ijepa_zoo.create_model(f"local-dir:{tmp_path / 'probe'}")


def test_folders_that_cannot_be_written_or_opened(tmp_path):
    classifier = make_classifier()
    with pytest.raises(SettingsError, match="with_encoder"):
        save_classifier(tmp_path / "probe", classifier)
    folder = save_classifier(tmp_path / "probe", classifier, encoder=NANO)
    with pytest.raises(RunError, match="probe"):
        save_classifier(folder, classifier, encoder=NANO)
    save_classifier(folder, classifier, encoder=NANO, overwrite=True)
    (folder / "head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"head\.safetensors"):
        ijepa_zoo.create_model(f"local-dir:{folder}")
    for given in ({"img_size": 96}, {"network": "encoder"}, {"checkpoint": "other.pt"}):
        with pytest.raises(SettingsError, match=next(iter(given))):
            ijepa_zoo.create_model(f"local-dir:{folder}", **given)


@pytest.mark.parametrize(
    ("head", "names", "named"), [((7, 3), None, "7"), ((128, 3), ["one"], "class_names")]
)
def test_a_head_must_fit(head, names, named):
    with pytest.raises(SettingsError, match=named):
        Classifier(ijepa_zoo.create_model(NANO), LinearHead(*head), class_names=names)
