"""Released weights end to end: the real names and code against a local server, small files."""

from dataclasses import replace

import pytest
import timm
import torch
from file_server import FileServer, Repository, isolate, point_hub_at

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError
from ijepa_zoo.weights import registry

SIZES = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def released(official, monkeypatch, tmp_path):
    """A server with a small file in the place of each released one, and a registry of them."""
    isolate(monkeypatch)
    monkeypatch.setenv("IJEPA_ZOO_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = ijepa_zoo.export(
        official,
        tmp_path / "transformers",
        "transformers",
        network="encoder",
        model_name="vit_tiny16_ijepa",
        **{key: SIZES[key] for key in ("img_size", "embed_dim", "depth", "num_heads")},
    )
    with FileServer() as server:
        point_hub_at(server, monkeypatch)
        server.files["/ijepa/official.pth.tar"] = official.read_bytes()
        content = {file.name: file.read_bytes() for file in folder.iterdir()}
        records = []
        for record in registry.checkpoints():
            source = record.source
            if source.url:
                source = replace(source, url=f"{server.url}/ijepa/official.pth.tar")
            elif source.hf_hub_id:
                repository = server.repositories[source.hf_hub_id] = Repository(content)
                source = replace(source, revision=repository.commit)
            records.append(replace(record, source=source))
        monkeypatch.setattr(registry, "checkpoints", lambda: tuple(records))
        yield server


def test_the_default_is_the_target_encoder_and_little_travels(released, official, expected):
    released.forget()
    model = ijepa_zoo.create_model("vit_huge14_ijepa", **SIZES)
    assert relative(model.encode(expected["input"]), expected["target_encoder"]) < 2e-6
    assert released.sent < len(official.read_bytes()) / 2  # the optimizer stayed where it was
    released.forget()
    again = timm.create_model("vit_huge14_ijepa.in1k", pretrained=True, **SIZES)
    assert released.answered == []
    assert torch.equal(again.norm.weight, model.norm.weight)


def test_network_by_name(released, expected):
    model = ijepa_zoo.create_model("vit_huge14_ijepa.in22k", network="encoder", **SIZES)
    assert relative(model.encode(expected["input"]), expected["encoder"]) < 2e-6


def test_context_tag_comes_through_the_hub(released, expected, monkeypatch):
    model = ijepa_zoo.create_model("vit_giant16_ijepa.in22k_context", mlp_ratio=4.0, **SIZES)
    assert relative(model.encode(expected["input"]), expected["encoder"]) < 2e-6
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    released.forget()
    ijepa_zoo.create_model("vit_giant16_ijepa.in22k_context", mlp_ratio=4.0, **SIZES)
    assert released.answered == []


def test_hub_repository_by_name(released, expected):
    name = "hf-hub:facebook/ijepa_vith14_1k"
    model = ijepa_zoo.create_model(name)  # the architecture comes from config.json
    assert relative(model.encode(expected["input"]), expected["encoder"]) < 2e-6


def test_all_three_networks(released, official, expected):
    sizes = {"predictor_embed_dim": 24, "predictor_depth": 2}
    ijepa = ijepa_zoo.create_ijepa("vit_huge14_ijepa", **sizes, **SIZES)
    images = expected["input"]
    assert relative(ijepa.encoder.encode(images), expected["encoder"]) < 2e-6
    assert relative(ijepa.target_encoder.encode(images), expected["target_encoder"]) < 2e-6
    saved = torch.load(official, weights_only=True)["predictor"]
    for name, tensor in ijepa.predictor.state_dict().items():
        assert torch.equal(tensor, saved[f"module.{name}"]), name


def test_all_three_networks_are_not_in_the_hub_file(released):
    with pytest.raises(CheckpointError, match="no target_encoder and no predictor"):
        ijepa_zoo.create_ijepa("vit_huge14_ijepa.in1k_context", **SIZES)


def test_convert_fetches_one_network_only(released, tmp_path):
    released.forget()
    ijepa_zoo.export("vit_huge14_ijepa.in1k", tmp_path / "out", "timm", **SIZES)
    fetched = list((tmp_path / "ours").glob("*.safetensors"))
    assert [".target_encoder-" in path.name for path in fetched] == [True]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "CC-BY-NC-4.0" in card
    assert "target encoder" in card


def test_wrong_size_names_the_tensor(released):
    with pytest.raises(CheckpointError, match=r"pos_embed|embed_dim|lacks blocks"):
        ijepa_zoo.create_model("vit_huge14_ijepa.in1k")
