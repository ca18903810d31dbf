"""Names, and where the weights of a name, a file or a folder go."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError, SettingsError
from ijepa_zoo.models.encoder import IJepaEncoder
from ijepa_zoo.weights import registry

NANO = "vit_nano8_64_ijepa"


def check_equal(ours, theirs):
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


@pytest.fixture
def all_networks(official, tiny, tiny_predictor):
    def create(**kwargs):
        size = {**tiny, **tiny_predictor, **kwargs}
        return ijepa_zoo.create_ijepa("vit_tiny16_ijepa", checkpoint=official, **size)

    return create


def test_models_are_listed_here_and_by_timm():
    names, released = ijepa_zoo.list_models(), ijepa_zoo.list_models(pretrained=True)
    assert set(names) == set(registry.ARCHITECTURES)
    assert ijepa_zoo.list_models("*huge*") == ["vit_huge14_ijepa", "vit_huge16_448_ijepa"]
    assert set(names) <= set(timm.list_models())
    assert set(released) <= set(timm.list_models(pretrained=True))
    with_weights = {checkpoint.model for checkpoint in registry.checkpoints()}
    for name in names:
        assert timm.is_model_pretrained(name) is (name in with_weights), name
    assert timm.is_model_pretrained("vit_huge14_ijepa.in22k_context")


def test_timm_creates_the_same_model(official, tiny, expected):
    ours = ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=official, **tiny)
    theirs = timm.create_model("vit_tiny16_ijepa", checkpoint=str(official), **tiny)
    assert type(ours) is type(theirs) is IJepaEncoder
    check_equal(ours, theirs)
    torch.manual_seed(3)
    ours = ijepa_zoo.create_model("vit_tiny16_ijepa", pretrained=False, num_classes=4, **tiny)
    torch.manual_seed(3)
    check_equal(ours, timm.create_model("vit_tiny16_ijepa", num_classes=4, **tiny))
    overlay = {"pretrained_cfg_overlay": {"file": str(official)}}
    model = timm.create_model("vit_tiny16_ijepa", pretrained=True, **overlay, **tiny)
    assert_close(model.encode(expected["input"]), expected["target_encoder"])


@pytest.mark.parametrize("create", [ijepa_zoo.create_model, ijepa_zoo.create_ijepa])
def test_unknown_names_and_names_without_weights_are_refused(create):
    with pytest.raises(SettingsError, match=r"resnet50.*_ijepa"):
        create("resnet50", pretrained=False)
    with pytest.raises(CheckpointError, match=r"vit_small16_ijepa.*pretrained=False.*checkpoint="):
        create("vit_small16_ijepa")
    with pytest.raises((CheckpointError, RuntimeError), match="in2k"):
        create("vit_huge14_ijepa.in2k")
    with pytest.raises(CheckpointError, match=r"in2k.*vit_huge14_ijepa\.in1k"):
        timm.create_model("vit_huge14_ijepa", pretrained=True, pretrained_cfg="in2k")


@pytest.mark.parametrize(
    ("create", "kwargs", "named"),
    [
        (ijepa_zoo.create_model, {"pretrained_strict": False}, "pretrained_strict"),
        (ijepa_zoo.create_model, {"network": "predictor"}, "create_ijepa"),
        (ijepa_zoo.create_model, {"network": "encoder", "pretrained": False}, "'encoder'"),
        (ijepa_zoo.create_ijepa, {"network": "encoder"}, "network"),
        (ijepa_zoo.create_ijepa, {"features_only": True}, "features_only"),
    ],
)
def test_arguments_that_contradict_are_refused(create, kwargs, named):
    with pytest.raises(SettingsError, match=named):
        create(NANO, **kwargs)


def test_packaged_model_loads_without_a_connection(monkeypatch):
    def refuse(*_):
        raise AssertionError("the packaged weights need no connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    ours, ijepa = ijepa_zoo.create_model(NANO), ijepa_zoo.create_ijepa(NANO)
    check_equal(ours, timm.create_model(f"{NANO}.photos", pretrained=True))
    check_equal(ours, ijepa.target_encoder)
    check_equal(ijepa.encoder, ijepa_zoo.create_model(NANO, network="encoder"))
    assert not torch.equal(ijepa.encoder.norm.weight, ours.norm.weight)


def test_origin_of_the_weights_is_known(official, tiny):
    model = ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=official, **tiny)
    assert model.weights_origin == f"target encoder of {official}"
    assert ijepa_zoo.create_model(NANO).weights_origin == f"target encoder of {NANO}.photos"
    assert not hasattr(ijepa_zoo.create_model(NANO, pretrained=False), "weights_origin")


@torch.no_grad()
def test_all_networks_of_an_official_file(all_networks, official, expected):
    ijepa = all_networks()
    for network in ("encoder", "target_encoder"):
        assert_close(getattr(ijepa, network).encode(expected["input"]), expected[network])
    saved = torch.load(official, weights_only=True)["predictor"]
    ours = {f"module.{name}": tensor for name, tensor in ijepa.predictor.state_dict().items()}
    assert_close(ours, dict(saved), rtol=0, atol=0)
    before = ijepa.encoder.norm.bias.clone()
    ijepa.target_encoder.norm.bias.add_(1.0)
    assert torch.equal(ijepa.encoder.norm.bias, before)


def test_all_networks_at_another_image_size(all_networks):
    ijepa = all_networks(img_size=(96, 64))
    assert ijepa.predictor.predictor_pos_embed.shape == (1, 24, 24)
    targets = torch.tensor([[[22, 23]]])
    assert ijepa(torch.randn(1, 3, 96, 64), torch.tensor([[0, 1, 20]]), targets).isfinite()


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"predictor_embed_dim": 48}, r"mask_token is \[1, 1, 24\].*\[1, 1, 48\]"),
        ({"predictor_depth": 1}, r"predictor_blocks\.1"),
    ],
)
def test_predictor_of_another_size_is_refused(all_networks, sizes, named):
    with pytest.raises(CheckpointError, match=named):
        all_networks(**sizes)


def test_one_network_is_not_all_three(official, tiny, tmp_path):
    encoder = torch.load(official, weights_only=True)["encoder"]
    save_file(encoder, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors.*predictor.*vit_huge14_ijepa\.in1k"):
        ijepa_zoo.create_ijepa("vit_tiny16_ijepa", checkpoint=tmp_path / "a.safetensors", **tiny)
