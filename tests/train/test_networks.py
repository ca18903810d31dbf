"""What the networks of a run start from."""

import pytest
import timm
import torch
from small_run import CONFIG, change, train
from timm.models.vision_transformer import VisionTransformer

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError, SettingsError
from ijepa_zoo.train.networks import build_networks

ONE_STEP = change(CONFIG, optim={"duration": "1 steps", "warmup": "0 steps"})
SIZES = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def vit(**kwargs):
    model = VisionTransformer(**{"num_classes": 0, **SIZES, **kwargs})
    torch.nn.init.normal_(model.pos_embed)
    return model


def check_start(init, encoder, caplog):
    """Both encoders are `encoder`, and the predictor is that of a random start."""
    model, fresh = build_networks(CONFIG, init), build_networks(CONFIG)
    for own in (model.encoder, model.target_encoder):
        for name, tensor in own.state_dict().items():
            assert torch.equal(tensor, encoder[name]), name
    for own, other in zip(model.predictor.parameters(), fresh.predictor.parameters()):
        assert torch.equal(own, other)
    assert model.encoder.norm.weight.data_ptr() != model.target_encoder.norm.weight.data_ptr()
    assert "predictor is new" in caplog.text


@pytest.mark.parametrize("to", ["transformers", "timm", "native"])
def test_start_from_an_encoder_alone(to, tmp_path, caplog):
    model = ijepa_zoo.create_model("vit_nano8_64_ijepa", pretrained=False, **SIZES)
    folder = ijepa_zoo.export(model, tmp_path / "encoder", to)
    check_start(folder, model.state_dict(), caplog)
    train(tmp_path / "run", ONE_STEP, init=folder)


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_class_token_and_classifier_of_a_plain_vit_are_dropped(no_embed_class, tmp_path, caplog):
    model = vit(no_embed_class=no_embed_class, num_classes=3)
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    state = model.state_dict()
    state["pos_embed"] = state["pos_embed"][:, 0 if no_embed_class else 1 :]
    check_start(tmp_path / "mae.pth", state, caplog)
    assert "class token is dropped" in caplog.text
    assert caplog.text.count("classifier is dropped") == 1


def test_start_from_a_vit_of_timm_by_name(monkeypatch, caplog):
    model, create = vit(), timm.create_model
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": CONFIG.data.std}

    def create_model(name, **kwargs):
        if not name.startswith("vit_tiny_patch16_224"):
            return create(name, **kwargs)
        assert kwargs == {"pretrained": True, "num_classes": 0}
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    state = model.state_dict()
    state["pos_embed"] = state["pos_embed"][:, 1:]
    check_start("vit_tiny_patch16_224.augreg_in21k", state, caplog)
    assert "data.mean=0.5,0.5,0.5" in caplog.text  # another normalization than the run's


@pytest.mark.parametrize(("part", "named"), [({"reg_tokens": 2}, "reg_token"),
                                             ({"init_values": 1e-5}, "ls1")])  # fmt: skip
def test_an_encoder_with_other_parts_is_refused_by_name(part, named, tmp_path):
    torch.save(vit(**part).state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=rf"other.pth.*{named}"):
        build_networks(CONFIG, tmp_path / "other.pth")


def test_what_does_not_fit_the_model_is_refused():
    with pytest.raises(CheckpointError, match=r"model\.name=vit_huge14_ijepa"):
        build_networks(CONFIG, "vit_huge14_ijepa.in1k")
    with pytest.raises(SettingsError, match=r"data\.mean has 2 values for images of 3 channels"):
        build_networks(change(CONFIG, data={"mean": (0.5, 0.5)}))
