"""FeatureExtractor against hooks on the blocks and against timm's own forward pass."""

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ijepa_zoo.errors import SettingsError
from ijepa_zoo.features import FeatureExtractor

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 2)}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def with_random_norms(model: Any) -> Any:
    """So that a norm that is left out, or done twice, shows."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def vit(**options: Any) -> VisionTransformer:
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3}
    heads = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    return with_random_norms(VisionTransformer(**{**sizes, **heads, **options}))


def block_outputs(model: Any) -> list[Tensor]:
    outputs: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _i, o: outputs.append(o)) for b in model.blocks]
    model.forward_features(IMAGES)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [("last", [4]), ("last4", [1, 2, 3, 4]), ([-1, 0], [0, 4]), ((3, -4), [1, 3])],
)
def test_blocks_are_normalized_then_pooled(layers: Any, blocks: list[int]) -> None:
    model = vit()
    outputs = block_outputs(model)
    expected = torch.cat([model.norm(outputs[b]).mean(1) for b in blocks], dim=1)
    for later in model.blocks[blocks[-1] + 1 :]:
        later.register_forward_hook(lambda *_: pytest.fail("a later block was run"))
    extractor = FeatureExtractor(model, layers)
    torch.testing.assert_close(extractor(IMAGES), expected)
    assert extractor.layers == blocks
    assert extractor.num_features == expected.shape[1] == 48 * len(blocks)


def test_class_token_and_mean_of_each_block() -> None:
    model = vit(class_token=True, reg_tokens=2, global_pool="token")
    outputs = [model.norm(output) for output in block_outputs(model)]
    expected = [part for o in outputs[-2:] for part in (o[:, 0], o[:, 3:].mean(1))]
    extractor = FeatureExtractor(model, [3, 4], pool="cls_avg")
    torch.testing.assert_close(extractor(IMAGES), torch.cat(expected, dim=1))
    assert extractor.num_features == 4 * 48
    cls = FeatureExtractor(model, [3, 4], pool="cls")(IMAGES)
    torch.testing.assert_close(cls, torch.cat(expected[::2], dim=1))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"img_size": (32, 64)}, (32, 64)),
        ({"dynamic_img_size": True, "class_token": True}, (24, 48)),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, (30, 45)),
    ],
)
def test_maps_of_rectangles_and_dynamic_sizes(options: Any, size: tuple[int, int]) -> None:
    model, images = vit(**options), torch.randn(2, 3, *size)
    tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
    got = FeatureExtractor(model, [0, -1], pool=None)(images)
    assert got.shape == (2, 96, *(-(-side // 8) for side in size))
    torch.testing.assert_close(got[:, 48:].flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("vit_tiny_patch16_224", "cls"),
        ("vit_small_patch14_reg4_dinov2", "cls"),
        ("vit_base_patch16_siglip_224", "map"),
        ("vit_base_patch16_siglip_gap_224", "avg"),
    ],
)
def test_default_is_the_models_own_pooling(name: str, pool: str, caplog: Any) -> None:
    model: Any = timm.create_model(name, img_size=64, patch_size=16, num_classes=7, depth=2)
    extractor = FeatureExtractor(with_random_norms(model))
    got = extractor(IMAGES)
    assert extractor.pool == pool
    assert extractor.num_features == got.shape[1]
    tokens = model.forward_features(IMAGES)
    torch.testing.assert_close(got, model.forward_head(tokens, pre_logits=True))
    avg = FeatureExtractor(model, pool="avg")(IMAGES)
    torch.testing.assert_close(avg, tokens[:, model.num_prefix_tokens :].mean(1))
    assert caplog.text == ""
    if pool == "map":
        with pytest.raises(SettingsError, match="last block"):
            FeatureExtractor(model, [0])


def test_other_poolings_of_timm_become_the_mean(caplog: Any) -> None:
    assert FeatureExtractor(vit(global_pool="max")).pool == "avg"
    assert "global_pool='max'" in caplog.text


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_norm_behind_the_pooling_is_applied_to_tokens(name: str) -> None:
    options = {"img_size": 64, "patch_size": 16, "num_classes": 0, "depth": 2, "global_pool": "avg"}
    model = with_random_norms(timm.create_model(name, **options))
    assert isinstance(model.norm, nn.Identity)
    tokens = model.fc_norm(block_outputs(model)[-1][:, model.num_prefix_tokens :])
    torch.testing.assert_close(FeatureExtractor(model)(IMAGES), tokens.mean(1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {}),
        ("resnet10t", {"global_pool": ""}),
        ("convnext_atto", {}),
        ("mobilenetv3_small_050", {}),
        ("swin_tiny_patch4_window7_224", SWIN),
    ],
)
def test_networks_without_blocks(name: str, options: dict[str, Any]) -> None:
    model: Any = timm.create_model(name, num_classes=0, **options).train()
    images = torch.randn(2, 3, 224, 224)
    extractor, maps = FeatureExtractor(model), FeatureExtractor(model, pool=None)
    assert model.training
    model.eval()
    pooled = extractor(images)
    expected = model(images)
    expected = expected.mean((2, 3)) if expected.ndim == 4 else expected
    torch.testing.assert_close(pooled, expected)
    assert (extractor.pool, extractor.num_features) == ("avg", pooled.shape[1])
    map_ = maps(images)
    assert map_[0].shape == maps.row_shape((224, 224)) == (maps.num_features, 7, 7)
    if name in ("resnet10t", "swin_tiny_patch4_window7_224"):  # nothing behind the pooling
        torch.testing.assert_close(map_.mean((2, 3)), pooled)
    for wrong in ({"layers": "last4"}, {"pool": "cls"}):
        with pytest.raises(SettingsError, match=type(model).__name__):
            FeatureExtractor(model, **wrong)


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_pooled_in_float32_and_differentiable(pool: str) -> None:
    model = vit(class_token=True).bfloat16()
    with torch.enable_grad():
        features = FeatureExtractor(model, pool=pool)(IMAGES.bfloat16())
        features.sum().backward()
    assert features.dtype == torch.float32
    assert model.patch_embed.proj.weight.grad is not None
    assert FeatureExtractor(vit().double())(IMAGES.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": [5]}, "from 0 to 4, or from -5 to -1"),
        ({"layers": [-6]}, r"\[-6\]"),
        ({"layers": [4, -1]}, "once"),
        ({"layers": []}, r"\[\]"),
        ({"layers": "last3"}, "last3"),
        ({"pool": "max"}, "'max'"),
        ({"pool": "cls"}, "'cls'"),
        ({"pool": "cls_avg"}, "'cls_avg'"),
        ({"pool": "map"}, "VisionTransformer"),
    ],
)
def test_wrong_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        FeatureExtractor(vit(), **options)


def test_other_models_are_refused_by_name() -> None:
    for model in (nn.Linear(2, 2), timm.create_model("mixer_s32_224")):
        with pytest.raises(SettingsError, match=type(model).__name__):
            FeatureExtractor(model)
