"""Folders of timm, transformers, earlier versions and pretraining runs."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError

TINY = {"embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": 32}
EXPORTS_0_1 = Path(__file__).parent / "exports_0_1"


@pytest.mark.parametrize("make", [timm.create_model, ijepa_zoo.create_model])
def test_timm_records_the_arguments_and_loads_the_newer_weights(
    official, tiny, stir, tmp_path, make
):
    model = make("vit_tiny16_ijepa", checkpoint=str(official), network="encoder", **tiny)
    if not hasattr(model, "_model_args"):
        pytest.skip("this version of timm does not record them")
    timm.models.save_for_hf(stir(model), tmp_path)
    for create in (timm.create_model, ijepa_zoo.create_model):
        loaded = create(f"local-dir:{tmp_path}", pretrained=True)
        assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [{"img_size": 32, "depth": 1}, TINY])
@torch.no_grad()
def test_stock_timm_folder_loads(stir, tmp_path, sizes):
    """timm's vit_base_patch16_gap_224 has 16 heads, which no shape tells."""
    stock = stir(timm.create_model("vit_base_patch16_gap_224", num_classes=0, **sizes))
    timm.models.save_for_hf(stock, tmp_path, model_args=sizes)
    images = torch.randn(2, 3, 32, 32)
    tokens = ijepa_zoo.create_model(f"local-dir:{tmp_path}").eval().encode(images)
    assert_close(tokens, stock.forward_features(images), rtol=1e-5, atol=1e-5)


SMALL = {"size": {"height": 32, "width": 32}}
CENTER = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
CENTER |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(
    ("eps", "shards", "kind", "options"),
    [(1e-12, 1, "ViTImageProcessor", SMALL), (1e-2, 4, "BitImageProcessor", CENTER)],
)
@torch.no_grad()
def test_transformers_folder_gives_the_tokens_and_pixels_of_transformers(
    check_pixels, tmp_path, eps, shards, kind, options, caplog
):
    transformers = pytest.importorskip("transformers")
    config = transformers.IJepaConfig(
        **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32},
        **{"intermediate_size": 50, "initializer_range": 0.2, "layer_norm_eps": eps},
    )
    theirs = transformers.IJepaModel(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if shards > 1 else "1GB")
    processor = getattr(transformers, kind)(**options)
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    images = torch.randn(2, 3, 32, 32)
    by_name = {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 50 / 24, "img_size": 32}
    for model in (
        ijepa_zoo.create_model(f"local-dir:{tmp_path}"),
        ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=tmp_path, **by_name),
    ):
        assert model.norm.eps == model.blocks[0].norm1.eps == eps
        tokens = model.eval().encode(images)
        assert_close(tokens, theirs(images).last_hidden_state, rtol=1e-4, atol=1e-5)
        check_pixels(model, lambda image: processor(image, return_tensors="pt")["pixel_values"][0])
    assert ("mean 0.5" in caplog.text) is (options is SMALL)


def test_image_processors_of_older_versions_and_incomplete_ones(tmp_path):
    shutil.copytree(EXPORTS_0_1 / "transformers", tmp_path / "a")
    path, place = tmp_path / "a" / "preprocessor_config.json", f"local-dir:{tmp_path}/a"
    given = {"size": 20, "crop_size": 16, "do_center_crop": True, "resample": None}
    given |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    path.write_text(json.dumps(given))
    cfg = ijepa_zoo.create_model(place).pretrained_cfg
    assert (cfg["crop_pct"], cfg["crop_mode"]) == (0.8, "center")
    assert (cfg["mean"], cfg["interpolation"]) == ([0.1, 0.2, 0.3], "bilinear")
    for key, value in (("image_mean", None), ("resample", 9), ("size", {"edge": "x"})):
        path.write_text(json.dumps({**given, key: value}))
        with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json.*{key}"):
            ijepa_zoo.create_model(place)


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
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 4}
    with pytest.raises(CheckpointError, match=r"num_heads=2.*num_heads=4"):  # no shape tells
        ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=EXPORTS_0_1 / folder, **args)


def test_run_and_checkpoint_folders(tmp_path):
    run = tmp_path / "run"
    step = run / "checkpoints" / "step-00120"
    step.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    for folder, command in ((step, rf"{run} .*--step 120"), (run, f"{run}")):
        with pytest.raises(CheckpointError, match=f"ijepa-zoo export {command}"):
            ijepa_zoo.create_model(f"local-dir:{folder}")
    shutil.copytree(EXPORTS_0_1 / "native", run / "export")
    ijepa = ijepa_zoo.create_ijepa(f"local-dir:{run}")
    expected = load_file(EXPORTS_0_1 / "expected.safetensors")
    assert_close(ijepa.encoder.encode(expected["input"]), expected["encoder"])
    assert ijepa.predictor.mask_token.shape == (1, 1, 8)


@pytest.mark.parametrize(
    ("folder", "change", "named"),
    [
        ("native", {"ijepa_zoo": {"predictor": {"context": "shared"}}}, r"model\.safetensors"),
        ("native", {"ijepa_zoo": "classifier", "encoder": "vit_x"}, "vit_x"),
        ("timm", {"model_args": {"checkpoint_path": "a.pth"}}, "checkpoint_path"),
        ("timm", {"architecture": "resnet50"}, "resnet50"),
        ("transformers", {"hidden_act": "relu"}, "relu"),
        ("transformers", {"model_type": "vit"}, "model_type"),
        ("transformers", {"hidden_size": None}, "hidden_size"),
        ("native", "{", r"config\.json"),
        ("native", "[1]", r"config\.json"),
    ],
)
def test_configs_of_other_models_and_damaged_ones_are_refused(tmp_path, folder, change, named):
    shutil.copytree(EXPORTS_0_1 / folder, tmp_path / "bad")
    path = tmp_path / "bad" / "config.json"
    if isinstance(change, dict):
        config = {**json.loads(path.read_text()), **change}
        change = json.dumps({key: value for key, value in config.items() if value is not None})
    path.write_text(change)
    with pytest.raises(CheckpointError, match=rf"/bad\b.*{named}"):
        ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=tmp_path / "bad")
