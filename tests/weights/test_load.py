"""Files of one's own weights: what loads, how it is fitted, what is refused."""

import argparse
import logging
import pickle
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models._manipulate import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError
from ijepa_zoo.weights import formats


@pytest.fixture(scope="session")
def states(official):
    """The networks of the official file, in our names."""
    content = torch.load(official, weights_only=True)
    return {
        network: {k.removeprefix("module."): v for k, v in content[network].items()}
        for network in ("encoder", "target_encoder", "predictor")
    }


@pytest.fixture
def state(states):
    return dict(states["target_encoder"])


@pytest.fixture
def create(tiny):
    def load(checkpoint, **kwargs):
        return ijepa_zoo.create_model(
            "vit_tiny16_ijepa", checkpoint=checkpoint, **{**tiny, **kwargs}
        )

    return load


@pytest.fixture
def file(state, tmp_path):
    """The target encoder alone."""
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


# --- contents that load


@pytest.mark.parametrize("network", [None, "encoder"])
@torch.no_grad()
def test_official_file_gives_the_expected_tokens(official, create, expected, network):
    tokens = create(official, network=network).encode(expected["input"])
    assert_close(tokens, expected[network or "target_encoder"], rtol=1e-5, atol=1e-5)
    assert (expected["encoder"] - expected["target_encoder"]).abs().max() > 0.1


def write(path, state, kind):
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.safetensors", "safetensors"), ("a.ckpt", "zip"), ("a.pth.tar", "legacy")],
)
def test_files_load_exactly_and_are_never_changed(create, state, tmp_path, name, kind):
    path = write(tmp_path / name, state, kind)
    before = path.read_bytes()
    model, twin = create(path), create(path)
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1.0)
    assert_close(dict(twin.state_dict()), state, rtol=0, atol=0)
    assert path.read_bytes() == before


SAVED = {
    "timm": lambda s: s,
    "transformers": lambda s: formats.to_transformers(s, "memory"),
    "ddp": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "ddp of compiled": lambda s: prefixed(s, "module._orig_mod."),
    "compiled ddp": lambda s: prefixed(s, "_orig_mod.module."),
    "compiled blocks": lambda s: {
        k.replace("blocks.0.", "blocks.0._orig_mod.").replace("blocks.1.", "blocks.1._orig_mod."): v
        for k, v in s.items()
    },
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": prefixed(s, "module."), "epoch": 3},
    "timm train": lambda s: {
        **{"arch": "vit", "state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s},
        **{"optimizer": {}, "version": 2},
    },
    "target encoder": lambda s: {"target_encoder": prefixed(s, "module."), "epoch": 1},
    "lightning": lambda s: {
        **{"state_dict": prefixed(s, "model.") | {"criterion.weight": torch.ones(2)}},
        **{"hyper_parameters": {"lr": 1e-3}, "callbacks": {}, "loops": {"state_dict": {}}},
    },
    "classifier": lambda s: {**s, "head.weight": torch.ones(10, 48), "head.bias": torch.ones(10)},
}
LOGGED = {
    **dict.fromkeys(("ddp", "ddp of compiled", "compiled ddp", "target encoder"), "'module.'"),
    **dict.fromkeys(("compiled", "ddp of compiled", "compiled ddp"), "'_orig_mod.'"),
    **{"compiled blocks": "'_orig_mod.'", "state_dict": "'state_dict' is used"},
    **{"model": "'model' is used", "timm train": "'state_dict_ema' is used"},
    **{"lightning": "criterion.weight", "classifier": "num_classes=10"},
}


@pytest.mark.parametrize("kind", SAVED)
def test_checkpoints_as_people_save_them(create, state, tmp_path, kind, caplog):
    caplog.set_level(logging.INFO, "ijepa_zoo")
    torch.save(SAVED[kind](state), tmp_path / "a.pth")
    assert_close(dict(create(tmp_path / "a.pth").state_dict()), state, rtol=0, atol=0)
    assert LOGGED.get(kind, "") in caplog.text
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert bool(warned) == (kind in ("timm train", "lightning", "classifier"))


@pytest.mark.parametrize("prefix", ["", "model.", "_orig_mod.module."])
def test_state_dict_of_an_ijepa(create, tiny, tiny_predictor, official, tmp_path, prefix):
    sizes = {**tiny, **tiny_predictor}
    ijepa = ijepa_zoo.create_ijepa("vit_tiny16_ijepa", checkpoint=official, **sizes)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": prefixed(ijepa.state_dict(), prefix)}, path)
    again = ijepa_zoo.create_ijepa("vit_tiny16_ijepa", checkpoint=path, **sizes)
    assert_close(dict(again.state_dict()), dict(ijepa.state_dict()), rtol=0, atol=0)
    assert create(path).weights_origin.startswith("target encoder of")
    assert torch.equal(create(path, network="encoder").norm.weight, ijepa.encoder.norm.weight)


def test_classifier_is_kept_where_num_classes_fits(create, official, state, tmp_path):
    model = create(official, num_classes=6)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert torch.equal(create(tmp_path / "a.pth", num_classes=6).head.weight, model.head.weight)
    other = create(tmp_path / "a.pth", num_classes=4)
    assert other.head.weight.std().item() == pytest.approx(0.02, rel=0.3)
    head = {"head.weight": torch.randn(5, 48), "head.bias": torch.randn(5)}
    torch.save({"state_dict": {**prefixed(state, "backbone."), **head}}, tmp_path / "b.ckpt")
    beside = create(tmp_path / "b.ckpt", num_classes=5)  # the prefix of its body
    assert torch.equal(beside.head.weight, head["head.weight"])


def test_a_file_is_opened_once_for_all_networks(official, tiny, tiny_predictor, monkeypatch):
    opened = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **kw: opened.append(path) or load(path, **kw))
    ijepa_zoo.create_ijepa("vit_tiny16_ijepa", checkpoint=official, **tiny, **tiny_predictor)
    assert opened == [official]


# --- contents that are refused


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), r"lacks blocks\.1\.mlp\.fc2\.bias"),
        (lambda s: s.update({"ema.step": torch.ones(1)}), r"ema\.step"),
        (lambda s: s.update({"module.norm.bias": s["norm.bias"]}), r"module\.norm\.bias"),
        (lambda s: s.update(prefixed(s, "module.")), "'module.'"),
        (lambda s: s.update({"_orig_mod.norm.bias": s["norm.bias"]}), r"norm\.bias twice"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 15, 48)), "15"),
        (lambda s: s.update({"norm.bias": torch.ones(48, dtype=torch.int8)}), r"norm\.bias.*int8"),
        (lambda s: s.clear(), "nothing"),
        (lambda s: s.update(cls_token=torch.zeros(1, 1, 48)), "cls_token"),
        (lambda s: s.update({"a.predictor_embed.weight": torch.ones(1)}), "several networks"),
        (lambda s: s.update(epoch=3) or s.pop("pos_embed"), "pos_embed"),
    ],
)
def test_tensors_missing_left_over_twice_or_unusable_are_refused(
    create, state, tmp_path, change, named
):
    change(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"a\.pth.*{named}"):
        create(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"embed_dim": 96}, r"\[48\] in the file, \[96\]"),
        ({"mlp_ratio": 2}, r"mlp\.fc1\.weight is \[192, 48\] in the file, \[96, 48\]"),
        ({"depth": 3}, r"lacks blocks\.2\."),
        ({"depth": 1}, r"blocks\.1\."),
        ({"qkv_bias": False}, r"blocks\.0\.attn\.qkv\.bias"),
        ({"init_values": 0.1}, r"lacks blocks\.0\.ls1\.gamma"),
    ],
    ids=str,
)
def test_other_architectures_are_refused(file, create, arguments, named):
    with pytest.raises(CheckpointError, match=rf"weights\.safetensors.*{named}"):
        create(file, **arguments)


def test_network_that_is_not_there_is_refused(official, file, create):
    with pytest.raises(CheckpointError, match=r"weights\.safetensors.*network="):
        create(file, network="encoder")
    with pytest.raises(CheckpointError, match=r"official-tiny16-64.*'decoder'"):
        create(official, network="decoder")


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (lambda _: argparse.Namespace(lr=1), r"argparse\.Namespace"),
        (lambda _: np.float64(0.5), "numpy"),
        (_Touch, "getattr"),  # of pathlib.Path.touch
    ],
    ids=["settings", "number", "code"],
)
def test_objects_of_other_classes_are_named_and_not_loaded(
    create, state, tmp_path, value, named, kind
):
    content = {"state_dict": state, "hyper_parameters": value(tmp_path / "trace")}
    path = write(tmp_path / "a.ckpt", content, kind)
    with pytest.raises(CheckpointError, match=rf"a\.ckpt.*{named}") as caught:
        create(path)
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    assert not (tmp_path / "trace").exists()


PICKLE = pickle.dumps([1.5], protocol=2)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.9, b"<!DOCTYPE html>", PICKLE], ids=str)
def test_truncated_and_other_files_are_refused(create, state, tmp_path, kind, share):
    suffix = "safetensors" if kind == "safetensors" else "pth"
    path = write(tmp_path / f"part.{suffix}", state, kind)
    content = path.read_bytes()
    path.write_bytes(share if isinstance(share, bytes) else content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"part\."):
        create(path)


def test_paths_without_a_checkpoint_are_refused(create, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
        create(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="hf-hub:facebook/ijepa"):
        create("facebook/ijepa")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        create(tmp_path)


# --- sizes that differ from those of the checkpoint


@pytest.mark.parametrize(
    "sizes",
    [{"img_size": (96, 64)}, {"img_size": 32}, {"patch_size": 8, "img_size": (48, 80)}],
    ids=str,
)
def test_other_image_and_patch_sizes_are_resampled_as_timm_does(file, create, state, tiny, sizes):
    model = create(file, **sizes)
    own = {"class_token": False, "fc_norm": False, "num_classes": 0, "global_pool": "avg"}
    stock = VisionTransformer(**own, **{**tiny, **sizes})
    expected = checkpoint_filter_fn({name: tensor.clone() for name, tensor in state.items()}, stock)
    assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=0)
    assert model.pos_embed.shape != state["pos_embed"].shape


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels_are_adapted_as_timm_does(file, create, state, channels):
    weight = create(file, in_chans=channels).patch_embed.proj.weight.detach()
    expected = adapt_input_conv(channels, state["patch_embed.proj.weight"].clone())
    assert_close(weight, expected, rtol=0, atol=0)


def test_channels_that_timm_cannot_adapt_are_refused(create, state, tmp_path):
    state["patch_embed.proj.weight"] = torch.zeros(48, 4, 16, 16)
    save_file(state, tmp_path / "a.safetensors")
    assert create(tmp_path / "a.safetensors", in_chans=4).patch_embed.proj.in_channels == 4
    with pytest.raises(CheckpointError, match="in_chans=4"):
        create(tmp_path / "a.safetensors")


def test_wide_grid_comes_from_the_config_and_a_bare_file_is_taken_as_square(create, tmp_path):
    """32x128 pixels are 2x8 patches, as many as 4x4."""
    model = create(None, pretrained=False, img_size=(32, 128))
    model.pos_embed.normal_()
    ijepa_zoo.export(model, tmp_path / "wide")
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    expected = resample_abs_pos_embed(model.pos_embed, [4, 4], [2, 8], num_prefix_tokens=0)
    assert_close(create(tmp_path / "wide").pos_embed, expected)
    assert torch.equal(create(tmp_path / "wide.pth").pos_embed, model.pos_embed)


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_parts_that_pretraining_lacks_are_initialized(official, create, state, pool):
    model = create(official, num_classes=300, global_pool=pool)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name, tensor in model.state_dict().items():
        if name.startswith("attn_pool.") and name.endswith("weight") and "norm" not in name:
            assert 0.001 < tensor.std() < 0.2, name
        elif not name.startswith(("head.", "attn_pool.")):
            assert torch.equal(tensor, state[name]), name
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


@torch.no_grad()
def test_features_only_of_a_checkpoint(official, create, expected):
    blocks = create(official).forward_intermediates(expected["input"], intermediates_only=True)
    features = create(official, features_only=True, out_indices=[0, 1])
    assert_close(features(expected["input"]), blocks)


# --- tensors


def test_dtype_and_device_of_the_call_hold(official, create, state):
    model = create(official, dtype=torch.bfloat16, device="cpu")
    for name, tensor in model.state_dict().items():
        assert_close(tensor, state[name].to(torch.bfloat16), rtol=0, atol=0)
    assert {t.device.type for t in create(official, device="meta").parameters()} == {"meta"}


def test_file_in_half_precision_gives_a_trainable_model_in_float32(create, state, tmp_path):
    half = {name: tensor.half() for name, tensor in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    model = create(tmp_path / "half.safetensors")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert_close(tensor, half[name].float(), rtol=0, atol=0)


def test_loading_draws_no_random_number(official, file, create, tiny, tiny_predictor):
    before = torch.get_rng_state()
    create(official)
    create(file, img_size=96)
    ijepa_zoo.create_ijepa("vit_tiny16_ijepa", checkpoint=official, **tiny, **tiny_predictor)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(sys.platform != "linux", reason="depends on how Linux maps files")
def test_tensors_are_mapped_from_the_file_without_a_copy(file, create, state):
    model, content = create(file), file.read_bytes()
    old = state["norm.bias"].numpy().tobytes()
    assert content.count(old) == 1
    with file.open("r+b") as opened:  # pages that nobody has written to show the change
        opened.seek(content.index(old))
        opened.write(torch.full((48,), 7.0).numpy().tobytes())
    assert (load_file(file)["norm.bias"] == 7).all()
    assert (model.norm.bias == 7).all()
