"""The encoder against timm's VisionTransformer and the names of the official repository."""

import json

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import SettingsError
from ijepa_zoo.models.encoder import as_encoder, encode_visible, sincos_positions
from ijepa_zoo.weights import registry

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3}
KEEP = torch.tensor([[0, 3, 9, 12], [1, 2, 15, 7]])


def make(**kwargs):
    return ijepa_zoo.create_model("vit_tiny16_ijepa", pretrained=False, **{**SMALL, **kwargs})


def stock_of(model, **kwargs):
    """timm's own class with the same arguments and, strictly, the same weights."""
    own = {"class_token": False, "fc_norm": False, "num_classes": 0, "global_pool": "avg"}
    with torch.device("meta"):
        stock = VisionTransformer(**{**own, **SMALL, **kwargs})
    stock.load_state_dict(model.state_dict(), strict=True, assign=True)
    return stock.train(model.training)


def draw(height=64, width=64, channels=3):
    return torch.randn(2, channels, height, width)


@pytest.mark.parametrize("name", [name for name in registry.ARCHITECTURES if "nano" not in name])
def test_names_shapes_and_heads_equal_the_official_repository(name, golden):
    theirs = name.removesuffix("_ijepa") + ("" if "448" in name else "_224")
    official = json.loads((golden / "state_dicts.json").read_text())[theirs]
    ijepa = ijepa_zoo.create_ijepa(name, pretrained=False, device="meta")
    for network, positions in (("encoder", "pos_embed"), ("predictor", "predictor_pos_embed")):
        ours = getattr(ijepa, network)
        shapes = {key: list(tensor.shape) for key, tensor in ours.state_dict().items()}
        assert shapes == official[network]
        assert set(dict(ours.named_buffers())) == {positions}  # a parameter in theirs
    blocks = [*ijepa.encoder.blocks, *ijepa.predictor.predictor_blocks]
    assert {block.attn.num_heads for block in blocks} == {official["num_heads"]}


@pytest.mark.parametrize(
    ("kwargs", "size"),
    [
        ({"img_size": (96, 64), "in_chans": 1}, (96, 64)),
        ({"dynamic_img_size": True, "dynamic_img_pad": True, "img_size": 60}, (50, 70)),
        ({"mlp_ratio": 48 / 11, "embed_dim": 44, "num_heads": 11}, (64, 64)),
        ({"num_classes": 5, "global_pool": "map"}, (64, 64)),
        ({"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "patch_drop_rate": 0.5}, (64, 64)),
        ({"init_values": 0.1, "qk_norm": True, "pos_embed": "none"}, (64, 64)),
        ({"fc_norm": True, "num_classes": 5}, (64, 64)),
    ],
    ids=str,
)
@torch.no_grad()
def test_every_argument_gives_the_output_of_timm(kwargs, size):
    model = make(**kwargs)
    stock, images = stock_of(model, **kwargs), draw(*size, channels=kwargs.get("in_chans", 3))
    for mode in (False, True):
        torch.manual_seed(1)
        ours = model.train(mode)(images)
        torch.manual_seed(1)
        assert_close(ours, stock.train(mode)(images), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_new_input_size_resamples_positions_as_timm_does():
    model = make().eval()
    old = model.pos_embed.clone()
    model.set_input_size((96, 64), (8, 8))
    expected = resample_abs_pos_embed(old, [12, 8], [4, 4], num_prefix_tokens=0)
    assert_close(dict(model.named_buffers()), {"pos_embed": expected})
    assert model.encode(draw(96, 64), torch.arange(96).repeat(2, 1)).shape == (2, 96, 48)
    with pytest.raises(SettingsError, match="60"):
        model.set_input_size((60, 64))


def test_initialization_is_that_of_the_official_repository():
    ijepa = ijepa_zoo.create_ijepa("vit_tiny16_ijepa", pretrained=False, num_classes=5)
    ijepa.encoder.init_weights()  # again
    assert torch.equal(ijepa.encoder.pos_embed, sincos_positions(192, (14, 14)))
    for network in (ijepa.encoder, ijepa.predictor):
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                assert (parameter == 0).all(), name
            elif "norm" in name:
                assert (parameter == 1).all(), name
            else:  # within five standard errors
                deviation, count = parameter.std(correction=0).item(), parameter.numel()
                assert deviation == pytest.approx(0.02, abs=0.1 / (2 * count) ** 0.5), name
                assert parameter.mean().item() == pytest.approx(0, abs=0.1 / count**0.5), name


def test_positions_of_a_rectangle_are_in_raster_order():
    square, low, tall = (sincos_positions(12, grid) for grid in ((5, 5), (2, 5), (5, 2)))
    square = square.view(5, 5, 12)  # as in the golden numbers
    assert torch.equal(low.view(2, 5, 12), square[:2])
    assert torch.equal(tall.view(5, 2, 12), square[:, :2])


@torch.no_grad()
def test_vit_of_timm_with_class_and_register_tokens():
    vit = VisionTransformer(**SMALL, reg_tokens=2, pre_norm=True, num_classes=0).eval()
    for parameter in vit.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    images, keep = draw(), torch.cat([KEEP, KEEP.flip(0)])  # two rows for each image
    embedded, tokens = vit._pos_embed(vit.patch_embed(images)), encode_visible(vit, images, keep)
    for row, indices in enumerate(keep):
        kept = torch.cat([torch.arange(3), 3 + indices])
        x = embedded[row // 2 : row // 2 + 1, kept]
        assert_close(tokens[row], vit.norm(vit.blocks(vit.norm_pre(x)))[0, 3:])
    assert_close(as_encoder(vit).encode(images), vit.forward_features(images)[:, 3:])


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("eva02_tiny_patch14_224", {}, "rotary"),
        ("resnet10t", {}, "VisionTransformer"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, "positions"),
    ],
)
def test_networks_that_cannot_encode_chosen_patches_are_refused(name, kwargs, reason):
    with torch.device("meta"):
        network = timm.create_model(name, **kwargs)
    for refuse in (as_encoder, lambda network: encode_visible(network, draw())):
        with pytest.raises(SettingsError, match=f"{name}.*{reason}"):
            refuse(network)


@pytest.mark.parametrize(
    "keep", [KEEP[0], KEEP[:, None], torch.zeros(3, 4).long(), KEEP.int(), KEEP[:0]], ids=str
)
def test_indices_of_a_wrong_shape_or_dtype_are_refused(keep):
    with pytest.raises(SettingsError, match="keep"):
        make().encode(draw(), keep)
