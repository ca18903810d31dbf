"""Folders of timm, transformers, earlier versions and pretraining runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError

TINY = {"embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": 32}
EXPORTS_0_1 = Path(__file__).parent / "exports_0_1"


def stir(model):
    with torch.no_grad():  # std 0.02 makes a nearly linear network
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


# --- timm


@pytest.mark.parametrize("safe", [False, True, "both"])  # the last one is push_to_hf_hub's
@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize(
    ("name", "size"), [("vit_tiny16_ijepa", {"img_size": 64}), ("vit_custom_ijepa", TINY)]
)
@torch.no_grad()
def test_timm_saves_our_encoder_and_both_load_it(tmp_path, name, size, num_classes, safe):
    args = {**size, "num_classes": num_classes}
    model = stir(ijepa_zoo.create_model(name, pretrained=False, **args))
    timm.models.save_for_hf(model, tmp_path, model_args=args, safe_serialization=safe)
    images = torch.randn(2, 3, size["img_size"], size["img_size"])
    for create in (timm.create_model, ijepa_zoo.create_model):
        loaded = create(f"local-dir:{tmp_path}", pretrained=True)
        assert loaded.pretrained_cfg["architecture"] == name
        assert_close(loaded.eval()(images), model(images))


@pytest.mark.parametrize("make", [timm.create_model, ijepa_zoo.create_model])
def test_timm_records_the_arguments_and_loads_the_newer_weights(official, tiny, tmp_path, make):
    model = make("vit_tiny16_ijepa", checkpoint=str(official), network="encoder", **tiny)
    if not hasattr(model, "_model_args"):
        pytest.skip("this version of timm does not record them")
    stir(model)
    timm.models.save_for_hf(model, tmp_path)
    if make is ijepa_zoo.create_model:
        assert str(official) not in (tmp_path / "config.json").read_text()
    for create in (timm.create_model, ijepa_zoo.create_model):
        loaded = create(f"local-dir:{tmp_path}", pretrained=True)
        assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@torch.no_grad()
def test_stock_timm_folder_loads(tmp_path):
    args = {**TINY, "class_token": False, "fc_norm": False, "num_classes": 0}
    stock = stir(timm.create_model("vit_base_patch16_gap_224", **args))
    timm.models.save_for_hf(stock, tmp_path, model_args=args)
    images = torch.randn(2, 3, 32, 32)
    tokens = ijepa_zoo.create_model(f"local-dir:{tmp_path}").eval().encode(images)
    assert_close(tokens, stock.forward_features(images), rtol=1e-6, atol=1e-6)
    resnet = timm.create_model("resnet10t", pretrained=False)
    save_config_for_hf(resnet, tmp_path / "config.json", model_args={"in_chans": 3})
    with pytest.raises(CheckpointError, match=r"resnet10t"):
        ijepa_zoo.create_model(f"local-dir:{tmp_path}")


# --- transformers


@pytest.fixture
def ijepa_model(tmp_path):
    """Saves an IJepaModel of transformers to the folder 'theirs'."""
    transformers = pytest.importorskip("transformers")

    def save(max_shard_size="1GB", **kwargs):
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
        sizes |= {"intermediate_size": 50, "image_size": 32, "initializer_range": 0.2}
        model = transformers.IJepaModel(transformers.IJepaConfig(**{**sizes, **kwargs})).eval()
        model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
        return model

    return save


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])
@torch.no_grad()
def test_transformers_folder_gives_the_tokens_of_transformers(ijepa_model, tmp_path, eps):
    theirs, images = ijepa_model(layer_norm_eps=eps), torch.randn(2, 3, 32, 32)
    by_name = {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 50 / 24, "img_size": 32}
    for model in (
        ijepa_zoo.create_model(f"local-dir:{tmp_path / 'theirs'}"),
        ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=tmp_path / "theirs", **by_name),
    ):
        assert model.norm.eps == model.blocks[0].norm1.eps == eps
        tokens = model.eval().encode(images)
        assert_close(tokens, theirs(images).last_hidden_state, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sharded_transformers_folder(ijepa_model, tmp_path):
    theirs, images = ijepa_model(max_shard_size="20KB"), torch.randn(2, 3, 32, 32)
    assert len([*(tmp_path / "theirs").glob("*.safetensors")]) > 2
    tokens = ijepa_zoo.create_model(f"local-dir:{tmp_path / 'theirs'}").eval().encode(images)
    assert_close(tokens, theirs(images).last_hidden_state, rtol=1e-4, atol=1e-5)


# --- names and labels


@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "patch", "image"),
    [
        ("vit_small16_ijepa", 384, 12, 6, 16, 224),
        ("vit_base16_ijepa", 768, 12, 12, 16, 224),
        ("vit_huge16_448_ijepa", 1280, 32, 16, 16, 448),
        ("vit_huge14_ijepa", 1280, 32, 16, 14, 224),
        ("vit_custom_ijepa", 384, 11, 6, 16, 224),
    ],
)
def test_registered_name_is_that_of_the_sizes(
    tmp_path, library, name, width, depth, heads, patch, image
):
    if library == "timm":
        args = {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": patch}
        args |= {"img_size": image, "class_token": False, "fc_norm": False, "num_classes": 0}
        with torch.device("meta"):
            stock = timm.create_model("vit_base_patch16_gap_224", **args)
        save_config_for_hf(stock, tmp_path / "config.json", model_args=args)
    else:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
        sizes |= {"intermediate_size": 4 * width, "patch_size": patch, "image_size": image}
        transformers.IJepaConfig(**sizes).save_pretrained(tmp_path)
    model = ijepa_zoo.create_model(f"local-dir:{tmp_path}", pretrained=False, device="meta")
    assert model.pretrained_cfg["architecture"] == name
    assert model.patch_embed.img_size == (image, image)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_card_of_a_copy_has_the_name_and_claims_no_network(ijepa_model, tmp_path, library):
    sizes = {"embed_dim": 128, "depth": 6, "num_heads": 4, "patch_size": 8, "img_size": 64}
    if library == "timm":
        args = {**sizes, "class_token": False, "fc_norm": False, "num_classes": 0}
        stock = timm.create_model("vit_base_patch16_gap_224", **args)
        timm.models.save_for_hf(stock, tmp_path / "theirs", model_args=args)
    else:
        ijepa_model(
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=512,
            patch_size=8,
            image_size=64,
            layer_norm_eps=1e-6,
        )
    for to in ("native", "timm", "transformers"):
        card = (ijepa_zoo.export(tmp_path / "theirs", tmp_path / to, to) / "README.md").read_text()
        assert "# vit_nano8_64_ijepa\n" in card
        assert "target encoder" not in card.split("```")[0]
        ijepa_zoo.create_model(f"local-dir:{tmp_path / to}")


# --- exports of version 0.1


@pytest.mark.parametrize(
    ("folder", "network"),
    [("native", "target_encoder"), ("timm", "target_encoder"), ("transformers", "encoder")],
)
@torch.no_grad()
def test_exports_of_version_0_1_load(folder, network):
    expected = load_file(EXPORTS_0_1 / "expected.safetensors")
    model = ijepa_zoo.create_model(f"local-dir:{EXPORTS_0_1 / folder}").eval()
    assert model.weights_origin.startswith(f"{network.replace('_', ' ')} of ")
    assert_close(model.encode(expected["input"]), expected[network], rtol=1e-5, atol=1e-5)
    if folder == "native":
        ijepa = ijepa_zoo.create_ijepa(f"local-dir:{EXPORTS_0_1 / folder}")
        for name in ("encoder", "target_encoder"):
            tokens = getattr(ijepa, name).encode(expected["input"])
            assert_close(tokens, expected[name], rtol=1e-5, atol=1e-5)
        assert ijepa.predictor.mask_token.shape == (1, 1, 8)
        return
    other = {"encoder": "target_encoder", "target_encoder": "encoder"}[network]
    with pytest.raises(CheckpointError, match=f"'{other}'"):
        ijepa_zoo.create_model(f"local-dir:{EXPORTS_0_1 / folder}", network=other)


def test_network_in_the_header_of_a_file_of_version_0_1(tmp_path):
    state = load_file(EXPORTS_0_1 / "native" / "model.safetensors")
    save_file(state, tmp_path / "a.safetensors", metadata={"network": "encoder"})
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = ijepa_zoo.create_model(
        "vit_tiny16_ijepa", checkpoint=tmp_path / "a.safetensors", network="encoder", **args
    )
    assert model.weights_origin.startswith("encoder of ")


# --- configurations


@pytest.mark.parametrize(
    ("folder", "keys", "value"),
    [
        ("native", "model_args.num_classes", 1.5),
        ("native", "model_args.depth", [2]),
        ("native", "model_args.img_size", float("inf")),
        ("native", "model_args.checkpoint_path", "a.pth"),
        ("native", "pretrained_cfg.std", [1, 0, 1]),
        ("native", "ijepa_zoo.norm_eps", "small"),
        ("native", "ijepa_zoo.predictor.depth", 1.5),
        ("native", "ijepa_zoo.networks", [1]),
        ("native", "ijepa_zoo.networks.encoder", "../secret.safetensors"),
        ("timm", "num_classes", 1.5),
        ("timm", "model_args", [1]),
        ("timm", "model_args.mlp_ratio", float("nan")),
        ("timm", "pretrained_cfg.mean", "abc"),
        ("timm", "pretrained_cfg.input_size", [3]),
        ("timm", "pretrained_cfg.crop_pct", 0),
        ("transformers", "hidden_size", float("inf")),
        ("transformers", "image_size", [1, 2, 3]),
        ("transformers", "hidden_act", "relu"),
        ("transformers", "num_labels", 1.5),
        ("transformers", "model_type", "vit"),
        ("transformers", "patch_size", None),
    ],
)
def test_nonsense_in_a_config_is_refused_by_folder_and_key(tmp_path, folder, keys, value):
    shutil.copytree(EXPORTS_0_1 / folder, tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    if keys == "num_labels":
        config["architectures"] = ["IJepaForImageClassification"]
    *sections, key = keys.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[key] = value
    if keys == "num_classes":
        del config["model_args"]["num_classes"]
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    create = ijepa_zoo.create_ijepa if folder == "native" else ijepa_zoo.create_model
    named = {"encoder": "secret", "networks": r"config\.json", "image_size": "img_size"}
    named |= {"num_labels": "num_classes"}
    with pytest.raises(CheckpointError, match=rf"/bad\b.*{named.get(key, key)}"):
        create(f"local-dir:{tmp_path / 'bad'}")


@pytest.mark.parametrize("text", ["{", "[1]", "{}"])
def test_damaged_configs_are_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ijepa_zoo.create_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("folder", ["native", "timm", "transformers"])
def test_other_number_of_heads_is_refused(folder):
    """Shapes cannot tell."""
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1}
    with pytest.raises(CheckpointError, match=r"num_heads=2.*num_heads=4"):
        ijepa_zoo.create_model(
            "vit_tiny16_ijepa", checkpoint=EXPORTS_0_1 / folder, num_heads=4, **args
        )


# --- pretraining runs


def test_run_and_checkpoint_folders(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step-00120"
    step.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    run = re.escape(str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=rf"ijepa-zoo export {run} .*--step 120"):
        ijepa_zoo.create_model(f"local-dir:{step}")
    with pytest.raises(CheckpointError, match=rf"ijepa-zoo export {run}"):
        ijepa_zoo.create_model(f"local-dir:{tmp_path / 'run'}")
    shutil.copytree(EXPORTS_0_1 / "native", tmp_path / "run" / "export")
    ijepa_zoo.create_ijepa(f"local-dir:{tmp_path / 'run'}")


def test_architecture_of_timm_gives_the_number_of_heads(tmp_path):
    """timm's vit_base_patch16_gap_224 has 16 heads, which no shape tells."""
    stock = stir(timm.create_model("vit_base_patch16_gap_224", img_size=32, num_classes=0)).eval()
    sizes = {"img_size": 32}  # older versions of timm do not record it
    timm.models.save_for_hf(stock, tmp_path / "stock", model_args=sizes, safe_serialization=True)
    model = ijepa_zoo.create_model(f"local-dir:{tmp_path / 'stock'}").eval()
    assert model.blocks[0].attn.num_heads == stock.blocks[0].attn.num_heads == 16
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert_close(model(images), stock(images), rtol=1e-4, atol=1e-4)


def test_other_models_of_timm_are_refused_by_name(tmp_path):
    stock = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, depth=1)
    timm.models.save_for_hf(stock, tmp_path / "siglip")
    with pytest.raises(CheckpointError, match="siglip"):
        ijepa_zoo.create_model(f"local-dir:{tmp_path / 'siglip'}")


def test_official_export_is_read_as_a_folder(official, tiny, tmp_path):
    folder = ijepa_zoo.export(
        official, tmp_path / "official", "official", model_name="vit_tiny16_ijepa", **tiny
    )
    model = ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=folder, **tiny)
    assert model.weights_origin.startswith("target encoder of")
