import copy
import json
import re

import pytest
import timm

import ijepa_zoo
from ijepa_zoo.weights import registry

RECORDS = registry.checkpoints()
RELEASED = {
    "vit_huge14_ijepa.in1k": ((3, 224, 224), "IN1K-vit.h.14-300e.pth.tar"),
    "vit_huge14_ijepa.in22k": ((3, 224, 224), "IN22K-vit.h.14-900e.pth.tar"),
    "vit_huge16_448_ijepa.in1k": ((3, 448, 448), "IN1K-vit.h.16-448px-300e.pth.tar"),
    "vit_giant16_ijepa.in22k": ((3, 224, 224), "IN22K-vit.g.16-600e.pth.tar"),
}
REPOSITORIES = {  # and the first three features of the first token, as published
    "vit_huge14_ijepa.in1k_context": ("facebook/ijepa_vith14_1k", [-0.0621, -0.0054, -2.7513]),
    "vit_huge14_ijepa.in22k_context": ("facebook/ijepa_vith14_22k", [0.0358, -0.0045, -0.2154]),
    "vit_huge16_448_ijepa.in1k_context": ("facebook/ijepa_vith16_1k", [0.5145, -0.1259, 0.0615]),
    "vit_giant16_ijepa.in22k_context": ("facebook/ijepa_vitg16_22k", [0.0512, -0.0510, -0.0649]),
}


def test_file_has_nothing_but_format_and_entries():
    content = json.loads(registry.registry_file().read_text(encoding="utf-8"))
    assert set(content) == {"version", "checkpoints"}
    assert len(content["checkpoints"]) == len(RECORDS) == len({record.name for record in RECORDS})


def test_registry_and_file_are_equal_both_ways():
    listed = set(ijepa_zoo.list_models(pretrained=True))
    assert listed == {record.name for record in RECORDS}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_timm_describes_an_entry_as_the_file_does(record):
    assert timm.is_model(record.model)
    cfg = timm.get_pretrained_cfg(record.name)
    assert cfg.tag == record.tag
    assert tuple(cfg.input_size) == record.input_size
    assert tuple(cfg.mean) == record.mean
    assert tuple(cfg.std) == record.std
    assert cfg.crop_pct == record.crop_pct
    assert cfg.interpolation == record.interpolation
    assert cfg.license == record.license.lower()
    assert cfg.url == record.source.url
    assert cfg.hf_hub_id == record.source.hf_hub_id
    assert record.network in cfg.description
    assert record.data in cfg.description


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_model_of_an_entry_takes_its_images(record):
    model = timm.create_model(record.name, device="meta")
    assert tuple(model.patch_embed.img_size) == record.input_size[1:]
    if record.predictor:
        ijepa = ijepa_zoo.create_ijepa(record.model, pretrained=False, device="meta")
        assert ijepa.predictor.mask_token.shape[-1] == record.predictor["embed_dim"]
        assert len(ijepa.predictor.predictor_blocks) == record.predictor["depth"]


def test_official_files_hold_all_networks_and_load_the_target_encoder():
    for name, (size, file) in RELEASED.items():
        record = registry.find(*name.split("."))
        assert record.network == "target_encoder"
        assert set(record.networks) == set(registry.NETWORKS)
        assert record.format == "official"
        assert record.input_size == size
        assert record.source.url == f"https://dl.fbaipublicfiles.com/ijepa/{file}"
        assert record.license == "CC-BY-NC-4.0"
        assert record.mean == (0.485, 0.456, 0.406)
        assert record.std == (0.229, 0.224, 0.225)


def test_hub_repositories_hold_the_context_encoder_and_check_values():
    for name, (repository, first) in REPOSITORIES.items():
        record = registry.find(*name.split("."))
        assert record.network == "encoder"
        assert record.networks == ("encoder",)
        assert record.format == "transformers"
        assert record.source.hf_hub_id == repository
        assert record.source.filename == "model.safetensors"
        assert re.fullmatch("[0-9a-f]{40}", record.source.revision)
        assert record.mean == (0.485, 0.456, 0.406)  # not the repository's own 0.5
        values = record.check["tokens_0_3_0_3"]
        assert [len(row) for row in values] == [3, 3, 3]
        assert values[0] == first


def test_default_entry_of_every_model_is_a_target_encoder():
    for model in {record.model for record in RECORDS}:
        assert registry.find(model).network == "target_encoder"
        assert registry.find(model).name == timm.get_pretrained_cfg(model).architecture + (
            "." + timm.get_pretrained_cfg(model).tag
        )
    assert registry.find("vit_huge14_ijepa", "in2k") is None
    assert registry.find("vit_tiny16_ijepa") is None


GOOD = json.loads(registry.registry_file().read_text(encoding="utf-8"))["checkpoints"][1]


def _without(key):
    entry = copy.deepcopy(GOOD)
    del entry[key]
    return entry


BAD = {
    **{f"no {key}": _without(key) for key in ("source", "license", "mean", "networks", "format")},
    "unknown field": {**GOOD, "colour": "red"},
    "unknown field of the source": {**GOOD, "source": {**GOOD["source"], "mirror": "x"}},
    "unknown layout": {**GOOD, "format": "keras"},
    "unknown network": {**GOOD, "networks": ["target_encoder", "decoder"]},
    "network that the source has not": {**GOOD, "networks": ["encoder"]},
    "no place": {**GOOD, "source": {}},
    "two places": {**GOOD, "source": {"url": "https://a", "hf_hub_id": "a/b"}},
    "source is no object": {**GOOD, "source": "https://a"},
}


@pytest.mark.parametrize("entry", BAD.values(), ids=BAD.keys())
def test_bad_entries_are_refused_by_name(entry):
    with pytest.raises(ValueError, match=rf"entry {GOOD['model']}\.{GOOD['tag']}: "):
        registry.parse(entry)


def test_good_entry_is_parsed():
    record = registry.parse(GOOD)
    assert record.name == f"{GOOD['model']}.{GOOD['tag']}"
    assert record.input_size == tuple(GOOD["input_size"])
