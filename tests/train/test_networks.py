"""What the networks of a run start from: other encoders, timm's ViTs, other shapes."""

import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_run import CONFIG, change, pictures, state, train
from timm.data import create_transform as timm_transform
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.data import open_images
from ijepa_zoo.errors import CheckpointError, SettingsError
from ijepa_zoo.train import Trainer, export_run
from ijepa_zoo.train.networks import build_networks

SIZES = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def vit(**kwargs):
    model = VisionTransformer(**{"num_classes": 0, **SIZES, **kwargs})
    torch.nn.init.normal_(model.pos_embed)
    return model


def check_start(init, encoder, caplog):
    """Both encoders are `encoder`, and the predictor is that of a random start."""
    model, fresh = build_networks(CONFIG, init), build_networks(CONFIG)
    for own in (model.encoder, model.target_encoder):
        assert all(torch.equal(value, encoder[name]) for name, value in own.state_dict().items())
    for own, other in zip(model.predictor.parameters(), fresh.predictor.parameters()):
        assert torch.equal(own, other)
    assert model.encoder.norm.weight.data_ptr() != model.target_encoder.norm.weight.data_ptr()
    assert "predictor is new" in caplog.text


@pytest.mark.parametrize("to", ["transformers", "timm", "native"])
def test_start_from_an_encoder_alone(to, tmp_path, caplog):
    model = ijepa_zoo.create_model("vit_nano8_64_ijepa", pretrained=False, **SIZES)
    folder = ijepa_zoo.export(model, tmp_path / "encoder", to)
    check_start(folder, model.state_dict(), caplog)


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_class_token_and_classifier_of_a_plain_vit_are_dropped(no_embed_class, tmp_path, caplog):
    model = vit(no_embed_class=no_embed_class, num_classes=3)
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    state = model.state_dict()
    state["pos_embed"] = state["pos_embed"][:, 0 if no_embed_class else 1 :]
    check_start(tmp_path / "mae.pth", state, caplog)
    assert "class token is dropped" in caplog.text
    assert caplog.text.count("classifier is dropped") == 1


@pytest.mark.parametrize("pooling", [{}, {"global_pool": "avg"}, {"global_pool": "map"}])
def test_start_from_a_vit_of_timm_by_name(pooling, monkeypatch, caplog):
    model, create = vit(**pooling), timm.create_model
    torch.nn.init.normal_((model.fc_norm if pooling == {"global_pool": "avg"} else model.norm).bias)
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": CONFIG.data.std}

    def create_model(name, **kwargs):
        return model if name.startswith("vit_tiny_patch16_224") else create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    state = {name.replace("fc_norm", "norm"): value for name, value in model.state_dict().items()}
    state["pos_embed"] = state["pos_embed"][:, 1:]
    check_start("vit_tiny_patch16_224.augreg_in21k", state, caplog)
    assert "data.mean=0.5,0.5,0.5" in caplog.text  # another normalization than the run's


def test_start_from_a_run_at_another_size_with_other_channels_and_from_a_seed(whole):
    model, data = {"img_size": 48, "patch_size": 6, "in_chans": 1}, {"mean": (0.5,), "std": (0.2,)}
    networks = build_networks(change(CONFIG, model=model, data=data), whole)
    assert networks.encoder.patch_embed.proj.weight.shape == (24, 1, 6, 6)
    assert networks.encoder.pretrained_cfg["mean"] == (0.5,)
    trained = state(whole)[0]["encoder.norm.bias"]
    assert torch.equal(networks.encoder.norm.bias, trained)
    one, other = (build_networks(change(CONFIG, seed=seed)).encoder for seed in (0, 1))
    assert not torch.equal(one.patch_embed.proj.weight, other.patch_embed.proj.weight)


def test_normalization_and_predictor_of_weights_are_those_of_the_settings(whole, caplog):
    build_networks(change(CONFIG, data={"std": (0.2,)}), whole)
    assert "data.std=0.229,0.224,0.225" in caplog.text
    assert "data.mean" not in caplog.text
    caplog.clear()
    build_networks(CONFIG, whole)
    assert not caplog.text
    model = {"predictor_embed_dim": None, "predictor_depth": None}
    with pytest.raises(SettingsError, match=r"predictor_embed_dim=12 model\.predictor_depth=1"):
        build_networks(change(CONFIG, model=model), whole)


def test_what_does_not_fit_the_model_is_refused(tmp_path):
    for part, named in (({"reg_tokens": 2}, "reg_token"), ({"init_values": 1e-5}, "ls1")):
        torch.save(vit(**part).state_dict(), tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=rf"other.pth.*{named}"):
            build_networks(CONFIG, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"model\.name=vit_huge14_ijepa"):
        build_networks(CONFIG, "vit_huge14_ijepa.in1k")
    with pytest.raises(SettingsError, match=r"data\.mean has 2 values for images of 3 channels"):
        build_networks(change(CONFIG, data={"mean": (0.5, 0.5)}))
    for name, reason in (
        ("swin_tiny_patch4_window7_224", "VisionTransformer"),
        ("vit_small_patch16_dinov3", "rotary"),
        ("vit_tiny_r_s16_p8_224", "grid"),
    ):
        with pytest.raises(SettingsError, match=rf"{name}.*{reason}"):
            build_networks(change(CONFIG, model={"name": name}))


# --- images of another shape than a square


def test_masks_and_export_have_the_grid_of_wide_images(tmp_path):
    size, grid = (48, 64), (6, 8)
    images, optim = pictures()[:, 8:56], {"duration": "2 steps", "warmup": "1 steps"}
    wide = change(CONFIG, model={"img_size": size}, data={"crop_ratio": (1, 16 / 9)}, optim=optim)
    trainer = Trainer(wide, open_images(images))
    assert "48x64" in str(trainer)
    (batch, *_), *_ = trainer.batches()
    assert batch.images.shape[-2:] == trainer.monitor()[0].images.shape[-2:] == size
    assert max(batch.context.max(), batch.targets.max()) < math.prod(grid)
    for block in batch.targets.flatten(0, 1):  # rectangles: rows of neighbors in a grid 8 wide
        rows, columns = block // grid[1], block % grid[1]
        assert len(block) == len(rows.unique()) * len(columns.unique())
    run = tmp_path / "run"
    train(run, wide, images)
    model = ijepa_zoo.create_model(f"local-dir:{run}").eval()
    photo = np.random.default_rng(1).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    pixels = ijepa_zoo.create_transform(model)(Image.fromarray(photo))
    assert pixels.shape == (3, *size)
    theirs = timm_transform(**resolve_model_data_config(model), is_training=False)
    assert torch.allclose(pixels, theirs(Image.fromarray(photo)), atol=1e-6)
    for to in ("timm", "native"):
        folder = export_run(run, tmp_path / to, to=to)
        opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert opened.patch_embed.grid_size == grid
        assert torch.equal(opened(pixels[None]), model(pixels[None]))
        assert tuple(resolve_model_data_config(opened)["input_size"]) == (3, *size)
    with pytest.raises(CheckpointError, match="48x64"):
        export_run(run, tmp_path / "transformers", to="transformers")


# --- ViTs of timm that are not I-JEPA's: class token, registers, learned positions

DINOV2 = "vit_small_patch14_reg4_dinov2"  # class token and registers without positions, LayerScale
OTHER = change(CONFIG, model={"name": DINOV2, **SIZES})
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "run"
    train(folder, OTHER)
    return folder


@torch.no_grad()
def test_everything_is_trained_and_stock_timm_opens_the_export(run, tmp_path):
    first, trained = build_networks(OTHER).encoder.state_dict(), state(run)[0]
    for name in ("pos_embed", "cls_token", "reg_token", "blocks.1.ls1.gamma", "norm.weight"):
        assert not torch.equal(trained[f"encoder.{name}"], first[name])
        assert not torch.equal(trained[f"target_encoder.{name}"], first[name])
    stock = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True).eval()
    assert stock.pretrained_cfg["architecture"] == DINOV2
    assert stock.pretrained_cfg["mean"] == list(CONFIG.data.mean)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, trained[f"target_encoder.{name}"]), name
    tokens = stock.forward_features(IMAGES)[:, 5:]
    assert_close(stock(IMAGES), tokens.mean(1))
    ours = ijepa_zoo.create_model(f"local-dir:{run}").eval()
    assert torch.equal(ours.encode(IMAGES), tokens)
    assert_close(ijepa_zoo.FeatureExtractor(ours)(IMAGES), tokens.mean(1))
    export_run(run, tmp_path / "encoder", to="timm", network="encoder")
    context = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True)
    assert torch.equal(context.reg_token, trained["encoder.reg_token"])
    for to in ("transformers", "official"):
        with pytest.raises(CheckpointError, match=DINOV2):
            export_run(run, tmp_path / to, to=to)


def test_the_export_brings_all_three_networks_to_a_new_run(run, caplog):
    trained = state(run)[0]
    for init in (run, f"local-dir:{run / 'export'}"):
        model = build_networks(OTHER, init)
        assert all(torch.equal(value, trained[n]) for n, value in model.state_dict().items())
    assert "predictor is new" not in caplog.text
    named = change(OTHER, model={"name": f"local-dir:{run / 'export'}"})
    assert build_networks(named).encoder.reg_token.shape == (1, 4, 24)
    larger = build_networks(change(OTHER, model={"img_size": 96}), run / "export")
    assert larger.encoder.pos_embed.shape == (1, 144, 24)
    with pytest.raises(CheckpointError, match="num_heads"):
        build_networks(change(OTHER, model={"num_heads": 4}), run)
    with pytest.raises(CheckpointError, match="cls_token"):
        build_networks(change(OTHER, model={"name": "vit_nano8_64_ijepa"}), run / "export")
