"""The registry, and its weights end to end: real names and code, a local server, small files."""

import re
from dataclasses import replace

import pytest
import timm
import torch
from file_server import COMMIT, FileServer, go_offline, point_hub_at
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError, FetchError
from ijepa_zoo.models.predictor import PREDICTORS
from ijepa_zoo.weights import registry

SIZES = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
THEIRS = "facebook/ijepa_vith14_1k"
CHECKPOINTS = registry.checkpoints()


def check_tokens(model, expected, network):
    assert_close(model.encode(expected["input"]), expected[network], rtol=1e-5, atol=1e-5)


@pytest.fixture
def released(official, monkeypatch, tmp_path):
    """A server with a small file for each released one, and a registry that points at it."""
    monkeypatch.setenv("IJEPA_ZOO_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    sizes = {"model_name": "vit_tiny16_ijepa", "network": "encoder", **SIZES}
    folder = ijepa_zoo.export(official, tmp_path / "theirs", "transformers", **sizes)
    content = {file.name: file.read_bytes() for file in folder.iterdir()}
    name = "preprocessor_config.json"
    content[name] = content[name].replace(b"0.485", b"0.5")  # as in the real ones
    with FileServer() as server:
        point_hub_at(server, monkeypatch)
        server.files["/ijepa/official.pth.tar"] = official.read_bytes()
        checkpoints = []
        for checkpoint in registry.checkpoints():
            source = checkpoint.source
            if source.url:
                source = replace(source, url=f"{server.url}/ijepa/official.pth.tar")
            elif source.hf_hub_id:
                server.repositories[source.hf_hub_id] = content
                source = replace(source, revision=COMMIT)
            checkpoints.append(replace(checkpoint, source=source))
        monkeypatch.setattr(registry, "checkpoints", lambda: tuple(checkpoints))
        yield server


def test_default_is_the_target_encoder_and_only_it_is_downloaded(released, official, expected):
    model = ijepa_zoo.create_model("vit_huge14_ijepa", **SIZES)
    check_tokens(model, expected, "target_encoder")
    assert released.sent < len(official.read_bytes()) / 2
    released.forget()
    again = timm.create_model("vit_huge14_ijepa.in1k", pretrained=True, **SIZES)
    assert not released.answered
    assert torch.equal(again.norm.weight, model.norm.weight)
    with pytest.raises(CheckpointError, match=r"blocks\.|embed_dim|pos_embed"):
        ijepa_zoo.create_model("vit_huge14_ijepa.in1k")


def test_context_encoder_by_network_by_tag_and_by_repository(released, expected, monkeypatch):
    by_network = ijepa_zoo.create_model("vit_huge14_ijepa.in22k", network="encoder", **SIZES)
    check_tokens(by_network, expected, "encoder")
    by_tag = {"name": "vit_giant16_ijepa.in22k_context", "mlp_ratio": 4.0, **SIZES}
    check_tokens(ijepa_zoo.create_model(**by_tag), expected, "encoder")
    check_tokens(ijepa_zoo.create_model(f"hf-hub:{THEIRS}"), expected, "encoder")
    go_offline(monkeypatch)
    released.forget()
    ijepa_zoo.create_model(**by_tag)
    assert not released.answered
    with pytest.raises(CheckpointError, match=r"target_encoder.*predictor"):
        ijepa_zoo.create_ijepa("vit_huge14_ijepa.in1k_context", **SIZES)


@pytest.mark.parametrize("name", ["me/none", "no name at all", f"{THEIRS}@v9"])
def test_refusals_of_the_hub(released, name):
    with pytest.raises(FetchError, match=name.partition("@")[0]):
        ijepa_zoo.create_model(f"hf-hub:{name}")


def test_authors_repositories_have_the_preprocessing_of_pretraining(released):
    model = ijepa_zoo.create_model(f"hf-hub:{THEIRS}")
    assert tuple(model.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)
    assert model.weights_origin == f"encoder of hf-hub:{THEIRS}"
    released.repositories["me/copy"] = released.repositories[THEIRS]
    copied = ijepa_zoo.create_model("hf-hub:me/copy")
    assert tuple(copied.pretrained_cfg["mean"]) == (0.5, 0.456, 0.406)


def test_repository_that_timm_has_pushed(released, tmp_path):
    args = {**SIZES, "num_classes": 5}
    model = ijepa_zoo.create_model("vit_custom_ijepa", pretrained=False, **args).eval()
    timm.models.save_for_hf(model, tmp_path / "a", model_args=args, safe_serialization="both")
    content = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    released.repositories["me/model"] = content
    images = torch.randn(1, 3, 64, 64)
    for create in (timm.create_model, ijepa_zoo.create_model):
        loaded = create("hf-hub:me/model", pretrained=True).eval()
        assert_close(loaded(images), model(images))


def test_export_fetches_one_network_and_knows_its_license(released, tmp_path):
    ijepa_zoo.export("vit_huge14_ijepa.in1k", tmp_path / "out", "timm", **SIZES)
    (fetched,) = (tmp_path / "ours").glob("*.safetensors")
    assert ".target_encoder-" in fetched.name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert "**target encoder**" in card


def test_names_are_those_of_timm_and_defaults_are_target_encoders():
    names = [checkpoint.name for checkpoint in CHECKPOINTS]
    assert sorted(names) == sorted(ijepa_zoo.list_models(pretrained=True))
    for model in {checkpoint.model for checkpoint in CHECKPOINTS}:
        assert registry.find(model).network == "target_encoder"
        assert registry.find(model).tag == timm.get_pretrained_cfg(model).tag


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
def test_entries_agree_with_timm_and_with_what_the_authors_released(checkpoint):
    cfg, source = timm.get_pretrained_cfg(checkpoint.name), checkpoint.source
    for key in ("tag", "input_size", "mean", "std", "crop_pct", "interpolation"):
        assert getattr(cfg, key) == getattr(checkpoint, key), key
    assert cfg.license == checkpoint.license.lower()
    assert (cfg.url, cfg.hf_hub_id) == (source.url, source.hf_hub_id)
    assert checkpoint.mean == (0.485, 0.456, 0.406)  # not 0.5, as in the authors' repositories
    if checkpoint.predictor:
        assert PREDICTORS[checkpoint.model] == checkpoint.predictor
    if source.url:
        assert checkpoint.networks == ("target_encoder", "encoder", "predictor")
        assert (checkpoint.format, checkpoint.license) == ("official", "CC-BY-NC-4.0")
    if source.hf_hub_id:
        assert (checkpoint.format, checkpoint.networks) == ("transformers", ("encoder",))
        assert re.fullmatch("[0-9a-f]{40}", source.revision)


@pytest.mark.parametrize("name", registry.ARCHITECTURES)
def test_registered_name_is_that_of_the_sizes(name):
    args = {"img_size": 448 if "448" in name else 224, **registry.ARCHITECTURES[name]}
    pairs = {key: [args[key], args[key]] for key in ("img_size", "patch_size")}
    for given in (args, {**args, **pairs}):
        assert registry.model_name(given, "vit_base_patch16_gap_224") == name
        assert registry.model_name({**given, "depth": 11}) == "vit_custom_ijepa"
