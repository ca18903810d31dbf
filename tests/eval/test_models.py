"""Models by their names, and the same with random weights."""

import pytest
import timm
import torch
from small_probe import encoder

from ijepa_zoo import export
from ijepa_zoo.errors import CheckpointError, FetchError, SettingsError
from ijepa_zoo.eval import EvalConfig
from ijepa_zoo.eval.models import open_model


def test_names_of_this_package_carry_their_weights():
    model = open_model("vit_nano8_64_ijepa")
    assert model.paper_name == model.name == "vit_nano8_64_ijepa.photos"
    about = model.describe()
    assert about["weights"] == "target encoder of vit_nano8_64_ijepa.photos"
    assert about["image_size"] == [64, 64]
    assert about["parameters"] == sum(p.numel() for p in model.model.parameters())
    assert not model.model.training


def test_random_weights_depend_on_the_seed_alone():
    model = open_model("vit_nano8_64_ijepa")
    state = torch.get_rng_state()
    first, again, other = (model.untrained(seed).describe() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    hashes = {d["weights_hash"] for d in (first, other, model.describe())}
    assert len(hashes) == 3
    assert first["architecture"] == model.describe()["architecture"]
    assert first["name"] == "vit_nano8_64_ijepa, random weights"


@pytest.mark.parametrize("prefix", ["", "timm:"])
def test_timm_models_are_made_by_timm(monkeypatch, prefix):
    made = {}
    create = timm.create_model

    def offline(name, pretrained, **kwargs):
        made.update(name=name, pretrained=pretrained)
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    model = open_model(f"{prefix}vit_tiny_patch16_224.augreg_in21k", img_size=32)
    assert made == {"name": "vit_tiny_patch16_224.augreg_in21k", "pretrained": True}
    assert model.name == "vit_tiny_patch16_224.augreg_in21k"
    assert model.describe()["image_size"] == [32, 32]
    assert model.model.num_classes == 0
    model.untrained(0)
    assert made["pretrained"] is False
    with pytest.raises(SettingsError, match="checkpoint"):
        open_model("vit_tiny_patch16_224", checkpoint="x.pth")


def test_folders_are_opened_with_their_own_architecture(tmp_path):
    network = encoder()
    folder = export(network, tmp_path / "exported")
    for name in (str(folder), f"local-dir:{folder}"):
        model = open_model(name)
        assert model.paper_name is None
        for key, value in model.model.state_dict().items():
            assert torch.equal(value, network.state_dict()[key])
        assert len(model.untrained(0).model.blocks) == 4


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov3x", "qqq", "resnet18"])
def test_names_that_are_not_vits_are_refused(name):
    with pytest.raises(SettingsError, match=r"dinov3x|qqq|ResNet"):
        open_model(name, random=True)


NAME = "vit_tiny_patch16_224.augreg_in21k"


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A Hub that must not be asked, and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_timms_weights_out_of_reach_are_named(no_hub):
    with pytest.raises(FetchError, match=NAME):
        open_model(NAME)


def test_timms_weights_in_the_cache_need_no_hub(no_hub, tmp_path):
    from huggingface_hub.file_download import repo_folder_name
    from safetensors.torch import save_model

    torch.manual_seed(3)
    made = timm.create_model("vit_tiny_patch16_224")
    repository = tmp_path / "hub" / repo_folder_name(repo_id=f"timm/{NAME}", repo_type="model")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    save_model(made, snapshot / "model.safetensors")
    model = open_model(NAME)
    assert model.paper_name == NAME
    for key, value in model.model.state_dict().items():
        assert torch.equal(value, made.state_dict()[key]), key


def test_a_folder_of_timms_own_is_made_by_timm(tmp_path):
    from timm.models import save_for_hf

    torch.manual_seed(3)
    made = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    config = {**made.pretrained_cfg, "num_classes": 0}
    save_for_hf(made, tmp_path, model_config=config, model_args={"img_size": 32})
    model = open_model(f"timm:local-dir:{tmp_path}")
    assert model.paper_name is None
    for key, value in model.model.state_dict().items():
        assert torch.equal(value, made.state_dict()[key]), key


def test_random_weights_by_name():
    model = open_model("vit_tiny16_ijepa", random=True, img_size=32)  # has no released weights
    assert model.name == "vit_tiny16_ijepa, random weights"
    twin = open_model("vit_nano8_64_ijepa").untrained(5).describe()
    assert open_model("vit_nano8_64_ijepa", random=True, seed=5).describe() == twin


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"model": "vit_tiny16_ijepa"}, "vit_tiny16_ijepa"),  # has no released weights
        ({"random": True, "checkpoint": "a.pth"}, "--checkpoint"),
        ({"random": True, "baseline": True}, "--baseline"),
        ({"model": encoder(), "baseline": True}, "--baseline"),
        ({"model": encoder(), "random": True}, "random"),
    ],
)
def test_options_that_contradict_are_refused(given, named):
    with pytest.raises((SettingsError, CheckpointError), match=named):
        EvalConfig(**{"model": "vit_nano8_64_ijepa", "data": "x", **given}).open_model()
