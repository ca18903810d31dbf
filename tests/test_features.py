"""FeatureExtractor against hooks on the blocks and against timm's own forward pass."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ijepa_zoo.errors import SettingsError
from ijepa_zoo.features import FeatureExtractor


def vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3}
    heads = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    model = VisionTransformer(**{**sizes, **heads, **options}).eval()
    for norm in (model.norm, model.fc_norm):  # so that leaving it out, or doing it twice, shows
        if isinstance(norm, nn.LayerNorm):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return model


def block_outputs(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    outputs: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _i, o: outputs.append(o)) for b in model.blocks]
    model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return outputs


IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_last_is_the_mean_of_timms_tokens() -> None:
    model = vit()
    expected = model.forward_features(IMAGES).mean(1)
    torch.testing.assert_close(FeatureExtractor(model)(IMAGES), expected)
    torch.testing.assert_close(expected, model(IMAGES))  # timm's own pooling says the same


@torch.no_grad()
@pytest.mark.parametrize(
    ("layers", "blocks"),
    [("last4", [1, 2, 3, 4]), ([-1, 0], [0, 4]), ([2], [2]), ((3, -4), [1, 3])],
)
def test_blocks_are_normalised_then_pooled(layers: object, blocks: list[int]) -> None:
    model = vit()
    outputs = block_outputs(model, IMAGES)
    expected = torch.cat([model.norm(outputs[b]).mean(1) for b in blocks], dim=1)
    extractor = FeatureExtractor(model, layers)
    torch.testing.assert_close(extractor(IMAGES), expected)
    assert extractor.layers == blocks
    assert extractor.num_features == expected.shape[1] == 48 * len(blocks)


@torch.no_grad()
def test_maps_on_non_square_and_dynamic_sizes() -> None:
    for model, size in (
        (vit(img_size=(32, 64)), (32, 64)),
        (vit(dynamic_img_size=True), (24, 48)),
        (vit(dynamic_img_size=True, dynamic_img_pad=True), (30, 45)),
    ):
        images = torch.randn(2, 3, *size)
        height, width = (-(-side // 8) for side in size)
        tokens = model.forward_features(images)
        got = FeatureExtractor(model, "last", pool=None)(images)
        assert got.shape == (2, 48, height, width)
        for row, column in ((0, 0), (height - 1, 0), (1, width - 1)):
            torch.testing.assert_close(got[:, :, row, column], tokens[:, row * width + column])
        double = FeatureExtractor(model, [0, -1], pool=None)(images)
        torch.testing.assert_close(double[:, 48:], got)


@torch.no_grad()
def test_prefix_tokens_take_no_part() -> None:
    model = vit(class_token=True, reg_tokens=2)
    expected = model.forward_features(IMAGES)[:, 3:].mean(1)
    torch.testing.assert_close(FeatureExtractor(model)(IMAGES), expected)


@torch.no_grad()
def test_norm_behind_the_pooling_is_found() -> None:
    model = vit(fc_norm=True)
    assert isinstance(model.norm, nn.Identity)
    expected = model.fc_norm(block_outputs(model, IMAGES)[-1]).mean(1)
    torch.testing.assert_close(FeatureExtractor(model)(IMAGES), expected)


@torch.no_grad()
def test_later_blocks_are_not_run() -> None:
    model = vit()
    model.blocks[3].register_forward_hook(lambda *_: pytest.fail("block 3 was run"))
    FeatureExtractor(model, [2])(IMAGES)


def test_pooled_in_float32_and_differentiable() -> None:
    model = vit().to(torch.bfloat16)
    features = FeatureExtractor(model)(IMAGES.bfloat16())
    assert features.dtype == torch.float32
    features.sum().backward()
    assert model.patch_embed.proj.weight.grad is not None


@torch.no_grad()
def test_another_family_of_vits() -> None:
    torch.manual_seed(0)
    model = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=2, num_classes=0).eval()
    images = torch.randn(2, 3, 56, 56)
    tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
    got = FeatureExtractor(model, pool=None)(images)
    norm = FeatureExtractor(model).final_norm
    expected = tokens if norm is model.norm else norm(tokens)
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), expected)


def test_errors() -> None:
    with pytest.raises(ValueError, match="from 0 to 4, or from -5 to -1"):
        FeatureExtractor(vit(), [5])
    with pytest.raises(ValueError, match="from -5 to -1"):
        FeatureExtractor(vit(), [-6])
    with pytest.raises(ValueError, match="from 0 to 2"):
        FeatureExtractor(vit(depth=3), "last4")
    with pytest.raises(ValueError, match="name a block twice"):
        FeatureExtractor(vit(), [4, -1])
    with pytest.raises(ValueError, match="from 0 to 4"):
        FeatureExtractor(vit(), [])
    with pytest.raises(ValueError, match="'last', 'last4' or a list"):
        FeatureExtractor(vit(), "last3")
    with pytest.raises(ValueError, match="pool is 'max'"):
        FeatureExtractor(vit(), pool="max")
    with pytest.raises(SettingsError, match="Linear is no timm ViT"):
        FeatureExtractor(nn.Linear(2, 2))
