"""Files of one's own weights: names of tensors, what loads, how it is fitted, what is refused."""

import argparse
import logging
import pickle
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models._manipulate import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError
from ijepa_zoo.weights import formats

WIDTH, DEPTH, CLASSES = 8, 12, 5  # numbers of blocks with two digits
ONE = torch.ones(1)


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
    "ddp": (lambda s: prefixed(s, "_orig_mod.module."), "'_orig_mod.', 'module.'"),
    "timm train": (lambda s: {"state_dict": {}, "state_dict_ema": s}, "'state_dict_ema' is used"),
    "lightning": (
        lambda s: {"state_dict": prefixed(s, "model.") | {"criterion.weight": torch.ones(2)}},
        "criterion.weight",
    ),
    "classifier": (
        lambda s: {**prefixed(s, "backbone."), "head.weight": torch.ones(10, 48)},
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


@pytest.mark.parametrize(
    ("change", "arguments", "named"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), {}, r"lacks blocks\.1\.mlp\.fc2\.bias"),
        (lambda s: s.update({"ema.step": torch.ones(1)}), {}, r"ema\.step"),
        (lambda s: s.update(prefixed(s, "module.")), {}, "'module.'"),
        (lambda s: s.update({"_orig_mod.norm.bias": s["norm.bias"]}), {}, r"norm\.bias twice"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 15, 48)), {}, "15"),
        (lambda s: s.update({"norm.bias": torch.ones(48).char()}), {}, r"norm\.bias.*int8"),
        (lambda s: s.clear(), {}, "nothing"),
        (lambda s: s.update(cls_token=torch.zeros(1, 1, 48)), {}, "cls_token"),
        (lambda s: s.update({"a.predictor_embed.weight": s["norm.bias"]}), {}, "several networks"),
        (lambda s: s.update(epoch=3) or s.pop("pos_embed"), {}, "pos_embed"),
        (
            lambda s: s.update({"patch_embed.proj.weight": torch.zeros(48, 4, 16, 16)}),
            {},
            "in_chans=4",
        ),
        (len, {"embed_dim": 96}, r"is \[48.*\], in the model \[96"),
        (len, {"depth": 3}, r"lacks blocks\.2\."),
        (len, {"depth": 1}, r"unused blocks\.1\."),
        (len, {"qkv_bias": False}, r"blocks\.0\.attn\.qkv\.bias"),
        (len, {"network": "encoder"}, "network="),
    ],
)
def test_tensors_and_models_that_do_not_fit_are_refused(
    create, state, tmp_path, change, arguments, named
):
    change(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"a\.pth.*{named}"):
        create(tmp_path / "a.pth", **arguments)


class _Touch:
    def __reduce__(self):
        return Path.touch, (Path("trace"),)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize(
    "value", [argparse.Namespace(lr=1), np.float64(0.5), _Touch()], ids=["args", "numpy", "touch"]
)
def test_objects_of_other_classes_are_not_loaded(create, state, tmp_path, value, kind):
    path = write(tmp_path / "a.ckpt", {"state_dict": state, "hyper_parameters": value}, kind)
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*state_dict\(\)") as caught:
        create(path)
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    assert not Path("trace").exists()


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


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("nowhere.pth", r"nowhere\.pth"),
        ("facebook/ijepa", "hf-hub:facebook/ijepa"),
        (Path(__file__).parent, r"config\.json"),
    ],
)
def test_paths_without_a_checkpoint_are_refused(create, path, named):
    with pytest.raises(CheckpointError, match=named):
        create(path)


@pytest.mark.parametrize(
    "sizes",
    [{"img_size": (96, 64), "in_chans": 1}, {"patch_size": 8, "img_size": (48, 80), "in_chans": 4}],
    ids=str,
)
def test_other_sizes_and_channels_are_adapted_as_timm_does(official, create, state, tiny, sizes):
    own = {"class_token": False, "fc_norm": False, "num_classes": 0, "global_pool": "avg"}
    stock = VisionTransformer(**own, **{**tiny, **sizes})
    expected = checkpoint_filter_fn({name: tensor.clone() for name, tensor in state.items()}, stock)
    name = "patch_embed.proj.weight"
    expected[name] = adapt_input_conv(sizes["in_chans"], expected[name])
    equal(create(official, **sizes), expected)


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
def test_tensors_are_mapped_from_the_file_without_a_copy(create, state, tmp_path):
    file = write(tmp_path / "a.safetensors", state, "safetensors")
    model, content = create(file), file.read_bytes()
    with file.open("r+b") as opened:  # pages that nobody has written to show the change
        opened.seek(content.index(state["norm.bias"].numpy().tobytes()))
        opened.write(torch.full((48,), 7.0).numpy().tobytes())
    assert (load_file(file)["norm.bias"] == 7).all()
    assert (model.norm.bias == 7).all()


def make_state(num_classes):
    size = {"img_size": 4, "patch_size": 2, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}
    model = ijepa_zoo.create_model(
        "vit_custom_ijepa", pretrained=False, num_classes=num_classes, **size
    )
    return {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_names_of_transformers_and_back(num_classes, tmp_path):
    state = make_state(num_classes)
    theirs = formats.to_transformers(state, "memory")
    body = {name.removeprefix("ijepa."): tensor for name, tensor in theirs.items()}
    assert_close(formats.from_transformers(body, "memory"), state, rtol=0, atol=0)
    transformers = pytest.importorskip("transformers")
    config = transformers.IJepaConfig(
        **{"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2},
        **{"intermediate_size": 4 * WIDTH, "image_size": 4, "patch_size": 2},
        num_labels=CLASSES,
    )
    kind = transformers.IJepaForImageClassification if num_classes else transformers.IJepaModel
    kind(config).save_pretrained(tmp_path)
    written = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in written.items()}


def test_tensors_that_transformers_lacks_are_refused():
    state = make_state(0)
    theirs = formats.to_transformers(state, "memory")
    with pytest.raises(CheckpointError, match=r"some/file.*pooler\.dense\.weight"):
        formats.from_transformers({**theirs, "pooler.dense.weight": ONE}, "some/file")
    del theirs["encoder.layer.11.attention.attention.key.bias"]
    with pytest.raises(CheckpointError, match=r"some/file.*layer\.11\..*key\.bias"):
        formats.from_transformers(theirs, "some/file")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.ls1\.gamma"):
        formats.to_transformers({**state, "blocks.0.ls1.gamma": ONE}, "memory")


PREFIX = st.sampled_from(["module.", "_orig_mod.", "model.", "_fsdp_wrapped_module."])
PREFIXES = st.lists(PREFIX, max_size=3).map("".join)
WRAPPERS = "state_dict_ema model_ema state_dict model model_state_dict module teacher net network"
WRAPPERS = ["", "weights", *WRAPPERS.split()]


@given(PREFIXES, st.sampled_from(WRAPPERS), st.booleans())
def test_any_prefix_and_wrapper_is_removed(prefix, wrapper, is_transformers):
    state = {"pos_embed": ONE, "patch_embed.proj.weight": ONE + 1, "blocks.0.norm1.bias": ONE + 2}
    names = formats.to_transformers(state, "memory") if is_transformers else state
    content = {prefix + name: tensor for name, tensor in names.items()}
    content = {wrapper: content, "epoch": 3} if wrapper else content
    assert formats.find_networks(content, "some/file") == {"unlabeled": state}


@given(PREFIXES, st.sets(st.sampled_from(["encoder", "target_encoder", "predictor"]), min_size=2))
def test_networks_of_one_module_are_told_apart(prefix, networks):
    own = {name: {"pos_embed": ONE, "patch_embed.proj.weight": ONE} for name in networks}
    if "predictor" in own:
        own["predictor"] = {"predictor_embed.weight": ONE, "mask_token": ONE}
    content = {f"{prefix}{n}.{key}": t for n, state in own.items() for key, t in state.items()}
    assert formats.find_networks(content, "some/file") == own
    assert formats.find_networks(own, "some/file") == own


@pytest.mark.parametrize("name", ["epoch", "fc.bias", "vit.embeddings.position_embeddings", ""])
def test_other_contents_are_refused_with_what_was_found(name):
    with pytest.raises(CheckpointError, match=f"some/file.*{name or 'nothing'}"):
        formats.find_networks({name: ONE} if name else {}, "some/file")
