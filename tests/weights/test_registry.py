"""checkpoints.json against timm's pretrained configs and what the authors released."""

import re

import pytest
import timm

import ijepa_zoo
from ijepa_zoo.weights import registry

CHECKPOINTS = registry.checkpoints()
RELEASED = {  # and the first three features of the first token, as the model cards have them
    "vit_huge14_ijepa.in1k": "IN1K-vit.h.14-300e",
    "vit_huge14_ijepa.in22k": "IN22K-vit.h.14-900e",
    "vit_huge16_448_ijepa.in1k": "IN1K-vit.h.16-448px-300e",
    "vit_giant16_ijepa.in22k": "IN22K-vit.g.16-600e",
    "vit_huge14_ijepa.in1k_context": ("facebook/ijepa_vith14_1k", [-0.0621, -0.0054, -2.7513]),
    "vit_huge14_ijepa.in22k_context": ("facebook/ijepa_vith14_22k", [0.0358, -0.0045, -0.2154]),
    "vit_huge16_448_ijepa.in1k_context": ("facebook/ijepa_vith16_1k", [0.5145, -0.1259, 0.0615]),
    "vit_giant16_ijepa.in22k_context": ("facebook/ijepa_vitg16_22k", [0.0512, -0.0510, -0.0649]),
}


def test_names_are_those_of_timm_and_defaults_are_target_encoders():
    names = [checkpoint.name for checkpoint in CHECKPOINTS]
    assert sorted(names) == sorted(ijepa_zoo.list_models(pretrained=True))
    for model in {checkpoint.model for checkpoint in CHECKPOINTS}:
        assert registry.find(model).network == "target_encoder"
        assert registry.find(model).tag == timm.get_pretrained_cfg(model).tag


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
def test_pretrained_cfg_of_timm(checkpoint):
    cfg = timm.get_pretrained_cfg(checkpoint.name)
    for key in ("tag", "input_size", "mean", "std", "crop_pct", "interpolation"):
        assert getattr(cfg, key) == getattr(checkpoint, key), key
    assert cfg.license == checkpoint.license.lower()
    assert (cfg.url, cfg.hf_hub_id) == (checkpoint.source.url, checkpoint.source.hf_hub_id)
    assert checkpoint.mean == (0.485, 0.456, 0.406)  # not 0.5, as in the authors' repositories


@pytest.mark.parametrize(("name", "released"), RELEASED.items())
def test_sources_are_what_the_authors_released(name, released):
    checkpoint = registry.find(*name.split("."))
    source = checkpoint.source
    if isinstance(released, str):
        assert source.url == f"https://dl.fbaipublicfiles.com/ijepa/{released}.pth.tar"
        assert set(checkpoint.networks) == set(registry.NETWORKS)
        assert (checkpoint.format, checkpoint.license) == ("official", "CC-BY-NC-4.0")
    else:
        assert (checkpoint.networks, checkpoint.format) == (("encoder",), "transformers")
        assert (source.hf_hub_id, checkpoint.check["tokens_0_3_0_3"][0]) == released
        assert re.fullmatch("[0-9a-f]{40}", source.revision)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_small16_ijepa", (384, 12, 6, 16, 224)),
        ("vit_huge16_448_ijepa", (1280, 32, 16, [16, 16], [448, 448])),
        ("vit_huge14_ijepa", (1280, 32, 16, [14, 14], [224, 224])),
        ("vit_custom_ijepa", (384, 11, 6, 16, 224)),
    ],
)
def test_registered_name_is_that_of_the_sizes(name, sizes):
    args = dict(zip(("embed_dim", "depth", "num_heads", "patch_size", "img_size"), sizes))
    assert registry.model_name(args) == name
    assert registry.model_name(args, "vit_base_patch16_gap_224") == name
