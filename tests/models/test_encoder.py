"""The encoder against timm's VisionTransformer and the names of the official repository."""

import copy
import io
import itertools
import json
import math

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import SettingsError
from ijepa_zoo.models.encoder import as_encoder, encode_visible, sincos_positions
from ijepa_zoo.weights import registry

OFFICIAL = {  # names in golden/state_dicts.json
    "vit_tiny16_ijepa": "vit_tiny16_224",
    "vit_small16_ijepa": "vit_small16_224",
    "vit_base16_ijepa": "vit_base16_224",
    "vit_large16_ijepa": "vit_large16_224",
    "vit_huge14_ijepa": "vit_huge14_224",
    "vit_huge16_448_ijepa": "vit_huge16_448",
    "vit_giant16_ijepa": "vit_giant16_224",
}
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


def draw(height=64, width=64, channels=3, batch=2):
    return torch.randn(batch, channels, height, width)


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_shapes_and_counts_equal_the_official_repository(name, golden):
    official = json.loads((golden / "state_dicts.json").read_text())[OFFICIAL[name]]
    ijepa = ijepa_zoo.create_ijepa(name, pretrained=False, device="meta")
    for network in ("encoder", "predictor"):
        ours = getattr(ijepa, network)
        shapes = {key: list(tensor.shape) for key, tensor in ours.state_dict().items()}
        assert shapes == official[network]
        positions = dict(ours.named_buffers())  # parameters in the official repository
        assert set(positions) == {"pos_embed" if network == "encoder" else "predictor_pos_embed"}
        tensors = (*ours.parameters(), *positions.values())
        assert sum(tensor.numel() for tensor in tensors) == official[f"{network}_parameters"]
    blocks = [*ijepa.encoder.blocks, *ijepa.predictor.predictor_blocks]
    assert {block.attn.num_heads for block in blocks} == {official["num_heads"]}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if args["embed_dim"] > 384 else [])
        for name, args in registry.ARCHITECTURES.items()
    ],
)
@torch.no_grad()
def test_tokens_equal_timm_at_every_registered_size(name):
    model = ijepa_zoo.create_model(name, pretrained=False, device="meta").to_empty(device="cpu")
    for index, tensor in enumerate(model.state_dict().values()):
        generator = torch.Generator().manual_seed(index)
        block = torch.randn(997, generator=generator) * 0.05  # cheap; no width is a multiple of it
        tensor.copy_(block.repeat(tensor.numel() // 997 + 1)[: tensor.numel()].view(tensor.shape))
    args, size = registry.ARCHITECTURES[name], model.patch_embed.img_size
    stock, images = stock_of(model, img_size=size, **args).eval(), draw(*size, batch=1)
    tokens = model.eval().encode(images)
    assert tokens.shape == (1, model.patch_embed.num_patches, args["embed_dim"])
    assert_close(tokens, stock.forward_features(images), rtol=1e-6, atol=1e-6)


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
    stock, images = stock_of(model), draw(96, 64)
    for size in ({"img_size": (96, 64)}, {"patch_size": (8, 8)}):
        before, old = model.pos_embed.clone(), model.patch_embed.grid_size
        for network in (model, stock):
            network.set_input_size(**size)
        assert_close(model(images), stock(images))
        new = list(model.patch_embed.grid_size)
        assert_close(model.pos_embed, resample_abs_pos_embed(before, new, old, num_prefix_tokens=0))
        assert "pos_embed" in dict(model.named_buffers())
    with pytest.raises(SettingsError, match="60"):
        model.set_input_size((60, 64))


def test_positions_are_never_trained_and_parameter_groups_equal_timm():
    model = make(num_classes=5)
    groups = []
    for network in (model, stock_of(model, num_classes=5)):
        names = {parameter: name for name, parameter in network.named_parameters()}
        found = {}
        for group in param_groups_layer_decay(network, 0.05, network.no_weight_decay()):
            for parameter in group["params"]:
                found[names[parameter]] = group["lr_scale"], group["weight_decay"]
        groups.append(found)
    assert groups[1].pop("pos_embed")
    assert groups[0] == groups[1]


@pytest.mark.parametrize("how", ["checkpointing", "compiled"])
def test_checkpointed_and_compiled_encoders_give_the_same_numbers_and_gradients(how):
    model, images = make(depth=1), draw()

    def gradients(forward, encode):
        tokens = encode(images, KEEP)
        loss = forward(images).square().sum() + tokens.square().sum()
        return tokens, *torch.autograd.grad(loss, list(model.parameters()))

    expected = gradients(model, model.encode)
    if how == "checkpointing":
        model.set_grad_checkpointing()
        found = gradients(model, model.encode)
    else:
        options = {"backend": "aot_eager", "fullgraph": True}
        found = gradients(torch.compile(model, **options), torch.compile(model.encode, **options))
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_copies_and_pickles_are_independent_and_equal():
    model, images, file = make(num_classes=5).eval(), draw(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    expected = model(images)
    model.pos_embed.zero_()
    model.norm.bias.fill_(9.0)
    for twin in copies:
        assert_close(twin(images), expected)


@pytest.mark.parametrize("reset", [False, True])
def test_initialization_is_that_of_the_official_repository(reset):
    ijepa = ijepa_zoo.create_ijepa("vit_tiny16_ijepa", pretrained=False, num_classes=5)
    positions = ijepa.encoder.pos_embed.clone()
    if reset:
        with torch.no_grad():
            for tensor in (*ijepa.encoder.parameters(), ijepa.encoder.pos_embed):
                tensor.fill_(7.0)
        ijepa.encoder.init_weights()
    assert torch.equal(ijepa.encoder.pos_embed, positions)
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


@pytest.mark.parametrize(("width", "grid"), [(8, (3, 3)), (12, (2, 5)), (4, (1, 1))])
def test_positions_equal_the_formula(width, grid):
    expected = [
        wave(position / 10000 ** (k / (width // 4)))
        for row, column in itertools.product(*map(range, grid))
        for position in (column, row)
        for wave in (math.sin, math.cos)
        for k in range(width // 4)
    ]
    table = sincos_positions(width, grid)
    assert_close(table, torch.tensor(expected).view(1, -1, width), rtol=0, atol=1e-6)


@torch.no_grad()
def test_kept_patches_are_encoded_in_their_order_and_others_have_no_influence():
    model, images, order = make().eval(), draw(), [2, 0, 3, 1]
    tokens = model.encode(images, KEEP)
    assert_close(model.encode(images, KEEP[:, order]), tokens[:, order], rtol=1e-5, atol=1e-6)
    corner = torch.tensor([[0, 1, 4, 5]] * 2)  # the upper left quarter
    changed = images.clone()
    changed[:, :, 32:] = changed[:, :, :, 32:] = 5.0
    assert torch.equal(model.encode(changed, corner), model.encode(images, corner))
    changed[:, :, 0, 0] += 1.0
    assert not torch.allclose(model.encode(changed, corner), model.encode(images, corner))


@pytest.mark.parametrize(("size", "kwargs"), [(64, {}), (96, {"dynamic_img_size": True})])
@torch.no_grad()
def test_keeping_all_patches_is_encoding_the_image(size, kwargs):
    model, images = make(**kwargs).eval(), draw(size)
    everything = torch.arange(size // 4).repeat(2, 1)
    assert_close(model.encode(images, everything), model.encode(images))
    assert_close(model.encode(images), model.forward_features(images), rtol=0, atol=0)


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
    assert_close(encode_visible(vit, images), vit.forward_features(images)[:, 3:])
    first, last = as_encoder(vit).encode_layers(images, 2)
    assert_close([last], vit.encode_layers(images))
    assert_close(last, vit.encode(images))
    assert not torch.allclose(first, last)


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
    "keep", [KEEP[0], KEEP[:, None], torch.zeros(3, 4).long(), KEEP.int()], ids=str
)
def test_indices_of_a_wrong_shape_or_dtype_are_refused(keep):
    with pytest.raises(SettingsError, match="keep"):
        make().encode(draw(), keep)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"class_token": True}, "class_token"),
        ({"reg_tokens": 4}, "reg_tokens"),
        ({"global_pool": "token"}, "global_pool"),
        ({"num_heads": 5}, "num_heads"),
        ({"embed_dim": 42, "num_heads": 2}, "42"),
        ({"img_size": (64, 60)}, r"\(64, 48\) or \(64, 64\)"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(kwargs, named):
    with pytest.raises(SettingsError, match=named):
        make(**kwargs)
