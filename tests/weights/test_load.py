import hashlib
import json
import pickle
import shutil
import weakref
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models._manipulate import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError
from ijepa_zoo.weights import formats
from ijepa_zoo.weights.read import _read_safetensors as read_safetensors


def _create(checkpoint, tiny, **kwargs):
    return ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=checkpoint, **{**tiny, **kwargs})


@pytest.fixture(scope="session")
def states(official):
    """The networks of the official file, in our names."""
    content = torch.load(official, weights_only=True)
    return {
        network: {k.removeprefix("module."): v for k, v in content[network].items()}
        for network in ("encoder", "target_encoder", "predictor")
    }


@pytest.fixture
def file(states, tmp_path):
    """The target encoder alone, as a safetensors file."""
    path = tmp_path / "weights.safetensors"
    save_file(states["target_encoder"], path)
    return path


# --- layouts that load ----------------------------------------------------------------------


@pytest.mark.parametrize("network", [None, "target_encoder", "encoder"])
@torch.no_grad()
def test_official_file_gives_the_expected_tokens(official, tiny, expected, network):
    model = _create(official, tiny, network=network)
    wanted = expected[network or "target_encoder"]
    assert_close(model.eval().encode(expected["input"]), wanted, rtol=1e-5, atol=1e-5)
    other = expected["encoder" if network != "encoder" else "target_encoder"]
    assert not torch.allclose(wanted, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", ["timm", "module", "transformers"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".pth.tar", "legacy.pt"])
@torch.no_grad()
def test_bare_state_dicts_load_from_any_kind_of_file(
    layout, suffix, states, tiny, expected, tmp_path
):
    state = states["target_encoder"]
    if layout == "module":
        state = formats.to_official(state)
    elif layout == "transformers":
        state = formats.to_transformers(state, "memory")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization="legacy" not in suffix)
    model = _create(path, tiny).eval()
    assert_close(model.encode(expected["input"]), expected["target_encoder"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])
@torch.no_grad()
def test_transformers_folder_gives_what_transformers_gives(eps, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.IJepaConfig(
        **sizes,
        intermediate_size=100,
        image_size=64,
        patch_size=16,
        layer_norm_eps=eps,
        initializer_range=0.2,
    )
    theirs = transformers.IJepaModel(config).eval()
    theirs.save_pretrained(tmp_path / "folder")
    images = torch.randn(2, 3, 64, 64)
    wanted = theirs(images).last_hidden_state
    model = ijepa_zoo.create_model(f"local-dir:{tmp_path / 'folder'}").eval()
    assert model.norm.eps == model.blocks[0].norm1.eps == eps
    assert_close(model.encode(images), wanted, rtol=1e-4, atol=1e-5)
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 100 / 48, "img_size": 64}
    model = ijepa_zoo.create_model(
        "vit_tiny16_ijepa", checkpoint=tmp_path / "folder", **sizes
    ).eval()
    assert_close(model.encode(images), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_folder_of_stock_timm_loads(states, tiny, expected, tmp_path):
    args = {**tiny, "class_token": False, "fc_norm": False, "num_classes": 0}
    stock = timm.create_model("vit_base_patch16_gap_224", **args)
    stock.load_state_dict(states["target_encoder"])
    timm.models.save_for_hf(stock, tmp_path / "folder", model_args=args, safe_serialization=True)
    model = _create(tmp_path / "folder", tiny).eval()
    assert_close(model.encode(expected["input"]), expected["target_encoder"], rtol=1e-5, atol=1e-5)
    model = ijepa_zoo.create_model(f"local-dir:{tmp_path / 'folder'}").eval()
    assert_close(model.encode(expected["input"]), expected["target_encoder"], rtol=1e-5, atol=1e-5)


# --- sizes that differ ----------------------------------------------------------------------


def _timm_fits(state, **kwargs):
    """What timm's own loading makes of a state dict for a model of these arguments."""
    own = {"class_token": False, "fc_norm": False, "num_classes": 0, "global_pool": "avg"}
    stock = VisionTransformer(**own, **kwargs)
    state = {name: tensor.clone() for name, tensor in state.items()}
    return checkpoint_filter_fn(state, stock)


@pytest.mark.parametrize(
    "sizes",
    [
        {"img_size": 96},
        {"img_size": (96, 64)},
        {"img_size": 32},
        {"patch_size": 8},
        {"patch_size": 32, "img_size": 96},
        {"patch_size": 8, "img_size": (48, 80)},
    ],
    ids=str,
)
def test_other_image_and_patch_sizes_are_resampled_as_timm_does(file, states, tiny, sizes):
    model = _create(file, tiny, **sizes)
    wanted = _timm_fits(states["target_encoder"], **{**tiny, **sizes})
    ours = model.state_dict()
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(ours[name], tensor, rtol=0, atol=0)
    assert ours["pos_embed"].shape != states["target_encoder"]["pos_embed"].shape
    assert model(torch.randn(1, 3, *model.patch_embed.img_size)).isfinite().all()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels_are_adapted_as_timm_does(file, states, tiny, channels):
    model = _create(file, tiny, in_chans=channels)
    weight = states["target_encoder"]["patch_embed.proj.weight"].clone()
    assert_close(
        model.patch_embed.proj.weight.detach(), adapt_input_conv(channels, weight), rtol=0, atol=0
    )
    assert model(torch.randn(1, channels, 64, 64)).shape == (1, 48)


def test_channels_that_cannot_be_adapted_are_refused(states, tiny, tmp_path):
    state = dict(states["target_encoder"])
    state["patch_embed.proj.weight"] = torch.zeros(48, 4, 16, 16)
    save_file(state, tmp_path / "four.safetensors")
    assert (
        _create(tmp_path / "four.safetensors", tiny, in_chans=4).patch_embed.proj.in_channels == 4
    )
    with pytest.raises(CheckpointError, match=r"takes 4 channels.* pass in_chans=4"):
        _create(tmp_path / "four.safetensors", tiny)


def test_positions_of_a_wide_grid_come_from_the_folders_own_grid(states, tiny, tmp_path):
    """32 x 128 pixels are 2 x 8 patches: as many as 4 x 4, so the count alone would mislead."""
    model = _create(None, tiny, pretrained=False, img_size=(32, 128))
    with torch.no_grad():
        model.pos_embed.normal_()
    ijepa_zoo.export(model, tmp_path / "wide")
    loaded = _create(tmp_path / "wide", tiny)
    wanted = resample_abs_pos_embed(model.pos_embed, [4, 4], [2, 8], num_prefix_tokens=0)
    assert_close(loaded.pos_embed, wanted)
    save_file({k: v.detach() for k, v in model.state_dict().items()}, tmp_path / "wide.safetensors")
    # a bare file does not tell its grid: timm takes it for square, and so do we
    bare = _create(tmp_path / "wide.safetensors", tiny)
    assert_close(bare.pos_embed, model.pos_embed, rtol=0, atol=0)


def test_grid_that_nothing_tells_is_refused(states, tiny, tmp_path):
    state = {**states["target_encoder"], "pos_embed": torch.zeros(1, 15, 48)}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="15 positions, which is no square grid"):
        _create(tmp_path / "a.safetensors", tiny)


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 96}, r"is \[48\] in the file, \[96\] in the model"),
        ({"mlp_ratio": 2}, r"mlp\.fc1\.weight is \[192, 48\] in the file, \[96, 48\] in the model"),
        ({"depth": 3}, r"lacks blocks\.2\."),
        ({"depth": 1}, r"no use for blocks\.1\."),
        ({"qkv_bias": False}, r"no use for blocks\.0\.attn\.qkv\.bias"),
        ({"init_values": 0.1}, r"lacks blocks\.0\.ls1\.gamma"),
    ],
    ids=str,
)
def test_other_architectures_are_refused_with_tensors_and_shapes(file, tiny, arguments, message):
    with pytest.raises(CheckpointError, match=rf"weights\.safetensors does not fit.*{message}"):
        _create(file, tiny, **arguments)


def test_a_tensor_too_few_or_too_many_is_refused(states, tiny, tmp_path):
    state = dict(states["target_encoder"])
    bias = state.pop("blocks.1.mlp.fc2.bias")
    save_file(state, tmp_path / "few.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks blocks\.1\.mlp\.fc2\.bias"):
        _create(tmp_path / "few.safetensors", tiny)
    save_file({**states["target_encoder"], "ema.step": bias.clone()}, tmp_path / "many.safetensors")
    with pytest.raises(CheckpointError, match=r"no use for ema\.step"):
        _create(tmp_path / "many.safetensors", tiny)


@pytest.mark.parametrize("layout", ["native", "timm", "transformers"])
def test_other_number_of_heads_is_noticed_where_a_configuration_tells(
    layout, official, tiny, tmp_path
):
    ijepa_zoo.export(official, tmp_path / "a", layout, model_name="vit_tiny16_ijepa", **tiny)
    _create(tmp_path / "a", tiny)
    with pytest.raises(CheckpointError, match=r"num_heads=3, the model asked for has num_heads=4"):
        _create(tmp_path / "a", tiny, num_heads=4)


def test_network_that_is_not_there_is_refused(official, file, tiny, tmp_path):
    with pytest.raises(CheckpointError, match="does not say which: leave network out"):
        _create(file, tiny, network="encoder")
    with pytest.raises(CheckpointError, match="network must be one of"):
        _create(official, tiny, network="decoder")
    ijepa_zoo.export(
        official, tmp_path / "a", "timm", model_name="vit_tiny16_ijepa", network="encoder", **tiny
    )
    with pytest.raises(CheckpointError, match="holds encoder, but no target_encoder"):
        _create(tmp_path / "a", tiny, network="target_encoder")
    assert _create(tmp_path / "a", tiny, network="encoder") is not None


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_pickles_with_code_are_refused_and_not_run(kind, states, tiny, tmp_path):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {**states["target_encoder"], "norm.bias": _Touch(trace)}
    if kind == "bare":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"evil\.pth cannot be read .* never loaded"):
        _create(path, tiny)
    assert not trace.exists()
    torch.load(path, weights_only=False) if kind != "bare" else pickle.loads(path.read_bytes())
    assert trace.exists()  # the trap itself works


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["official", "legacy", "safetensors"])
def test_files_cut_short_are_refused(kind, share, official, states, tiny, tmp_path):
    suffix = {"official": ".pth.tar", "legacy": ".pth", "safetensors": ".safetensors"}[kind]
    whole, part = tmp_path / f"whole{suffix}", tmp_path / f"part{suffix}"
    if kind == "official":
        shutil.copy(official, whole)
    elif kind == "legacy":
        torch.save(states["encoder"], whole, _use_new_zipfile_serialization=False)
    else:
        save_file(states["encoder"], whole)
    _create(whole, tiny)
    content = whole.read_bytes()
    part.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=rf"part{suffix}.*damaged"):
        _create(part, tiny)


@pytest.mark.parametrize("suffix", [".pth.tar", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"hello world\n" * 9, b"<!DOCTYPE html><html>404</html>", b"version https://git-lfs", b"."],
    ids=["text", "page", "pointer", "dot"],
)
def test_text_under_the_name_of_a_checkpoint_is_refused(content, suffix, tiny, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"weights{suffix}"):
        _create(path, tiny)


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(1)],
        torch.zeros(1),
        {1: torch.zeros(1)},
        {},
        {"state_dict": {"pos_embed": torch.zeros(1)}},
        {"encoder": 1, "predictor": 2, "target_encoder": 3},
        {"pos_embed": 1, "patch_embed.proj.weight": 2},
    ],
    ids=str,
)
def test_files_of_something_else_are_refused(content, tiny, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth (holds|is no I-JEPA)"):
        _create(tmp_path / "weights.pth", tiny)


def test_places_without_a_checkpoint_are_refused(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        _create(tmp_path / "nowhere.pth", tiny)
    with pytest.raises(CheckpointError, match="write hf-hub:facebook/ijepa"):
        _create("facebook/ijepa", tiny)
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"ends in \.safetensors or one of"):
        _create(tmp_path / "weights.onnx", tiny)
    with pytest.raises(CheckpointError, match=r"has no config\.json; it holds weights\.onnx"):
        _create(tmp_path, tiny)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json is damaged"),
        ("[1]", "config.json is damaged"),
        ("{}", "describes no I-JEPA model"),
        ('{"model_type": "vit", "hidden_size": 8}', "hidden_size, model_type"),
        ('{"model_type": "ijepa", "hidden_size": 8}', "lacks image_size"),
    ],
)
def test_folders_with_another_configuration_are_refused(config, message, tiny, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        _create(tmp_path, tiny)


@pytest.fixture
def folder(official, tiny, tmp_path):
    kwargs = {"model_name": "vit_tiny16_ijepa", **tiny}
    return ijepa_zoo.export(official, tmp_path / "folder", "transformers", **kwargs)


def test_sharded_folder_is_refused_with_what_it_holds(folder, tiny):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors; it holds .*00001-of-00002"):
        _create(folder, tiny)


def test_folder_whose_file_is_of_another_layout_is_refused(folder, states, tiny):
    save_file(states["encoder"], folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"says transformers, but .* has timm names"):
        _create(folder, tiny)


def test_other_activation_is_refused(folder, tiny):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(CheckpointError, match="hidden_act is 'relu'"):
        _create(folder, tiny)


# --- how it is loaded -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "official", "legacy"])
def test_training_a_loaded_model_leaves_its_file_as_it_is(kind, official, states, tiny, tmp_path):
    path = tmp_path / {"official": "a.pth.tar", "safetensors": "a.safetensors"}.get(kind, "a.pth")
    if kind == "official":
        shutil.copy(official, path)
    elif kind == "safetensors":
        save_file(states["target_encoder"], path)
    else:
        torch.save(states["target_encoder"], path, _use_new_zipfile_serialization=False)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    model, twin = _create(path, tiny), _create(path, tiny)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.pos_embed.zero_()
    assert not torch.equal(model.norm.weight, twin.norm.weight)
    assert_close(dict(twin.state_dict()), states["target_encoder"], rtol=0, atol=0)
    del model, twin, optimizer
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_loading_makes_no_random_numbers(official, file, tiny, tiny_predictor):
    state = torch.get_rng_state()
    _create(official, tiny)
    _create(file, tiny, img_size=96)
    ijepa_zoo.create_ijepa("vit_tiny16_ijepa", checkpoint=official, **tiny, **tiny_predictor)
    assert torch.equal(torch.get_rng_state(), state)
    _create(None, tiny, pretrained=False)
    assert not torch.equal(torch.get_rng_state(), state)


def test_tensors_are_those_of_the_file_and_no_copies(file, tiny, monkeypatch):
    given = []

    def remember(path):
        given.append(load_file(path))
        return given[-1]

    monkeypatch.setattr("ijepa_zoo.weights.read.read_safetensors", remember)
    model = _create(file, tiny)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == given[-1][name].data_ptr(), name


def test_every_parameter_is_real_and_trainable(official, tiny):
    model = _create(official, tiny)
    assert model.training
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert not model.pos_embed.is_meta
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_data_type_of_the_call_holds(official, states, tiny, dtype):
    model = _create(official, tiny, dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert_close(tensor, states["target_encoder"][name].to(dtype), rtol=0, atol=0)


def test_tensors_of_another_data_type_are_let_go_one_by_one(file, tiny, monkeypatch):
    alive = []

    def remember(path):
        state = read_safetensors(path)
        alive.append([weakref.ref(tensor) for tensor in state.values()])
        return state

    convert = torch.Tensor.to

    def watched(tensor, *args, **kwargs):
        if kwargs.get("dtype") is torch.bfloat16:
            left.append(sum(tensor() is not None for tensor in alive[-1]))
        return convert(tensor, *args, **kwargs)

    left = []
    monkeypatch.setattr("ijepa_zoo.weights.read.read_safetensors", remember)
    monkeypatch.setattr(torch.Tensor, "to", watched)
    _create(file, tiny, dtype=torch.bfloat16)
    assert left[-len(alive[-1]) :] == list(range(len(alive[-1]), 0, -1))


def test_file_in_half_precision_gives_a_model_in_full(states, tiny, tmp_path):
    half = {name: tensor.half() for name, tensor in states["encoder"].items()}
    save_file(half, tmp_path / "half.safetensors")
    model = _create(tmp_path / "half.safetensors", tiny)
    for name, tensor in model.state_dict().items():
        assert_close(tensor, half[name].float(), rtol=0, atol=0)


def test_device_of_the_call_holds(official, tiny):
    model = _create(official, tiny, device="meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    model = _create(official, tiny, device="cpu")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_parts_that_pretraining_had_not_are_initialised(official, states, tiny, pool):
    model = _create(official, tiny, num_classes=300, global_pool=pool)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.head.bias == 0).all()
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all()
        if name.startswith("attn_pool.") and name.endswith("weight") and "norm" not in name:
            assert 0.001 < tensor.std() < 0.2, name
        elif not name.startswith(("head.", "attn_pool.")):
            assert torch.equal(tensor, states["target_encoder"][name]), name
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 300)


def test_classifier_is_kept_where_it_fits_and_made_anew_where_not(official, tiny, tmp_path):
    model = _create(official, tiny, num_classes=6)
    save_file(dict(model.state_dict()), tmp_path / "a.safetensors")
    same = _create(tmp_path / "a.safetensors", tiny, num_classes=6)
    assert torch.equal(same.head.weight, model.head.weight)
    other = _create(tmp_path / "a.safetensors", tiny, num_classes=4)
    assert other.head.weight.shape == (4, 48)
    assert other.head.weight.std() > 0
    assert torch.equal(_create(tmp_path / "a.safetensors", tiny).norm.bias, model.norm.bias)


@torch.no_grad()
def test_features_only_of_a_checkpoint(official, tiny, expected):
    whole = _create(official, tiny).eval()
    wanted = whole.forward_intermediates(expected["input"], intermediates_only=True)
    features = _create(official, tiny, features_only=True, out_indices=[0, 1]).eval()
    assert_close(features(expected["input"]), wanted)


def test_safetensors_written_by_others_need_no_metadata(states, tiny, tmp_path):
    data = safetensors.torch.save(states["encoder"])
    (tmp_path / "plain.safetensors").write_bytes(data)
    assert torch.equal(
        _create(tmp_path / "plain.safetensors", tiny).norm.bias, states["encoder"]["norm.bias"]
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64])
def test_tensors_that_are_no_weights_are_refused(states, tiny, tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in states["encoder"].items()}
    save_file(state, tmp_path / "quantised.safetensors")
    with pytest.raises(CheckpointError, match="no floating-point weights"):
        _create(tmp_path / "quantised.safetensors", tiny)


def test_compressed_records_are_refused_before_they_unfold(states, tiny, tmp_path):
    torch.save(states["encoder"], tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(CheckpointError, match="compressed records"):
        _create(tmp_path / "bomb.pth", tiny)


def test_odd_content_is_refused(states, tiny, tmp_path):
    names = ("encoder", "predictor", "target_encoder")
    torch.save({name: {1: 2} for name in names}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no tensors: 1"):
        _create(tmp_path / "a.pt", tiny)
    for name, shape in (("pos_embed", (1, 0, 48)), ("patch_embed.proj.weight", (48, 3, 0, 0))):
        save_file({**states["encoder"], name: torch.zeros(shape)}, tmp_path / "b.safetensors")
        with pytest.raises(CheckpointError, match=f"differ in shape: {name}"):
            _create(tmp_path / "b.safetensors", tiny)


@pytest.mark.parametrize("place", ["", "local-dir:"])
def test_an_empty_path_is_not_the_current_folder(tiny, place):
    with pytest.raises(CheckpointError, match="path is empty"):
        _create(place, tiny)


def test_a_label_that_names_no_network_means_nothing(states, tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(states["encoder"], path, metadata={"network": "../../evil"})
    folder = ijepa_zoo.export(path, tmp_path / "a", "timm", model_name="vit_tiny16_ijepa", **tiny)
    assert "evil" not in (folder / "config.json").read_text()
