"""Names, and where the weights of a name, a file or a folder go."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import PretrainedCfg
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError, SettingsError
from ijepa_zoo.models.encoder import IJepaEncoder
from ijepa_zoo.weights import registry

NANO = "vit_nano8_64_ijepa"


def check_equal(ours, theirs):
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def test_models_are_listed_here_and_by_timm():
    names, released = ijepa_zoo.list_models(), ijepa_zoo.list_models(pretrained=True)
    assert set(names) == set(registry.ARCHITECTURES)
    assert ijepa_zoo.list_models("*huge*") == ["vit_huge14_ijepa", "vit_huge16_448_ijepa"]
    assert set(released) <= set(timm.list_models(pretrained=True))
    assert timm.is_model_pretrained("vit_huge14_ijepa.in22k_context")
    assert not timm.is_model_pretrained("vit_small16_ijepa")


def test_timm_creates_the_same_model(official, tiny, expected):
    ours = ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=official, **tiny)
    theirs = timm.create_model("vit_tiny16_ijepa", checkpoint=str(official), **tiny)
    assert type(ours) is type(theirs) is IJepaEncoder
    assert ours.weights_origin == f"target encoder of {official}"
    check_equal(ours, theirs)
    overlay = {"pretrained_cfg_overlay": {"file": str(official)}}
    check_equal(ours, timm.create_model("vit_tiny16_ijepa", pretrained=True, **overlay, **tiny))
    torch.manual_seed(3)
    ours = ijepa_zoo.create_model("vit_tiny16_ijepa", pretrained=False, num_classes=4, **tiny)
    torch.manual_seed(3)
    check_equal(ours, timm.create_model("vit_tiny16_ijepa", num_classes=4, **tiny))


def test_packaged_model_loads_without_a_connection(monkeypatch):
    def refuse(*_):
        raise AssertionError("the packaged weights need no connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    ours, ijepa = ijepa_zoo.create_model(NANO), ijepa_zoo.create_ijepa(NANO)
    assert ours.weights_origin == f"target encoder of {NANO}.photos"
    check_equal(ours, timm.create_model(f"{NANO}.photos", pretrained=True))
    check_equal(ours, ijepa.target_encoder)
    check_equal(ijepa.encoder, ijepa_zoo.create_model(NANO, network="encoder"))
    assert not torch.equal(ijepa.encoder.norm.weight, ours.norm.weight)


def test_every_form_of_timms_pretrained_cfg_is_taken_and_not_changed():
    cfg = {"tag": "photos", "multi_label": True, "crop_pct": 0.5}
    before = dict(cfg)
    models = [ijepa_zoo.create_model(NANO, pretrained_cfg=given) for given in ("photos", cfg)]
    models.append(ijepa_zoo.create_model(NANO, False, pretrained_cfg=PretrainedCfg(crop_pct=0.5)))
    assert cfg == before
    assert [model.multi_label for model in models] == [False, True, False]
    assert [model.pretrained_cfg["crop_pct"] for model in models[1:]] == [0.5, 0.5]


@torch.no_grad()
def test_all_networks_of_a_checkpoint(official, tiny, tiny_predictor, expected, tmp_path):
    def create(**kwargs):
        size = {"checkpoint": official, **tiny, **tiny_predictor, **kwargs}
        return ijepa_zoo.create_ijepa("vit_tiny16_ijepa", **size)

    ijepa = create()
    for network in ("encoder", "target_encoder"):
        assert_close(getattr(ijepa, network).encode(expected["input"]), expected[network])
    saved = torch.load(official, weights_only=True)
    ours = {f"module.{name}": tensor for name, tensor in ijepa.predictor.state_dict().items()}
    assert_close(ours, dict(saved["predictor"]), rtol=0, atol=0)
    large = create(img_size=(96, 64))
    assert large.predictor.predictor_pos_embed.shape == (1, 24, 24)
    targets = torch.tensor([[[22, 23]]])
    assert large(torch.randn(1, 3, 96, 64), torch.tensor([[0, 1, 20]]), targets).isfinite()
    save_file(saved["encoder"], tmp_path / "a.safetensors")
    for kwargs, named in (
        ({"predictor_embed_dim": 48}, r"mask_token is \[1, 1, 24\].*\[1, 1, 48\]"),
        ({"predictor_depth": 1}, r"predictor_blocks\.1"),
        ({"checkpoint": tmp_path / "a.safetensors"}, r"a\.safetensors.*predictor.*huge14"),
    ):
        with pytest.raises(CheckpointError, match=named):
            create(**kwargs)


MODEL, IJEPA = ijepa_zoo.create_model, ijepa_zoo.create_ijepa
NEW = {"pretrained": False, "img_size": 64}


@pytest.mark.parametrize(
    ("create", "name", "kwargs", "error", "named"),
    [
        (MODEL, "resnet50", {}, SettingsError, r"resnet50.*_ijepa"),
        (MODEL, __file__, {}, SettingsError, "local-dir:"),
        (IJEPA, "resnet50", {"pretrained": False}, SettingsError, r"resnet50.*_ijepa"),
        (MODEL, "vit_small16_ijepa", {}, CheckpointError, r"vit_small16.*pretrained=False"),
        (IJEPA, "vit_small16_ijepa", {}, CheckpointError, r"vit_small16.*checkpoint="),
        (IJEPA, "vit_huge14_ijepa.in2k", {}, CheckpointError, r"in2k.*vit_huge14_ijepa\.in1k"),
        (MODEL, NANO, {"pretrained_strict": False}, SettingsError, "pretrained_strict"),
        (MODEL, NANO, {"network": "predictor"}, SettingsError, "create_ijepa"),
        (MODEL, NANO, {"network": "encoder", "pretrained": False}, SettingsError, "'encoder'"),
        (IJEPA, NANO, {"network": "encoder"}, SettingsError, "network"),
        (IJEPA, NANO, {"features_only": True}, SettingsError, "features_only"),
        (MODEL, NANO, {**NEW, "class_token": True}, SettingsError, "class_token"),
        (MODEL, NANO, {**NEW, "reg_tokens": 4}, SettingsError, "reg_tokens"),
        (MODEL, NANO, {**NEW, "global_pool": "token"}, SettingsError, "global_pool"),
        (MODEL, NANO, {**NEW, "num_heads": 5}, SettingsError, "num_heads"),
        (MODEL, NANO, {**NEW, "embed_dim": 42, "num_heads": 2}, SettingsError, "42"),
        (MODEL, NANO, {**NEW, "img_size": (64, 60)}, SettingsError, r"\(64, 56\) or \(64, 64\)"),
        (IJEPA, NANO, {**NEW, "predictor_embed_dim": 25}, SettingsError, "predictor_embed_dim 25"),
        (IJEPA, NANO, {**NEW, "predictor_depth": 0}, SettingsError, "depth 0"),
        (IJEPA, NANO, {**NEW, "loss": "l1"}, SettingsError, "loss.*l1"),
    ],
)
def test_unknown_names_and_arguments_that_contradict_are_refused(
    create, name, kwargs, error, named
):
    with pytest.raises(error, match=named):
        create(name, **kwargs)
