"""checkpoints.json against timm's pretrained configs and what the authors released."""

import re

import pytest
import timm

import ijepa_zoo
from ijepa_zoo.weights import registry

CHECKPOINTS = registry.checkpoints()
OFFICIAL = {
    "vit_huge14_ijepa.in1k": "IN1K-vit.h.14-300e.pth.tar",
    "vit_huge14_ijepa.in22k": "IN22K-vit.h.14-900e.pth.tar",
    "vit_huge16_448_ijepa.in1k": "IN1K-vit.h.16-448px-300e.pth.tar",
    "vit_giant16_ijepa.in22k": "IN22K-vit.g.16-600e.pth.tar",
}
REPOSITORIES = {  # and the first three features of the first token, as the model cards have them
    "vit_huge14_ijepa.in1k_context": ("facebook/ijepa_vith14_1k", [-0.0621, -0.0054, -2.7513]),
    "vit_huge14_ijepa.in22k_context": ("facebook/ijepa_vith14_22k", [0.0358, -0.0045, -0.2154]),
    "vit_huge16_448_ijepa.in1k_context": ("facebook/ijepa_vith16_1k", [0.5145, -0.1259, 0.0615]),
    "vit_giant16_ijepa.in22k_context": ("facebook/ijepa_vitg16_22k", [0.0512, -0.0510, -0.0649]),
}


def test_names_and_defaults():
    names = [checkpoint.name for checkpoint in CHECKPOINTS]
    assert len(set(names)) == len(names)
    assert set(names) == set(ijepa_zoo.list_models(pretrained=True))
    for model in {checkpoint.model for checkpoint in CHECKPOINTS}:
        assert registry.find(model).network == "target_encoder"
        assert registry.find(model).tag == timm.get_pretrained_cfg(model).tag
    assert registry.find("vit_huge14_ijepa", "in2k") is None


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
def test_pretrained_cfg_and_sizes(checkpoint):
    cfg = timm.get_pretrained_cfg(checkpoint.name)
    for key in ("tag", "input_size", "mean", "std", "crop_pct", "interpolation"):
        assert getattr(cfg, key) == getattr(checkpoint, key), key
    assert cfg.license == checkpoint.license.lower()
    assert (cfg.url, cfg.hf_hub_id) == (checkpoint.source.url, checkpoint.source.hf_hub_id)
    assert cfg.description.startswith(f"{checkpoint.network} of I-JEPA, {checkpoint.data}")
    assert checkpoint.mean == (0.485, 0.456, 0.406)  # not 0.5, as in the authors' repositories
    assert checkpoint.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("name", ["vit_nano8_64_ijepa", "vit_huge16_448_ijepa"])
def test_predictor_of_a_name_is_that_of_its_weights(name):
    checkpoint = registry.find(name)
    ijepa = ijepa_zoo.create_ijepa(name, pretrained=False, device="meta")
    assert tuple(ijepa.encoder.patch_embed.img_size) == checkpoint.input_size[1:]
    assert ijepa.predictor.mask_token.shape[-1] == checkpoint.predictor["embed_dim"]
    assert len(ijepa.predictor.predictor_blocks) == checkpoint.predictor["depth"]


@pytest.mark.parametrize(("name", "file"), OFFICIAL.items())
def test_official_files_have_all_networks(name, file):
    checkpoint = registry.find(*name.split("."))
    assert checkpoint.source.url == f"https://dl.fbaipublicfiles.com/ijepa/{file}"
    assert set(checkpoint.networks) == set(registry.NETWORKS)
    assert (checkpoint.format, checkpoint.license) == ("official", "CC-BY-NC-4.0")


@pytest.mark.parametrize(("name", "source"), REPOSITORIES.items())
def test_repositories_have_the_context_encoder(name, source):
    checkpoint = registry.find(*name.split("."))
    assert (checkpoint.networks, checkpoint.format) == (("encoder",), "transformers")
    assert checkpoint.source.hf_hub_id == source[0]
    assert re.fullmatch("[0-9a-f]{40}", checkpoint.source.revision)
    assert checkpoint.check["tokens_0_3_0_3"][0] == source[1]
