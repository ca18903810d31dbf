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


@pytest.fixture
def file(state, tmp_path):
    """The target encoder alone."""
    return write(tmp_path / "weights.safetensors", state, "safetensors")


def write(path, state, kind):
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def equal(model, state):
    assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


# --- contents that load


@pytest.mark.parametrize("network", [None, "encoder"])
@torch.no_grad()
def test_official_file_gives_the_expected_tokens(official, create, expected, network):
    tokens = create(official, network=network).encode(expected["input"])
    assert_close(tokens, expected[network or "target_encoder"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.safetensors", "safetensors"), ("a.ckpt", "zip"), ("a.pth.tar", "legacy")],
)
@torch.no_grad()
def test_files_load_exactly_and_are_never_changed(create, state, tmp_path, name, kind):
    path = write(tmp_path / name, state, kind)
    before = path.read_bytes()
    model, twin = create(path), create(path)
    equal(model, state)
    for tensor in model.state_dict().values():
        tensor.add_(1.0)
    equal(twin, state)
    assert path.read_bytes() == before


SAVED = {  # and what is logged about it
    "transformers": (lambda s: formats.to_transformers(s, "memory"), ""),
    "ddp of compiled": (lambda s: prefixed(s, "module._orig_mod."), "'_orig_mod.', 'module.'"),
    "compiled blocks": (
        lambda s: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()},
        "'_orig_mod.'",
    ),
    "model": (lambda s: {"model": prefixed(s, "module."), "epoch": 3}, "'model' is used"),
    "timm train": (
        lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s, "arch": ""},
        "'state_dict_ema' is used",
    ),
    "target encoder": (lambda s: {"target_encoder": prefixed(s, "module.")}, "'module.'"),
    "lightning": (
        lambda s: {"state_dict": prefixed(s, "model.") | {"criterion.weight": torch.ones(2)}},
        "criterion.weight",
    ),
    "classifier": (
        lambda s: {**s, "head.weight": torch.ones(10, 48), "head.bias": torch.ones(10)},
        "num_classes=10",
    ),
}


@pytest.mark.parametrize("kind", SAVED)
def test_checkpoints_as_people_save_them(create, state, tmp_path, kind, caplog):
    caplog.set_level(logging.INFO, "ijepa_zoo")
    save, logged = SAVED[kind]
    torch.save(save(state), tmp_path / "a.pth")
    equal(create(tmp_path / "a.pth"), state)
    assert logged in caplog.text
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert bool(warned) == (kind in ("timm train", "lightning", "classifier"))


@pytest.mark.parametrize("prefix", ["", "_orig_mod.module."])
def test_state_dict_of_an_ijepa(create, tiny, tiny_predictor, official, tmp_path, prefix):
    sizes = {**tiny, **tiny_predictor}
    ijepa = ijepa_zoo.create_ijepa("vit_tiny16_ijepa", checkpoint=official, **sizes)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": prefixed(ijepa.state_dict(), prefix)}, path)
    equal(ijepa_zoo.create_ijepa("vit_tiny16_ijepa", checkpoint=path, **sizes), ijepa.state_dict())
    assert create(path).weights_origin.startswith("target encoder of")
    equal(create(path, network="encoder"), ijepa.encoder.state_dict())


def test_classifier_is_kept_where_num_classes_fits(create, state, tmp_path):
    head = {"head.weight": torch.randn(5, 48), "head.bias": torch.randn(5)}
    torch.save({"state_dict": {**prefixed(state, "backbone."), **head}}, tmp_path / "a.ckpt")
    equal(create(tmp_path / "a.ckpt", num_classes=5), {**state, **head})
    other = create(tmp_path / "a.ckpt", num_classes=4)
    assert other.head.weight.std().item() == pytest.approx(0.02, rel=0.3)


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
        (
            lambda s: s.update({"patch_embed.proj.weight": torch.zeros(48, 4, 16, 16)}),
            "in_chans=4",
        ),
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
        ({"embed_dim": 96}, r"is \[48.*\], in the model \[96"),
        ({"depth": 3}, r"lacks blocks\.2\."),
        ({"depth": 1}, r"unused blocks\.1\."),
        ({"qkv_bias": False}, r"blocks\.0\.attn\.qkv\.bias"),
        ({"network": "encoder"}, "network="),
    ],
    ids=str,
)
def test_other_architectures_and_networks_are_refused(file, create, arguments, named):
    with pytest.raises(CheckpointError, match=rf"weights\.safetensors.*{named}"):
        create(file, **arguments)


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


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize(
    "share", [0.0, 0.9, b"<!DOCTYPE html>", pickle.dumps([1.5], protocol=2)], ids=str
)
def test_truncated_and_other_files_are_refused(create, state, tmp_path, kind, share):
    suffix = "safetensors" if kind == "safetensors" else "pth"
    path = write(tmp_path / f"part.{suffix}", state, kind)
    content = path.read_bytes()
    path.write_bytes(share if isinstance(share, bytes) else content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"part\."):
        create(path)


def test_paths_without_a_checkpoint_are_refused(create, tmp_path):
    for path, named in (
        (tmp_path / "nowhere.pth", r"nowhere\.pth"),
        ("facebook/ijepa", "hf-hub:facebook/ijepa"),
        (tmp_path, r"config\.json"),
    ):
        with pytest.raises(CheckpointError, match=named):
            create(path)


# --- sizes that differ from those of the checkpoint


@pytest.mark.parametrize(
    "sizes", [{"img_size": (96, 64)}, {"patch_size": 8, "img_size": (48, 80)}], ids=str
)
def test_other_image_and_patch_sizes_are_resampled_as_timm_does(file, create, state, tiny, sizes):
    own = {"class_token": False, "fc_norm": False, "num_classes": 0, "global_pool": "avg"}
    stock = VisionTransformer(**own, **{**tiny, **sizes})
    expected = checkpoint_filter_fn({name: tensor.clone() for name, tensor in state.items()}, stock)
    equal(create(file, **sizes), expected)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_adapted_as_timm_does(file, create, state, channels):
    expected = adapt_input_conv(channels, state["patch_embed.proj.weight"].clone())
    equal(create(file, in_chans=channels), {**state, "patch_embed.proj.weight": expected})


def test_wide_grid_comes_from_the_config_and_a_bare_file_is_taken_as_square(create, tmp_path):
    """32x128 pixels are 2x8 patches, as many as 4x4."""
    model = create(None, pretrained=False, img_size=(32, 128))
    model.pos_embed.normal_()
    ijepa_zoo.export(model, tmp_path / "wide")
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    expected = resample_abs_pos_embed(model.pos_embed, [4, 4], [2, 8], num_prefix_tokens=0)
    assert_close(create(tmp_path / "wide").pos_embed, expected)
    assert torch.equal(create(tmp_path / "wide.pth").pos_embed, model.pos_embed)
    wide = create(tmp_path / "wide.pth", img_size=(32, 64), patch_size=(16, 8))
    assert wide.pos_embed.shape == (1, 16, 48)


def test_parts_that_pretraining_lacks_are_initialized(official, create, state):
    model = create(official, num_classes=300, global_pool="map")
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


def test_dtype_and_device_of_the_call_hold(official, create, state, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    equal(create(official, dtype=torch.bfloat16, device="cpu"), half)
    assert {t.device.type for t in create(official, device="meta").parameters()} == {"meta"}
    model = create(write(tmp_path / "half.safetensors", half, "safetensors"))
    equal(model, {name: tensor.float() for name, tensor in half.items()})
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_all_networks_are_opened_once_and_draw_no_random_number(
    official, tiny, tiny_predictor, monkeypatch
):
    opened, load, before = [], torch.load, torch.get_rng_state()
    monkeypatch.setattr(torch, "load", lambda path, **kw: opened.append(path) or load(path, **kw))
    ijepa_zoo.create_ijepa("vit_tiny16_ijepa", checkpoint=official, **tiny, **tiny_predictor)
    assert opened == [official]
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
