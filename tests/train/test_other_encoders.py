"""Pretraining of timm's ViTs that are not I-JEPA's: class token, registers, learned positions."""

import pytest
import timm
import torch
from small_run import CONFIG, change, state, train
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError, SettingsError
from ijepa_zoo.train import export_run
from ijepa_zoo.train.networks import build_networks
from ijepa_zoo.train.optim import make_optimizer

DINOV2 = "vit_small_patch14_reg4_dinov2"  # class token and registers without positions, LayerScale
MAE = "vit_tiny_patch16_224"  # class token with a position
PARALLEL = "vit_small_patch16_18x2_224"  # other blocks
SIZES = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
CONFIG = change(CONFIG, model={"name": DINOV2, **SIZES})
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make(name, stir=0.3, **kwargs):
    model = timm.create_model(name, **{**SIZES, "num_classes": 0, **kwargs}).eval()
    with torch.no_grad():  # tokens of std 1e-6 and LayerScale of 1e-5 would hide everything
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * stir)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [(DINOV2, {}), (MAE, {}), (PARALLEL, {}), (MAE, {"pre_norm": True, "final_norm": False})],
)
@torch.no_grad()
def test_all_patches_are_the_patch_tokens_of_timm(name, options):
    vit = make(name, **options)
    tokens = vit.forward_features(IMAGES)[:, vit.num_prefix_tokens :]
    assert torch.equal(ijepa_zoo.encode_visible(vit, IMAGES), tokens)
    order = torch.randperm(64)
    shuffled = ijepa_zoo.encode_visible(vit, IMAGES, order.expand(2, -1))
    assert_close(shuffled, tokens[:, order])


@pytest.mark.parametrize("name", [DINOV2, MAE])
@torch.no_grad()
def test_some_patches_equal_a_forward_pass_that_does_not_attend_to_the_others(name):
    vit = make(name)
    keep = torch.stack([torch.randperm(64)[:9] for _ in range(4)])  # two contexts of each image
    tokens = ijepa_zoo.encode_visible(vit, IMAGES, keep)
    for row, visible in enumerate(keep):
        prefix = vit.num_prefix_tokens
        mask = torch.zeros(64 + prefix, dtype=torch.bool)
        mask[:prefix] = mask[prefix + visible] = True
        image = IMAGES[row // 2 : row // 2 + 1]
        masked = vit.forward_features(image, attn_mask=mask.expand(1, 1, len(mask), -1))
        assert_close(tokens[row], masked[0, prefix + visible])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "VisionTransformer"),
        ("vit_small_patch16_dinov3", "rotary"),
        ("vit_tiny_r_s16_p8_224", "grid"),
    ],
)
def test_other_networks_are_refused_by_name(name, reason):
    with pytest.raises(SettingsError, match=rf"{name}.*{reason}"):
        build_networks(change(CONFIG, model={"name": name}))
    with pytest.raises(SettingsError, match=rf"{name}.*{reason}"), torch.device("meta"):
        ijepa_zoo.encode_visible(timm.create_model(name), IMAGES)


def test_learned_positions_and_tokens_have_no_weight_decay():
    model = build_networks(CONFIG)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model.encoder, model.predictor)
    encoder, predictor, *exempt = (
        {names[parameter] for parameter in group["params"]} for group in optimizer.param_groups
    )
    tokens = {f"encoder.{name}" for name in ("pos_embed", "cls_token", "reg_token")}
    assert tokens <= exempt[0]
    assert not tokens & encoder
    assert "predictor.mask_token" in predictor


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "run"
    train(folder, CONFIG)
    return folder


def test_everything_of_the_encoder_is_trained(run):
    first, trained = build_networks(CONFIG).encoder.state_dict(), state(run)[0]
    for name in ("pos_embed", "cls_token", "reg_token", "blocks.1.ls1.gamma", "norm.weight"):
        assert not torch.equal(trained[f"encoder.{name}"], first[name])
        assert not torch.equal(trained[f"target_encoder.{name}"], first[name])


@torch.no_grad()
def test_stock_timm_opens_the_export(run, tmp_path):
    stock = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True).eval()
    assert stock.pretrained_cfg["architecture"] == DINOV2
    assert stock.pretrained_cfg["mean"] == list(CONFIG.data.mean)
    trained = state(run)[0]
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
    larger = ijepa_zoo.create_model(f"local-dir:{run}", img_size=96)
    assert larger.pos_embed.shape == (1, 144, 24)


def test_the_export_brings_all_three_networks_to_a_new_run(run, tmp_path, caplog):
    trained = state(run)[0]
    for init in (run, f"local-dir:{run / 'export'}"):
        model = build_networks(CONFIG, init)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, trained[name]), name
    assert "predictor is new" not in caplog.text
    named = change(CONFIG, model={"name": f"local-dir:{run / 'export'}"})
    assert build_networks(named).encoder.reg_token.shape == (1, 4, 24)
    larger = build_networks(change(CONFIG, model={"img_size": 96}), run / "export")
    assert larger.encoder.pos_embed.shape == (1, 144, 24)
    with pytest.raises(CheckpointError, match="num_heads"):
        build_networks(change(CONFIG, model={"num_heads": 4}), run)
    with pytest.raises(CheckpointError, match="cls_token"):
        build_networks(change(CONFIG, model={"name": "vit_nano8_64_ijepa"}), run / "export")
    for to in ("transformers", "official"):
        with pytest.raises(CheckpointError, match=DINOV2):
            export_run(run, tmp_path / to, to=to)


def test_a_vit_of_timm_starts_both_encoders_with_its_class_token(tmp_path, caplog):
    vit = make(DINOV2, img_size=48, num_classes=5)
    timm.models.save_for_hf(vit, tmp_path, model_args={**SIZES, "img_size": 48, "num_classes": 5})
    torch.save(vit.state_dict(), tmp_path / "own.pth")
    for init in (f"local-dir:{tmp_path}", tmp_path / "own.pth"):
        model = build_networks(CONFIG, init)
        for encoder in (model.encoder, model.target_encoder):
            assert torch.equal(encoder.cls_token, vit.cls_token)
            assert torch.equal(encoder.norm.weight, vit.norm.weight)
            assert encoder.pos_embed.shape == (1, 64, 24)
    assert caplog.text.count("predictor is new") == 2
    assert "class token" not in caplog.text
