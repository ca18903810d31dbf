import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError
from ijepa_zoo.models.encoder import IJepaEncoder

MODELS = [
    "vit_base16_ijepa",
    "vit_giant16_ijepa",
    "vit_huge14_ijepa",
    "vit_huge16_448_ijepa",
    "vit_large16_ijepa",
    "vit_nano8_64_ijepa",
    "vit_small16_ijepa",
    "vit_tiny16_ijepa",
]
RELEASED = [
    f"{model}.{tag}{network}"
    for model, tag in (
        ("vit_giant16_ijepa", "in22k"),
        ("vit_huge14_ijepa", "in1k"),
        ("vit_huge14_ijepa", "in22k"),
        ("vit_huge16_448_ijepa", "in1k"),
    )
    for network in ("", "_context")
]


def test_models_are_listed_here_and_by_timm():
    assert sorted(ijepa_zoo.list_models()) == MODELS
    assert ijepa_zoo.list_models("*huge*") == ["vit_huge14_ijepa", "vit_huge16_448_ijepa"]
    released = ijepa_zoo.list_models(pretrained=True)
    assert set(RELEASED) <= set(released)
    assert {name.partition(".")[0] for name in released} <= set(MODELS)
    assert set(MODELS) <= set(timm.list_models())
    assert set(released) <= set(timm.list_models(pretrained=True))
    assert not any("ijepa" in name and name not in MODELS for name in timm.list_models())


def test_timm_knows_which_models_have_weights():
    for name in MODELS:
        has_weights = any(item.startswith(f"{name}.") for item in RELEASED) or "nano" in name
        assert timm.is_model(name)
        assert timm.is_model_pretrained(name) is has_weights, name
    assert timm.is_model_pretrained("vit_huge14_ijepa.in22k_context")


def test_timm_makes_the_same_model(official, tiny, expected):
    ours = ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=official, **tiny)
    theirs = timm.create_model("vit_tiny16_ijepa", checkpoint=str(official), **tiny)
    assert type(ours) is type(theirs) is IJepaEncoder
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    torch.manual_seed(3)
    ours = ijepa_zoo.create_model("vit_tiny16_ijepa", pretrained=False, num_classes=4, **tiny)
    torch.manual_seed(3)
    theirs = timm.create_model("vit_tiny16_ijepa", num_classes=4, **tiny)
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    overlay = {"file": str(official)}
    model = timm.create_model(
        "vit_tiny16_ijepa", pretrained=True, pretrained_cfg_overlay=overlay, **tiny
    )
    with torch.no_grad():
        assert_close(model.encode(expected["input"]), expected["target_encoder"])


@pytest.mark.parametrize("name", ["resnet50", "vit_base_patch16_224", "vit_huge14_ijepas.in1k"])
@pytest.mark.parametrize("create", [ijepa_zoo.create_model, ijepa_zoo.create_ijepa])
def test_other_names_are_refused_with_the_names_there_are(name, create):
    with pytest.raises(ValueError, match=r"no I-JEPA model is called .* vit_huge14_ijepa,"):
        create(name, pretrained=False)


def test_names_without_weights_say_what_there_is():
    with pytest.raises(CheckpointError, match=r"no released weights of vit_base16_ijepa\. Use"):
        ijepa_zoo.create_model("vit_base16_ijepa")
    with pytest.raises(CheckpointError, match=r"known: vit_huge14_ijepa\.in1k, vit_huge14"):
        timm.create_model("vit_huge14_ijepa", pretrained=True, pretrained_cfg="in2k")
    with pytest.raises((CheckpointError, RuntimeError), match="in2k"):
        ijepa_zoo.create_model("vit_huge14_ijepa.in2k")
    with pytest.raises(CheckpointError, match="no released weights of vit_small16_ijepa"):
        ijepa_zoo.create_ijepa("vit_small16_ijepa")


def test_weights_are_never_loaded_loosely(official, tiny):
    with pytest.raises(ValueError, match="strict"):
        ijepa_zoo.create_model(
            "vit_tiny16_ijepa", checkpoint=official, pretrained_strict=False, **tiny
        )


def test_default_of_every_released_model_is_the_target_encoder():
    for name in ("vit_huge14_ijepa", "vit_huge16_448_ijepa", "vit_giant16_ijepa"):
        cfg = timm.get_pretrained_cfg(name)
        assert not cfg.tag.endswith("_context")
        assert cfg.description.startswith("target_encoder of I-JEPA")
        context = timm.get_pretrained_cfg(f"{name}.{cfg.tag}_context")
        assert context.description.startswith("encoder of I-JEPA")


# --- all three networks ---------------------------------------------------------------------


def test_all_networks_of_an_official_file(official, tiny, tiny_predictor, expected):
    ijepa = ijepa_zoo.create_ijepa(
        "vit_tiny16_ijepa", checkpoint=official, **tiny, **tiny_predictor
    )
    with torch.no_grad():
        for network in ("encoder", "target_encoder"):
            assert_close(getattr(ijepa, network).encode(expected["input"]), expected[network])
    published = torch.load(official, weights_only=True)["predictor"]
    ours = ijepa.predictor.state_dict()
    assert ours.keys() == {name.removeprefix("module.") for name in published}
    for name, tensor in published.items():
        assert torch.equal(ours[name.removeprefix("module.")], tensor)
    before = ijepa.encoder.norm.bias.detach().clone()
    ijepa.target_encoder.norm.bias.data.add_(1.0)
    assert torch.equal(ijepa.encoder.norm.bias, before)  # no memory shared


def test_predictor_of_another_size_is_refused_with_its_shapes(official, tiny):
    with pytest.raises(CheckpointError, match=r"is \[1, 1, 24\] in the file, \[1, 1, 48\]"):
        ijepa_zoo.create_ijepa(
            "vit_tiny16_ijepa",
            checkpoint=official,
            predictor_embed_dim=48,
            predictor_depth=2,
            **tiny,
        )
    with pytest.raises(CheckpointError, match="has no use for predictor_blocks"):
        ijepa_zoo.create_ijepa(
            "vit_tiny16_ijepa",
            checkpoint=official,
            predictor_embed_dim=24,
            predictor_depth=1,
            **tiny,
        )


def test_all_networks_at_another_image_size(official, tiny, tiny_predictor):
    ijepa = ijepa_zoo.create_ijepa(
        "vit_tiny16_ijepa",
        checkpoint=official,
        **{**tiny, "img_size": (96, 64)},
        **tiny_predictor,
    )
    assert ijepa.predictor.predictor_pos_embed.shape == (1, 24, 24)
    targets = torch.tensor([[[22, 23]]])
    loss = ijepa(torch.randn(1, 3, 96, 64), torch.tensor([[0, 1, 20]]), targets)
    assert loss.isfinite()


def test_data_type_holds_for_all_networks(official, tiny, tiny_predictor):
    ijepa = ijepa_zoo.create_ijepa(
        "vit_tiny16_ijepa", checkpoint=official, dtype=torch.bfloat16, **tiny, **tiny_predictor
    )
    assert {tensor.dtype for tensor in ijepa.state_dict().values()} == {torch.bfloat16}


def test_one_network_is_not_three(official, tiny, tmp_path):
    encoder = torch.load(official, weights_only=True)["encoder"]
    save_file(
        {k.removeprefix("module."): v for k, v in encoder.items()}, tmp_path / "a.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"holds no .*predictor.*vit_huge14_ijepa\.in1k"):
        ijepa_zoo.create_ijepa("vit_tiny16_ijepa", checkpoint=tmp_path / "a.safetensors", **tiny)
    with pytest.raises(ValueError, match="leave features_only out"):
        ijepa_zoo.create_ijepa("vit_tiny16_ijepa", pretrained=False, features_only=True)


@pytest.mark.parametrize("network", ["encoder", "predictor", "target_encoder"])
def test_device_and_data_type_hold_for_all_random_networks(network):
    ijepa = ijepa_zoo.create_ijepa(
        "vit_nano8_64_ijepa", pretrained=False, device="meta", dtype=torch.bfloat16
    )
    tensors = getattr(ijepa, network).state_dict().values()
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_model_that_ships_loads_from_the_package(monkeypatch):
    def refuse(*_):
        raise AssertionError("the packaged weights need no network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    ours = ijepa_zoo.create_model("vit_nano8_64_ijepa").eval()
    theirs = timm.create_model("vit_nano8_64_ijepa.scenes", pretrained=True).eval()
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    ijepa = ijepa_zoo.create_ijepa("vit_nano8_64_ijepa")
    assert_close(dict(ijepa.target_encoder.state_dict()), dict(ours.state_dict()), rtol=0, atol=0)
    context = ijepa_zoo.create_model("vit_nano8_64_ijepa", network="encoder")
    assert_close(dict(ijepa.encoder.state_dict()), dict(context.state_dict()), rtol=0, atol=0)
    assert not torch.equal(context.norm.weight, ours.norm.weight)


def test_network_without_weights_is_refused():
    for network in ("encoder", "garbage"):
        with pytest.raises(ValueError, match="pretrained is False"):
            ijepa_zoo.create_model("vit_nano8_64_ijepa", pretrained=False, network=network)
    with pytest.raises(ValueError, match="create_ijepa makes the predictor"):
        ijepa_zoo.create_model("vit_nano8_64_ijepa", network="predictor")
    with pytest.raises(ValueError, match="leave network out"):
        ijepa_zoo.create_ijepa("vit_nano8_64_ijepa", pretrained=False, network="encoder")


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_heads": 5},
        {"num_heads": 0},
        {"depth": 0},
        {"in_chans": 0},
        {"embed_dim": -8},
        {"mlp_ratio": float("nan")},
        {"patch_size": 0},
        {"img_size": 7},
        {"img_size": (64, 0)},
    ],
)
def test_impossible_sizes_are_refused_by_name(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        ijepa_zoo.create_model("vit_nano8_64_ijepa", pretrained=False, **sizes)


@pytest.mark.parametrize("size", [{"predictor_depth": 0}, {"predictor_embed_dim": 0}])
def test_no_predictor_is_refused(size):
    with pytest.raises(ValueError, match="at least 1"):
        ijepa_zoo.create_ijepa("vit_nano8_64_ijepa", pretrained=False, **size)


def test_a_model_says_where_its_weights_come_from(official, tiny):
    model = ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=official, **tiny)
    assert model.weights_origin == f"target encoder of {official}"
    assert not hasattr(
        ijepa_zoo.create_model("vit_tiny16_ijepa", pretrained=False, **tiny), "weights_origin"
    )
