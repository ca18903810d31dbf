"""Models by their names, and the same with random weights."""

import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from safetensors.torch import save_model
from small_probe import encoder
from timm.models import save_for_hf

from ijepa_zoo import export
from ijepa_zoo.errors import CheckpointError, FetchError, SettingsError
from ijepa_zoo.eval import EvalConfig
from ijepa_zoo.eval.models import open_model
from ijepa_zoo.models.classifier import Classifier, LinearHead, save_classifier

NANO, TIMM = "vit_nano8_64_ijepa", "vit_tiny_patch16_224.augreg_in21k"


def assert_weights_of(model, network):
    for key, value in model.model.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key


def test_random_weights_depend_on_the_seed_alone():
    model = open_model(NANO)
    assert model.paper_name == model.name == f"{NANO}.photos"
    assert not model.model.training
    about = model.describe()
    assert about["weights"] == f"target encoder of {NANO}.photos"
    state = torch.get_rng_state()
    first, other = (model.untrained(seed).describe() for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == open_model(NANO, random=True).describe()
    assert first["name"] == f"{NANO}, random weights"
    assert len({d["weights_hash"] for d in (first, other, about)}) == 3


def test_timms_weights_need_no_hub_when_they_are_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match=TIMM):
        open_model(TIMM)
    made = timm.create_model("vit_tiny_patch16_224")
    repository = tmp_path / repo_folder_name(repo_id=f"timm/{TIMM}", repo_type="model")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    save_model(made, repository / "snapshots" / "abc" / "model.safetensors")
    model = open_model(f"timm:{TIMM}", img_size=32)
    assert (model.paper_name, model.model.num_classes) == (TIMM, 0)
    untrained = model.untrained(0).describe()
    assert untrained["image_size"] == model.describe()["image_size"] == [32, 32]
    assert untrained["weights_hash"] != model.describe()["weights_hash"]
    assert_weights_of(open_model(TIMM), made)


def test_folders_are_opened_with_their_own_architecture(tmp_path):
    network = encoder()
    folder = export(network, tmp_path / "exported")
    for name in (str(folder), f"local-dir:{folder}"):
        model = open_model(name)
        assert model.paper_name is None
        assert_weights_of(model, network)
        assert len(model.untrained(0).model.blocks) == 4
    made = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    config = {**made.pretrained_cfg, "num_classes": 0}
    save_for_hf(made, tmp_path, model_config=config, model_args={"img_size": 32})
    assert_weights_of(open_model(f"timm:local-dir:{tmp_path}"), made)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"model": "vit_tiny16_ijepa"}, "vit_tiny16_ijepa"),  # has no released weights
        ({"model": "vit_small_patch14_dinov3x", "random": True}, "dinov3x"),
        ({"model": "resnet18", "random": True}, "ResNet"),
        ({"random": True, "checkpoint": "a.pth"}, "--checkpoint"),
        ({"model": TIMM, "checkpoint": "a.pth"}, "checkpoint"),
        ({"random": True, "baseline": True}, "--baseline"),
        ({"model": encoder(), "baseline": True}, "--baseline"),
    ],
)
def test_names_and_options_that_do_not_fit_are_refused(given, named):
    with pytest.raises((SettingsError, CheckpointError), match=named):
        EvalConfig(**{"model": NANO, "data": "x", **given}).open_model()


def test_random_weights_of_a_classifier_are_not_those_of_its_encoder(tmp_path):
    network = encoder()
    folder = tmp_path / "classifier"
    head = LinearHead(network.embed_dim, 3)
    save_classifier(folder, Classifier(network, head), with_encoder=True)
    assert_weights_of(open_model(str(folder)), network)
    model = open_model(f"local-dir:{folder}", random=True)
    assert not torch.equal(model.model.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight)
    assert model.name.endswith("random weights")
