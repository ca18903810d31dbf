"""checkpoints.json against timm's pretrained configs and what the authors released."""

import re

import pytest
import timm

import ijepa_zoo
from ijepa_zoo.weights import registry

CHECKPOINTS = registry.checkpoints()


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
    if source.url:
        assert checkpoint.networks == ("target_encoder", "encoder", "predictor")
        assert (checkpoint.format, checkpoint.license) == ("official", "CC-BY-NC-4.0")
    if source.hf_hub_id:
        assert (checkpoint.format, checkpoint.networks) == ("transformers", ("encoder",))
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
