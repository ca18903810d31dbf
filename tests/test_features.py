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


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3}
    heads = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    model = VisionTransformer(**{**sizes, **heads, **options}).eval()
    for norm in (model.norm, model.fc_norm):  # so that leaving it out, or doing it twice, shows
        if isinstance(norm, nn.LayerNorm):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return model


def small(name: str, **options: Any) -> Any:
    """A timm model for `IMAGES`, random weights and norms."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, img_size=64, num_classes=0, depth=2, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def block_outputs(model: Any, images: Tensor) -> list[Tensor]:
    outputs: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _i, o: outputs.append(o)) for b in model.blocks]
    model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [("last", [4]), ("last4", [1, 2, 3, 4]), ([-1, 0], [0, 4]), ((3, -4), [1, 3])],
)
def test_blocks_are_normalized_then_pooled(layers: Any, blocks: list[int]) -> None:
    model = vit()
    outputs = block_outputs(model, IMAGES)
    expected = torch.cat([model.norm(outputs[b]).mean(1) for b in blocks], dim=1)
    extractor = FeatureExtractor(model, layers)
    torch.testing.assert_close(extractor(IMAGES), expected)
    assert extractor.layers == blocks
    assert extractor.num_features == expected.shape[1] == 48 * len(blocks)
    if layers == "last":
        torch.testing.assert_close(expected, model(IMAGES))  # timm's own pooling says the same


def test_maps_of_rectangles_and_dynamic_sizes() -> None:
    for model, size in (
        (vit(img_size=(32, 64)), (32, 64)),
        (vit(dynamic_img_size=True, class_token=True), (24, 48)),
        (vit(dynamic_img_size=True, dynamic_img_pad=True), (30, 45)),
    ):
        images = torch.randn(2, 3, *size)
        height, width = (-(-side // 8) for side in size)
        tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
        got = FeatureExtractor(model, [0, -1], pool=None)(images)
        assert got.shape == (2, 96, height, width)
        for row, column in ((0, 0), (height - 1, 0), (1, width - 1)):
            torch.testing.assert_close(got[:, 48:, row, column], tokens[:, row * width + column])


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("vit_tiny_patch16_224", "cls"),
        ("vit_small_patch14_reg4_dinov2", "cls"),
        ("vit_base_patch16_siglip_224", "map"),
        ("vit_base_patch16_siglip_gap_224", "avg"),
    ],
)
def test_default_is_the_models_own_pooling(
    name: str, pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    patch_size = {} if "patch16" in name else {"patch_size": 16}
    model = small(name, **patch_size)
    extractor = FeatureExtractor(model)
    assert extractor.pool == pool
    got = extractor(IMAGES)
    own = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    torch.testing.assert_close(got, own)
    assert extractor.num_features == got.shape[1]
    assert caplog.text == ""
    model.reset_classifier(7)  # a classifier changes no feature
    torch.testing.assert_close(FeatureExtractor(model)(IMAGES), own)
    if pool == "map":
        with pytest.raises(SettingsError, match="last block"):
            FeatureExtractor(model, [0])
    avg = FeatureExtractor(model, pool="avg")(IMAGES)
    patches = model.forward_features(IMAGES)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(avg, patches.mean(1))


def test_class_token_and_mean_of_each_block() -> None:
    model = vit(class_token=True, reg_tokens=2, global_pool="token")
    outputs = [model.norm(output) for output in block_outputs(model, IMAGES)]
    expected = [part for o in outputs[-2:] for part in (o[:, 0], o[:, 3:].mean(1))]
    extractor = FeatureExtractor(model, [3, 4], pool="cls_avg")
    torch.testing.assert_close(extractor(IMAGES), torch.cat(expected, dim=1))
    assert extractor.num_features == 4 * 48
    cls = FeatureExtractor(model, [3, 4], pool="cls")(IMAGES)
    torch.testing.assert_close(cls, torch.cat(expected[::2], dim=1))


def test_other_poolings_of_timm_become_the_mean(caplog: pytest.LogCaptureFixture) -> None:
    extractor = FeatureExtractor(vit(global_pool="max"))
    assert extractor.pool == "avg"
    assert "global_pool='max'" in caplog.text


def test_norm_behind_the_pooling_is_applied_to_tokens() -> None:
    model = vit(fc_norm=True)
    assert isinstance(model.norm, nn.Identity)
    expected = model.fc_norm(block_outputs(model, IMAGES)[-1]).mean(1)
    torch.testing.assert_close(FeatureExtractor(model)(IMAGES), expected)


def test_another_family_of_vits() -> None:
    model = small("eva02_tiny_patch14_224", patch_size=16)
    tokens = block_outputs(model, IMAGES)[-1][:, model.num_prefix_tokens :]
    got = FeatureExtractor(model, pool=None)(IMAGES)
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), model.fc_norm(tokens))


SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 2)}


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet10t", {}), ("convnext_atto", {}), ("swin_tiny_patch4_window7_224", SWIN)],
)
def test_networks_without_blocks(name: str, options: dict[str, Any]) -> None:
    model: Any = timm.create_model(name, num_classes=0, **options).train()
    images = torch.randn(2, 3, 224, 224)
    extractor = FeatureExtractor(model)
    assert model.training
    model.eval()
    assert extractor.pool == "avg"
    pooled = extractor(images)
    torch.testing.assert_close(pooled, model(images))
    assert pooled.shape[1] == extractor.num_features
    extractor = FeatureExtractor(model, pool=None)
    maps = extractor(images)
    assert maps[0].shape == extractor.row_shape((224, 224)) == (extractor.num_features, 7, 7)
    if not name.startswith("convnext"):  # which has a norm behind the pooling
        torch.testing.assert_close(maps.mean((2, 3)), pooled)
    for wrong in ({"layers": "last4"}, {"pool": "cls"}):
        with pytest.raises(SettingsError, match=type(model).__name__):
            FeatureExtractor(model, **wrong)


def test_later_blocks_are_not_run() -> None:
    model = vit()
    model.blocks[3].register_forward_hook(lambda *_: pytest.fail("block 3 was run"))
    FeatureExtractor(model, [2])(IMAGES)


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_pooled_in_float32_and_differentiable(pool: str) -> None:
    model = vit(class_token=True).to(torch.bfloat16)
    with torch.enable_grad():
        features = FeatureExtractor(model, pool=pool)(IMAGES.bfloat16())
        features.sum().backward()
    assert features.dtype == torch.float32
    assert model.patch_embed.proj.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": [5]}, "from 0 to 4, or from -5 to -1"),
        ({"layers": [-6]}, r"\[-6\]"),
        ({"layers": [4, -1]}, "twice"),
        ({"layers": []}, r"\[\]"),
        ({"layers": "last3"}, "'last3'"),
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
