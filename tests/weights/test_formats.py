"""Tensor names of transformers and of wrappers, and the header of safetensors files."""

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError, SettingsError
from ijepa_zoo.weights import formats

WIDTH, DEPTH, CLASSES = 8, 12, 5  # numbers of blocks with two digits
ONE = torch.ones(1)


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


def test_safetensors_header_is_that_of_the_package():
    dtypes = (torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16)
    dtypes += (torch.float16, torch.int16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool)
    tensors = {f"{kind}ä{n}": torch.arange(n).to(kind) for n in (0, 3) for kind in dtypes}
    tensors["scalar"] = torch.tensor(3.5)
    tensors |= {"a": torch.arange(9.0), "z": torch.arange(2.0)}  # by name, not by shape
    described = {name: (t.dtype, tuple(t.shape)) for name, t in reversed(tensors.items())}
    header, starts = formats.safetensors_header(described, {"format": "pt"})
    expected = safetensors.torch.save(tensors, {"format": "pt"})
    assert expected.startswith(header)
    for name, tensor in tensors.items():
        written = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert expected[starts[name] : starts[name] + len(written)] == written
    with pytest.raises(SettingsError, match="complex128"):
        formats.safetensors_header({"a": (torch.complex128, ())}, {})
