"""Models by their names, and the same with random weights."""

import pytest
import timm
import torch
from small_probe import encoder

from ijepa_zoo import export
from ijepa_zoo.eval.models import Subject, as_subject, open_model


def test_names_of_this_package_carry_their_weights():
    subject = open_model("vit_nano8_64_ijepa")
    assert subject.paper_name == subject.name == "vit_nano8_64_ijepa.scenes"
    about = subject.describe()
    assert about["weights"] == "target encoder of vit_nano8_64_ijepa.scenes"
    assert about["image_size"] == [64, 64]
    assert about["parameters"] == sum(p.numel() for p in subject.model.parameters())
    assert not subject.model.training


def test_random_weights_depend_on_the_seed_alone():
    subject = open_model("vit_nano8_64_ijepa")
    state = torch.get_rng_state()
    first, again, other = (subject.untrained(seed).describe() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    hashes = {d["weights_hash"] for d in (first, other, subject.describe())}
    assert len(hashes) == 3
    assert first["architecture"] == subject.describe()["architecture"]
    assert first["name"] == "vit_nano8_64_ijepa, random weights"


@pytest.mark.parametrize("prefix", ["", "timm:"])
def test_timm_models_are_made_by_timm(monkeypatch, prefix):
    made = {}
    create = timm.create_model

    def offline(name, pretrained, **kwargs):
        made.update(name=name, pretrained=pretrained)
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    subject = open_model(f"{prefix}vit_tiny_patch16_224.augreg_in21k", img_size=32)
    assert made == {"name": "vit_tiny_patch16_224.augreg_in21k", "pretrained": True}
    assert subject.name == "vit_tiny_patch16_224.augreg_in21k"
    assert subject.describe()["image_size"] == [32, 32]
    assert subject.model.num_classes == 0
    subject.untrained(0)
    assert made["pretrained"] is False
    with pytest.raises(ValueError, match="is timm's"):
        open_model("vit_tiny_patch16_224", checkpoint="x.pth")


def test_folders_are_opened_with_their_own_architecture(tmp_path):
    model = encoder()
    folder = export(model, tmp_path / "exported")
    for name in (str(folder), f"local-dir:{folder}"):
        subject = open_model(name)
        assert subject.paper_name is None
        for key, value in subject.model.state_dict().items():
            assert torch.equal(value, model.state_dict()[key])
        assert len(subject.untrained(0).model.blocks) == 4


def test_unknown_names_are_refused_with_similar_ones():
    with pytest.raises(ValueError, match=r"similar: .*vit_small_patch14_dinov2"):
        open_model("vit_small_patch14_dinov3x")
    with pytest.raises(ValueError, match="Name a model of `ijepa-zoo list`"):
        open_model("qqq")


def test_a_model_without_a_name_has_no_random_twin():
    assert isinstance(as_subject(encoder()), Subject)
    with pytest.raises(ValueError, match="the model's name"):
        as_subject(encoder()).untrained(0)
