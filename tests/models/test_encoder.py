"""The encoder against timm's stock VisionTransformer, which it must equal in every verb."""

import copy
import io
import itertools
import json
import pickle

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import SettingsError
from ijepa_zoo.models.encoder import IJepaEncoder

# width, depth, heads, mlp hidden width, patch, image
SIZES = {
    "vit_nano8_64_ijepa": (128, 6, 4, 512, 8, 64),
    "vit_tiny16_ijepa": (192, 12, 3, 768, 16, 224),
    "vit_small16_ijepa": (384, 12, 6, 1536, 16, 224),
    "vit_base16_ijepa": (768, 12, 12, 3072, 16, 224),
    "vit_large16_ijepa": (1024, 24, 16, 4096, 16, 224),
    "vit_huge14_ijepa": (1280, 32, 16, 5120, 14, 224),
    "vit_huge16_448_ijepa": (1280, 32, 16, 5120, 16, 448),
    "vit_giant16_ijepa": (1408, 40, 16, 6144, 16, 224),
}
PUBLISHED = {
    "vit_tiny16_ijepa": "vit_tiny16_224",
    "vit_small16_ijepa": "vit_small16_224",
    "vit_base16_ijepa": "vit_base16_224",
    "vit_large16_ijepa": "vit_large16_224",
    "vit_huge14_ijepa": "vit_huge14_224",
    "vit_huge16_448_ijepa": "vit_huge16_448",
    "vit_giant16_ijepa": "vit_giant16_224",
}
SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3}


def _encoder(**kwargs):
    return ijepa_zoo.create_model("vit_tiny16_ijepa", pretrained=False, **{**SMALL, **kwargs})


def _stock(model, **kwargs):
    """timm's own class with the same arguments and, strictly, the same weights."""
    own = {"class_token": False, "fc_norm": False, "num_classes": 0, "global_pool": "avg"}
    with torch.device("meta"):
        stock = VisionTransformer(**{**own, **SMALL, **kwargs})
    stock.load_state_dict(model.state_dict(), strict=True, assign=True)
    return stock.train(model.training)


def _images(*size, channels=3, batch=2):
    return torch.randn(batch, channels, *(size or (64, 64)))


# --- names, shapes, sizes -------------------------------------------------------------------


@pytest.fixture(scope="module")
def published_states(golden):
    return json.loads((golden / "state_dicts.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_counts_of_both_networks_are_the_published_ones(name, published_states):
    published = published_states[PUBLISHED[name]]
    ijepa = ijepa_zoo.create_ijepa(name, pretrained=False, device="meta")
    for network in ("encoder", "predictor"):
        ours = getattr(ijepa, network)
        shapes = {key: list(tensor.shape) for key, tensor in ours.state_dict().items()}
        assert shapes == published[network]
        # the published code counts its positions, which never train, as parameters
        buffers = {key: tensor.numel() for key, tensor in ours.named_buffers()}
        assert set(buffers) == {"pos_embed" if network == "encoder" else "predictor_pos_embed"}
        count = sum(p.numel() for p in ours.parameters()) + sum(buffers.values())
        assert count == published[f"{network}_parameters"]
    blocks = [*ijepa.encoder.blocks, *ijepa.predictor.predictor_blocks]
    assert {block.attn.num_heads for block in blocks} == {published["num_heads"]}


LARGE = ("vit_large16_ijepa", "vit_huge14_ijepa", "vit_huge16_448_ijepa", "vit_giant16_ijepa")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in SIZES]
)
@torch.no_grad()
def test_tokens_equal_timm_at_every_registered_size(name):
    width, depth, heads, hidden, patch, size = SIZES[name]
    model = ijepa_zoo.create_model(name, pretrained=False, device="meta").to_empty(device="cpu")
    for index, tensor in enumerate(model.state_dict().values()):
        generator = torch.Generator().manual_seed(index)
        block = torch.randn(997, generator=generator) * 0.05  # cheap, and of no period of shapes
        tensor.copy_(block.repeat(tensor.numel() // 997 + 1)[: tensor.numel()].view(tensor.shape))
    stock = _stock(
        model,
        img_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=hidden / width,
    )
    images = _images(size, size, batch=1)
    tokens = model.eval().encode(images)
    assert tokens.shape == (1, (size // patch) ** 2, width)
    assert_close(tokens, stock.eval().forward_features(images), rtol=1e-6, atol=1e-6)


# --- every timm argument gives what stock timm gives ----------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "size"),
    [
        ({}, (64, 64)),
        ({"img_size": 96}, (96, 96)),
        ({"img_size": (96, 64)}, (96, 64)),
        ({"patch_size": 8}, (64, 64)),
        ({"patch_size": (8, 16), "img_size": (64, 96)}, (64, 96)),
        ({"dynamic_img_size": True}, (96, 64)),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, (50, 70)),
        ({"in_chans": 1}, (64, 64)),
        ({"in_chans": 4}, (64, 64)),
        ({"mlp_ratio": 48 / 11, "embed_dim": 44, "num_heads": 11}, (64, 64)),
        ({"qkv_bias": False}, (64, 64)),
        ({"num_classes": 5}, (64, 64)),
        ({"num_classes": 5, "global_pool": "max"}, (64, 64)),
        ({"num_classes": 5, "global_pool": "avgmax"}, (64, 64)),
        ({"num_classes": 5, "global_pool": "map"}, (64, 64)),
        ({"num_classes": 5, "global_pool": ""}, (64, 64)),
        ({"global_pool": ""}, (64, 64)),
        ({"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "patch_drop_rate": 0.5}, (64, 64)),
        ({"init_values": 0.1, "qk_norm": True}, (64, 64)),
        ({"pos_embed": "none"}, (64, 64)),
        ({"fc_norm": True, "num_classes": 5}, (64, 64)),
    ],
    ids=str,
)
@torch.no_grad()
def test_output_with_every_argument_equals_timm(kwargs, size):
    model = _encoder(**kwargs)
    stock = _stock(model, **kwargs)
    images = _images(*size, channels=kwargs.get("in_chans", 3))
    for mode in (False, True):
        torch.manual_seed(1)
        ours = model.train(mode)(images)
        torch.manual_seed(1)
        assert_close(ours, stock.train(mode)(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs", [{"class_token": True}, {"reg_tokens": 4}, {"global_pool": "token"}]
)
def test_tokens_that_ijepa_has_not_are_refused(kwargs):
    with pytest.raises(ValueError, match="patch tokens only"):
        _encoder(**kwargs)


def test_drop_path_rises_with_depth():
    blocks = _encoder(drop_path_rate=0.2).blocks
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize("indices", [None, 2, [0, -1], (1,)], ids=str)
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@torch.no_grad()
def test_intermediates_with_all_options_equal_timm(indices, output_fmt):
    model = _encoder().eval()
    stock, images = _stock(model), _images()
    names = ("return_prefix_tokens", "norm", "stop_early", "intermediates_only", "output_dict")
    for values in itertools.product((False, True), repeat=len(names)):
        options = dict(zip(names, values, strict=True), indices=indices, output_fmt=output_fmt)
        ours = model.forward_intermediates(images, **options)
        assert_close(ours, stock.forward_intermediates(images, **options), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_attention_mask_of_intermediates_equals_timm():
    model, images = _encoder().eval(), _images()
    mask = (torch.rand(1, 1, 16, 16) > 0.3) | torch.eye(16, dtype=torch.bool)
    ours = model.forward_intermediates(images, attn_mask=mask)
    assert_close(ours, _stock(model).forward_intermediates(images, attn_mask=mask))
    assert not torch.allclose(ours[0], model.encode(images))


@pytest.mark.parametrize("out_indices", [None, [0, 2], 2], ids=str)
@torch.no_grad()
def test_features_only_equals_timm(out_indices):
    source = _encoder().eval()
    kwargs = {} if out_indices is None else {"out_indices": out_indices}
    model = _encoder(features_only=True, **kwargs).eval()
    stock = timm.create_model(
        "vit_base_patch16_gap_224", features_only=True, **{**SMALL, **kwargs}
    ).eval()
    for wrapper in (model, stock):  # the wrapper drops what lies behind its last block
        incompatible = wrapper.model.load_state_dict(source.state_dict(), strict=False)
        assert not incompatible.missing_keys
    images = _images()
    assert_close(model(images), stock(images), rtol=1e-6, atol=1e-6)
    assert model.feature_info.channels() == stock.feature_info.channels()
    assert (
        model.feature_info.reduction()
        == stock.feature_info.reduction()
        == [16] * len(model.feature_info.channels())
    )


@torch.no_grad()
def test_heads_equal_timm_before_and_after_a_reset():
    model = _encoder(num_classes=5).eval()
    stock, images = _stock(model, num_classes=5), _images()
    tokens = model.encode(images)
    for pre_logits in (False, True):
        assert_close(model.forward_head(tokens, pre_logits), stock.forward_head(tokens, pre_logits))
    assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean(1), rtol=1e-5, atol=1e-6)
    model.reset_classifier(7, "max")
    assert model(images).shape == (2, 7)
    assert_close(model(images), model.head(tokens.amax(1)))
    model.reset_classifier(0, "avg")
    assert_close(model(images), tokens.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("img_size", "patch_size"), [((96, 64), None), (None, (8, 8)), ((96, 96), (12, 12))]
)
@torch.no_grad()
def test_new_input_size_resamples_positions_as_timm_and_keeps_them_a_buffer(img_size, patch_size):
    model = _encoder().eval()
    stock, before = _stock(model), model.pos_embed.clone()
    model.set_input_size(img_size=img_size, patch_size=patch_size)
    stock.set_input_size(img_size=img_size, patch_size=patch_size)
    images = _images(*(img_size or (64, 64)))
    assert_close(model(images), stock(images))
    grid = model.patch_embed.grid_size
    wanted = resample_abs_pos_embed(before, list(grid), (4, 4), num_prefix_tokens=0)
    assert_close(model.pos_embed, wanted)
    assert "pos_embed" in dict(model.named_buffers())
    assert "pos_embed" not in dict(model.named_parameters())
    assert not model.pos_embed.requires_grad


def test_gradient_checkpointing_leaves_gradients_as_they_are():
    model, images, keep = _encoder(), _images(), torch.tensor([[0, 3, 9], [1, 2, 15]])
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        (model(images).square().sum() + model.encode(images, keep).square().sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert_close(gradients[0], gradients[1])


def test_layer_decay_groups_are_those_of_timm_without_the_positions():
    model = _encoder(num_classes=5)
    scales = []
    for network in (model, _stock(model, num_classes=5)):
        names = {id(p): name for name, p in network.named_parameters()}
        groups = param_groups_layer_decay(
            network,
            weight_decay=0.05,
            layer_decay=0.75,
            no_weight_decay_list=network.no_weight_decay(),
        )
        scales.append(
            {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
        )
    ours, stock = scales
    del stock["pos_embed"]
    assert ours == stock
    assert ours["blocks.0.attn.qkv.weight"][0] < ours["blocks.2.attn.qkv.weight"][0] < 1
    decayed, free = (
        {id(p) for p in group["params"]} for group in param_groups_weight_decay(model)[::-1]
    )
    assert id(model.head.weight) in decayed
    assert id(model.head.bias) in free
    assert len(decayed) + len(free) == len(list(model.parameters()))


# --- copies, compilation, precision ---------------------------------------------------------


def test_compiled_encoder_gives_the_same_numbers_and_gradients():
    model, images, keep = _encoder(), _images(), torch.tensor([[0, 3], [1, 2]])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-6)
    encode = torch.compile(model.encode, backend="aot_eager", fullgraph=True)
    wanted = model.encode(images, keep)
    assert_close(encode(images, keep), wanted, rtol=1e-5, atol=1e-6)
    weight = model.blocks[0].attn.qkv.weight
    by_hand = torch.autograd.grad(wanted.square().sum(), weight)
    assert_close(torch.autograd.grad(encode(images, keep).square().sum(), weight), by_hand)


class _Encode(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images, keep):
        return self.encoder.encode(images, keep)


@torch.no_grad()
def test_exported_encoder_gives_the_same_numbers_at_another_batch_size():
    model, images, keep = _encoder().eval(), _images(), torch.tensor([[0, 3], [1, 2]])
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    more = _images(batch=5)
    assert_close(program.module()(more), model(more), rtol=1e-5, atol=1e-6)
    program = torch.export.export(_Encode(model), (images, keep))
    assert_close(program.module()(images, keep), model.encode(images, keep), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_copies_and_pickles_are_independent_and_equal():
    model, images = _encoder(num_classes=5).eval(), _images()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    wanted = model(images)
    model.pos_embed.zero_()
    model.norm.bias.fill_(9.0)
    for twin in copies:
        assert isinstance(twin, IJepaEncoder)
        assert_close(twin(images), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_precisions(dtype):
    model, images = _encoder().eval(), _images()
    wanted, keep = model.encode(images), torch.tensor([[0, 3], [1, 2]])
    model = model.to(dtype)
    assert model.pos_embed.dtype == dtype
    tokens = model.encode(images.to(dtype))
    assert tokens.dtype == model.encode(images.to(dtype), keep).dtype == dtype
    assert_close(tokens.float(), wanted, rtol=0.1, atol=0.1)


# --- the recipe's initialisation ------------------------------------------------------------


def _check_recipe(network):
    norms = {
        f"{name}.{part}"
        for name, module in network.named_modules()
        if isinstance(module, nn.LayerNorm)
        for part in ("weight", "bias")
    }
    for name, parameter in network.named_parameters():
        if name in norms:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:  # five standard errors of a deviation and of a mean
            count = parameter.numel()
            assert parameter.std().item() == pytest.approx(0.02, abs=0.1 / (2 * count) ** 0.5), name
            assert parameter.mean().item() == pytest.approx(0, abs=0.1 / count**0.5), name


@pytest.mark.parametrize("reset", [False, True])
def test_initialisation_is_the_recipe_in_every_layer_of_every_block(reset):
    ijepa = ijepa_zoo.create_ijepa("vit_tiny16_ijepa", pretrained=False, num_classes=5)
    if reset:
        with torch.no_grad():
            for tensor in (*ijepa.encoder.parameters(), ijepa.encoder.pos_embed):
                tensor.fill_(7.0)
        ijepa.encoder.init_weights()
    _check_recipe(ijepa.predictor)
    positions = ijepa.encoder.pos_embed.clone()
    _check_recipe(ijepa.encoder)
    other = _encoder(embed_dim=192, img_size=224)
    assert_close(positions, other.pos_embed, rtol=0, atol=0)
    assert not torch.equal(other.patch_embed.proj.weight, ijepa.encoder.patch_embed.proj.weight)


@pytest.mark.parametrize("mode", ["jax", "moco", "reset"])
def test_other_initialisations_of_timm_keep_the_positions(mode):
    model = _encoder(weight_init=mode)
    assert_close(model.pos_embed, _encoder().pos_embed)
    assert model.blocks[0].mlp.fc1.weight.std().item() > 0.03


def test_positions_are_never_trained():
    model, images = _encoder(), _images()
    before = model.pos_embed.clone()
    assert "pos_embed" not in dict(model.named_parameters())
    assert not model.pos_embed.requires_grad
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    weight = model.blocks[0].mlp.fc1.weight.clone()
    model(images).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.pos_embed, before)
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, weight)
    assert torch.equal(model.state_dict()["pos_embed"], before)


# --- encode ---------------------------------------------------------------------------------


@torch.no_grad()
def test_keeping_all_patches_is_encoding_the_image():
    model, images = _encoder().eval(), _images()
    everything = torch.arange(16).repeat(2, 1)
    tokens = model.encode(images)
    assert_close(tokens, model.forward_features(images), rtol=0, atol=0)
    assert_close(model.encode(images, everything), tokens)


@torch.no_grad()
def test_order_of_kept_patches_is_the_order_of_tokens():
    model, images = _encoder().eval(), _images()
    keep = torch.tensor([[0, 3, 9, 12], [1, 2, 15, 7]])
    order = torch.tensor([2, 0, 3, 1])
    tokens = model.encode(images, keep)
    assert tokens.shape == (2, 4, 48)
    assert_close(model.encode(images, keep[:, order]), tokens[:, order], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_dropped_patches_have_no_influence():
    model, images = _encoder().eval(), _images()
    keep = torch.tensor([[0, 1, 4, 5]] * 2)  # the upper left quarter
    changed = images.clone()
    changed[:, :, 32:] = 5.0
    changed[:, :, :, 32:] = -5.0
    assert_close(model.encode(changed, keep), model.encode(images, keep), rtol=0, atol=0)
    changed[:, :, 0, 0] += 1.0
    assert not torch.allclose(model.encode(changed, keep), model.encode(images, keep))


@torch.no_grad()
def test_kept_patches_of_a_dynamic_size():
    model, images = _encoder(dynamic_img_size=True).eval(), _images(96, 64)
    everything = torch.arange(24).repeat(2, 1)
    assert_close(model.encode(images, everything), model.encode(images))


@pytest.mark.parametrize(
    "keep",
    [
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(3, 4, dtype=torch.int64),
        torch.zeros(2, 1, 4, dtype=torch.int64),
        torch.zeros(2, 4, dtype=torch.int32),
        torch.zeros(2, 4),
        torch.zeros(2, 16, dtype=torch.bool),
    ],
    ids=lambda keep: f"{keep.dtype} {list(keep.shape)}",
)
def test_indices_of_a_wrong_shape_or_type_are_refused(keep):
    with pytest.raises(
        ValueError, match=r"int64 patch indices \[B, K\] or \[B \* R, K\], B = 2, got"
    ):
        _encoder().encode(_images(), keep)


def test_sizes_that_patches_do_not_fill_are_refused():
    for make in (
        lambda: ijepa_zoo.create_model("vit_nano8_64_ijepa", pretrained=False, img_size=(64, 60)),
        lambda: ijepa_zoo.create_model("vit_nano8_64_ijepa").set_input_size((60, 64)),
    ):
        with pytest.raises(SettingsError, match="60"):
            make()
    padded = ijepa_zoo.create_model(
        "vit_nano8_64_ijepa", pretrained=False, img_size=60, dynamic_img_size=True,
        dynamic_img_pad=True,
    )  # fmt: skip
    assert padded(torch.zeros(1, 3, 60, 60)).shape == (1, 128)
