"""Heads, and classifiers as folders."""

import json
from pathlib import Path

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


def make_classifier(kind: str, encoder=None) -> Classifier:
    """A classifier with random weights, in evaluation mode."""
    torch.manual_seed(0)
    encoder = encoder or ijepa_zoo.create_model(NANO)
    width = encoder.embed_dim
    head, layers = {
        "linear": (LinearHead(4 * width, 3, batch_norm=True), "last4"),
        "attentive": (AttentiveHead(width, 3, num_heads=4), "last"),
        "dense": (DenseHead(width, 3, batch_norm=True), [2]),
    }[kind]
    if kind != "attentive":
        head.norm.running_mean.normal_()
    return Classifier(encoder, head, layers, class_names=NAMES).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("with_encoder", [False, True])
@pytest.mark.parametrize("kind", ["linear", "attentive", "dense"])
def test_a_saved_classifier_gives_the_same_outputs(kind, with_encoder, images, tmp_path: Path):
    classifier = make_classifier(kind)
    folder = save_classifier(
        tmp_path / "probe", classifier, encoder=NANO, with_encoder=with_encoder, top1=61.5
    )
    opened = ijepa_zoo.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        expected, got = classifier(images), opened(images)
    assert expected.shape == ((2, 3, 64, 64) if kind == "dense" else (2, 3))
    assert torch.equal(got, expected)
    assert opened.class_names == NAMES
    assert json.loads((folder / "config.json").read_text())["top1"] == 61.5
    assert ijepa_zoo.create_transform(opened) is not None


def test_an_encoder_of_another_size_is_opened_at_that_size(tmp_path: Path):
    classifier = make_classifier("linear", ijepa_zoo.create_model(NANO, img_size=96))
    save_classifier(tmp_path / "probe", classifier, encoder=NANO)
    opened = ijepa_zoo.create_model(f"local-dir:{tmp_path / 'probe'}")
    assert opened.patch_embed.img_size == (96, 96)


def test_an_encoder_of_other_weights_is_refused(tmp_path: Path):
    encoder = ijepa_zoo.create_model(NANO)
    ijepa_zoo.export(encoder, tmp_path / "encoder")
    source = f"local-dir:{tmp_path / 'encoder'}"
    classifier = make_classifier("linear", ijepa_zoo.create_model(source))
    save_classifier(tmp_path / "probe", classifier, encoder=source)
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    weights["norm.bias"] += 1e-3
    save_file(weights, tmp_path / "encoder" / "model.safetensors")
    with pytest.raises(CheckpointError, match="encoder"):
        ijepa_zoo.create_model(f"local-dir:{tmp_path / 'probe'}")


def test_folders_that_cannot_be_written_or_opened(tmp_path: Path):
    classifier = make_classifier("linear")
    with pytest.raises(SettingsError, match="with_encoder"):
        save_classifier(tmp_path / "probe", classifier)
    folder = save_classifier(tmp_path / "probe", classifier, encoder=NANO)
    with pytest.raises(RunError, match="probe"):
        save_classifier(folder, classifier, encoder=NANO)
    save_classifier(folder, classifier, encoder=NANO, overwrite=True)
    (folder / "head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"head\.safetensors"):
        ijepa_zoo.create_model(f"local-dir:{folder}")


def test_a_head_must_fit():
    with pytest.raises(SettingsError, match="7"):
        Classifier(ijepa_zoo.create_model(NANO), LinearHead(7, 3))
    with pytest.raises(SettingsError, match="class_names"):
        Classifier(ijepa_zoo.create_model(NANO), LinearHead(128, 3), class_names=["one"])
