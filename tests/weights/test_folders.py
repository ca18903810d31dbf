"""Folders of timm, transformers, earlier versions and pretraining runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError
from ijepa_zoo.weights import registry

TINY = {"embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": 32}
EXPORTS_0_1 = Path(__file__).parent / "exports_0_1"


def stir(model):
    with torch.no_grad():  # std 0.02 makes a nearly linear network
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


# --- timm


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize(("name", "size"), [("vit_tiny16_ijepa", {}), ("vit_custom_ijepa", TINY)])
@torch.no_grad()
def test_timm_saves_our_encoder_and_both_load_it(tmp_path, name, size, num_classes):
    args = {"img_size": 32, **size, "num_classes": num_classes}
    model = stir(ijepa_zoo.create_model(name, pretrained=False, **args))
    timm.models.save_for_hf(model, tmp_path, model_args=args, safe_serialization="both")
    images = torch.randn(2, 3, 32, 32)
    for create in (timm.create_model, ijepa_zoo.create_model):
        loaded = create(f"local-dir:{tmp_path}", pretrained=True)
        assert loaded.pretrained_cfg["architecture"] == name
        assert_close(loaded.eval()(images), model(images))


def test_timm_records_the_arguments_and_loads_the_newer_weights(official, tiny, tmp_path):
    for make in (timm.create_model, ijepa_zoo.create_model):
        model = make("vit_tiny16_ijepa", checkpoint=str(official), network="encoder", **tiny)
        if not hasattr(model, "_model_args"):
            pytest.skip("this version of timm does not record them")
        timm.models.save_for_hf(stir(model), tmp_path)
        for create in (timm.create_model, ijepa_zoo.create_model):
            loaded = create(f"local-dir:{tmp_path}", pretrained=True)
            assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert str(official) not in (tmp_path / "config.json").read_text()  # the second one's


@torch.no_grad()
def test_stock_timm_folder_loads(tmp_path):
    args = {**TINY, "class_token": False, "fc_norm": False, "num_classes": 0}
    stock = stir(timm.create_model("vit_base_patch16_gap_224", **args))
    timm.models.save_for_hf(stock, tmp_path, model_args=args)
    images = torch.randn(2, 3, 32, 32)
    tokens = ijepa_zoo.create_model(f"local-dir:{tmp_path}").eval().encode(images)
    assert_close(tokens, stock.forward_features(images), rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("is_safe", [True, False])
@torch.no_grad()
def test_sharded_transformers_folder(ijepa_model, tmp_path, is_safe):
    theirs, images = ijepa_model(max_shard_size="20KB"), torch.randn(2, 3, 32, 32)
    shards = [*(tmp_path / "theirs").glob("*.safetensors")]
    assert len(shards) > 2
    if not is_safe:  # as older versions wrote them
        index = (tmp_path / "theirs/model.safetensors.index.json").read_text()
        for path in shards:
            torch.save(load_file(path), path.with_suffix(".bin"))
        for path in (tmp_path / "theirs").glob("*.safetensors*"):
            path.unlink()
        index = index.replace(".safetensors", ".bin")
        (tmp_path / "theirs/pytorch_model.bin.index.json").write_text(index)
    tokens = ijepa_zoo.create_model(f"local-dir:{tmp_path / 'theirs'}").eval().encode(images)
    assert_close(tokens, theirs(images).last_hidden_state, rtol=1e-4, atol=1e-5)


# --- names and labels


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_small16_ijepa", (384, 12, 6, 16, 224)),
        ("vit_huge16_448_ijepa", (1280, 32, 16, 16, 448)),
        ("vit_huge14_ijepa", (1280, 32, 16, 14, 224)),
        ("vit_custom_ijepa", (384, 11, 6, 16, 224)),
    ],
)
def test_registered_name_is_that_of_the_sizes(name, sizes):
    keys = ("embed_dim", "depth", "num_heads", "patch_size", "img_size")
    assert registry.model_name(dict(zip(keys, sizes))) == name
    pairs = [[size, size] if size in (14, 16, 224, 448) else size for size in sizes]
    args = {**dict(zip(keys, pairs)), "num_heads": sizes[2]}
    assert registry.model_name(args, "vit_base_patch16_gap_224") == name


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_card_of_a_copy_has_the_name_and_claims_no_network(ijepa_model, tmp_path, library):
    sizes = {"embed_dim": 128, "depth": 6, "num_heads": 4, "patch_size": 8, "img_size": 64}
    if library == "timm":
        args = {**sizes, "class_token": False, "fc_norm": False, "num_classes": 0}
        stock = timm.create_model("vit_base_patch16_gap_224", **args)
        timm.models.save_for_hf(stock, tmp_path / "theirs", model_args=args)
    else:
        ijepa_model(
            **{"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4},
            **{"intermediate_size": 512, "patch_size": 8, "image_size": 64, "layer_norm_eps": 1e-6},
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
    ("folder", "change", "named"),
    [
        ("native", {"ijepa_zoo": {"networks": [1]}}, r"config\.json"),
        ("native", {"ijepa_zoo": "classifier", "encoder": "vit_x"}, "vit_x"),
        ("timm", {"model_args": {"checkpoint_path": "a.pth"}}, "checkpoint_path"),
        ("timm", {"architecture": "resnet50"}, "resnet50"),
        ("transformers", {"hidden_act": "relu"}, "relu"),
        ("transformers", {"model_type": "vit"}, "model_type"),
        ("transformers", {"hidden_size": None}, "hidden_size"),
    ],
)
def test_configs_of_other_models_are_refused(tmp_path, folder, change, named):
    shutil.copytree(EXPORTS_0_1 / folder, tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    config = {key: value for key, value in {**config, **change}.items() if value is not None}
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"/bad\b.*{named}"):
        ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=tmp_path / "bad")


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


@torch.no_grad()
def test_architecture_of_timm_gives_the_number_of_heads(tmp_path):
    """timm's vit_base_patch16_gap_224 has 16 heads, which no shape tells."""
    small = {"img_size": 32, "num_classes": 0}
    stock = stir(timm.create_model("vit_base_patch16_gap_224", **small, depth=1))
    timm.models.save_for_hf(stock, tmp_path / "stock", model_args={"img_size": 32, "depth": 1})
    model = ijepa_zoo.create_model(f"local-dir:{tmp_path / 'stock'}").eval()
    assert model.blocks[0].attn.num_heads == stock.blocks[0].attn.num_heads == 16


def test_official_export_is_read_as_a_folder(official, tiny, tmp_path):
    folder = ijepa_zoo.export(
        official, tmp_path / "official", "official", model_name="vit_tiny16_ijepa", **tiny
    )
    model = ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=folder, **tiny)
    assert model.weights_origin.startswith("target encoder of")
