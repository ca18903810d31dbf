import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo import cli
from ijepa_zoo.errors import CheckpointError, RunError
from ijepa_zoo.weights import formats
from ijepa_zoo.weights.export import write_folder

LAYOUTS = ("native", "timm", "transformers", "official")


@pytest.fixture
def source(official, tiny):
    """Arguments of an export of the official file."""

    def export(folder, to, **kwargs):
        return ijepa_zoo.export(
            official, folder, to, **{"model_name": "vit_tiny16_ijepa", **tiny, **kwargs}
        )

    return export


def _encoder(tiny, **kwargs):
    """A random encoder that is far from linear."""
    model = ijepa_zoo.create_model("vit_tiny16_ijepa", pretrained=False, **{**tiny, **kwargs})
    with torch.no_grad():
        for tensor in (*model.parameters(), model.pos_embed):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def _equal(ours, theirs, path=""):
    """Same types, keys, values and bits, all the way down."""
    assert type(ours) is type(theirs), path
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype, path
        assert torch.equal(ours, theirs), path
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), path
        for key in theirs:
            _equal(ours[key], theirs[key], f"{path}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), path
        for place, pair in enumerate(zip(ours, theirs, strict=True)):
            _equal(*pair, f"{path}/{place}")
    else:
        assert ours == theirs, path


# --- loaded by the other library ------------------------------------------------------------


@pytest.mark.parametrize("to", ["timm", "native"])
@pytest.mark.parametrize("network", [None, "encoder"])
@torch.no_grad()
def test_stock_timm_loads_it(source, expected, tmp_path, to, network):
    folder = source(tmp_path / "a", to, network=network)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(model) is timm.models.VisionTransformer
    wanted = expected[network or "target_encoder"]
    assert_close(model.forward_features(expected["input"]), wanted, rtol=1e-5, atol=1e-5)
    assert_close(model(expected["input"]), wanted.mean(1), rtol=1e-5, atol=1e-5)
    config = resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, 64, 64)
    assert tuple(config["mean"]) == (0.485, 0.456, 0.406)
    assert tuple(config["std"]) == (0.229, 0.224, 0.225)
    assert config["interpolation"] == "bicubic"
    fine_tuned = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)
    assert fine_tuned(expected["input"]).shape == (2, 3)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"img_size": (96, 64)},
        {"patch_size": (8, 16)},
        {"in_chans": 1},
        {"mlp_ratio": 1.7},
        {"qkv_bias": False},
        {"num_classes": 5},
        {"num_classes": 5, "global_pool": "max"},
        {"num_classes": 5, "global_pool": "map"},
        {"drop_path_rate": 0.1, "dynamic_img_size": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_stock_timm_gives_the_output_of_any_plain_encoder(tiny, tmp_path, kwargs):
    model = _encoder(tiny, **kwargs)
    images = torch.randn(2, kwargs.get("in_chans", 3), *model.patch_embed.img_size)
    for to in ("timm", "native"):
        folder = ijepa_zoo.export(model, tmp_path / to, to)
        stock = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert_close(stock(images), model(images), rtol=1e-5, atol=1e-5)
        again = ijepa_zoo.create_model(f"local-dir:{folder}").eval()
        assert_close(again(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", [None, "encoder"])
@torch.no_grad()
def test_transformers_loads_it(source, expected, tmp_path, network):
    transformers = pytest.importorskip("transformers")
    folder = source(tmp_path / "a", "transformers", network=network)
    for kind in (transformers.IJepaModel, transformers.AutoModel):
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        tokens = model.eval()(expected["input"]).last_hidden_state
        assert_close(tokens, expected[network or "target_encoder"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"patch_size": 8, "mlp_ratio": 1.7},
        {"qkv_bias": False, "img_size": 96},
        {"norm_layer": torch.nn.LayerNorm},
    ],
    ids=str,
)
@torch.no_grad()
def test_transformers_gives_the_output_of_any_plain_encoder(tiny, tmp_path, kwargs):
    transformers = pytest.importorskip("transformers")
    model = _encoder(tiny, **kwargs)
    folder = ijepa_zoo.export(model, tmp_path / "a", "transformers")
    theirs = transformers.IJepaModel.from_pretrained(folder).eval()
    assert theirs.config.layer_norm_eps == model.norm.eps
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    assert_close(theirs(images).last_hidden_state, model.encode(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_transformers_classifier_gives_our_logits(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = _encoder(tiny, num_classes=5)
    folder = ijepa_zoo.export(model, tmp_path / "a", "transformers")
    theirs, info = transformers.IJepaForImageClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    assert theirs.config.num_labels == 5
    images = torch.randn(2, 3, 64, 64)
    assert_close(theirs.eval()(images).logits, model(images), rtol=1e-4, atol=1e-5)
    again = ijepa_zoo.create_model(f"local-dir:{folder}", num_classes=5).eval()
    assert_close(again(images), model(images), rtol=1e-5, atol=1e-5)


def _photo(width, height):
    """Smooth colours with some noise, so that resampling matters and rounding does not."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    return Image.fromarray((smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype("u1"))


@pytest.mark.parametrize("size", [(300, 200), (97, 131), (64, 64)], ids=str)
def test_image_processor_gives_the_pixels_of_the_evaluation_transform(tiny, tmp_path, size):
    transformers = pytest.importorskip("transformers")
    model = _encoder(tiny)
    folder = ijepa_zoo.export(model, tmp_path / "a", "transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image = _photo(*size)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    stock = create_transform(**{**resolve_model_data_config(model), "input_size": (3, 64, 64)})
    for ours in (stock(image), ijepa_zoo.create_transform(model)(image)):
        difference = (theirs - ours).abs()
        assert difference.max() < 2.5 / 255 / 0.224  # two grey levels
        assert difference.mean() < 0.002
    grey = processor(image.convert("L"), return_tensors="pt")["pixel_values"]
    assert grey.shape == (1, 3, 64, 64)


def test_official_file_has_the_published_names_in_the_published_order(source, official, tmp_path):
    folder = source(tmp_path / "a", "official")
    ours = torch.load(folder / "ijepa-latest.pth.tar", weights_only=True)
    published = torch.load(official, weights_only=True)
    assert set(ours) == set(published)
    for network in ("encoder", "predictor", "target_encoder"):
        assert list(ours[network]) == list(published[network])
        assert all(name.startswith("module.") for name in ours[network])


@pytest.mark.parametrize("between", ["native", "official"])
def test_round_trip_of_an_official_file_is_exact(source, official, tmp_path, between):
    middle = source(tmp_path / "middle", between)
    if between == "official":
        ijepa_zoo.export(
            middle / "ijepa-latest.pth.tar",
            tmp_path / "end",
            "official",
            model_name="vit_tiny16_ijepa",
            img_size=64,
            embed_dim=48,
            depth=2,
            num_heads=3,
        )
    else:
        ijepa_zoo.export(middle, tmp_path / "end", "official")
    end = torch.load(tmp_path / "end" / "ijepa-latest.pth.tar", weights_only=True)
    _equal(end, torch.load(official, weights_only=True))


def test_round_trip_of_all_networks_in_memory_is_exact(tiny, tiny_predictor, tmp_path):
    ijepa = ijepa_zoo.create_ijepa("vit_tiny16_ijepa", pretrained=False, **tiny, **tiny_predictor)
    ijepa.update_target(0.5)
    with torch.no_grad():
        ijepa.encoder.norm.bias.normal_()
    native = ijepa_zoo.export(ijepa, tmp_path / "native")
    again = ijepa_zoo.create_ijepa(f"local-dir:{native}")
    _equal(dict(again.state_dict()), dict(ijepa.state_dict()))
    official = ijepa_zoo.export(ijepa, tmp_path / "official", "official")
    again = ijepa_zoo.create_ijepa(
        "vit_tiny16_ijepa",
        checkpoint=official / "ijepa-latest.pth.tar",
        **tiny,
        **tiny_predictor,
    )
    _equal(dict(again.state_dict()), dict(ijepa.state_dict()))


def test_optimizer_of_a_fresh_official_file_is_one_that_adamw_takes(tiny, tiny_predictor, tmp_path):
    """The published code builds four groups and loads the file's state into them."""
    ijepa = ijepa_zoo.create_ijepa("vit_tiny16_ijepa", pretrained=False, **tiny, **tiny_predictor)
    folder = ijepa_zoo.export(ijepa, tmp_path / "a", "official")
    content = torch.load(folder / "ijepa-latest.pth.tar", weights_only=True)
    networks = [content["encoder"], content["predictor"]]
    groups = [
        [torch.nn.Parameter(t) for n, t in state.items() if ("bias" in n or t.ndim == 1) == exempt]
        for exempt in (False, True)
        for state in networks
    ]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    optimizer.load_state_dict(content["opt"])
    assert [group["weight_decay"] for group in optimizer.param_groups][2:] == [0, 0]
    assert {"epoch", "loss", "batch_size", "world_size", "lr", "scaler"} <= set(content)


# --- what cannot be expressed ---------------------------------------------------------------


@pytest.mark.parametrize("to", ["native", "timm", "transformers"])
@pytest.mark.parametrize(
    ("kwargs", "difference"),
    [
        ({"qk_norm": True}, "blocks.0.attn.k_norm"),
        ({"init_values": 0.1}, "ls1"),
        ({"act_layer": "relu"}, "ReLU"),
        ({"final_norm": False}, "norm.bias"),
        ({"pre_norm": True}, "norm_pre"),
        ({"pos_embed": "none"}, "pos_embed"),
        ({"fc_norm": True}, "fc_norm"),
    ],
    ids=str,
)
def test_encoders_that_are_not_plain_are_refused(tiny, tmp_path, to, kwargs, difference):
    model = ijepa_zoo.create_model("vit_tiny16_ijepa", pretrained=False, **tiny, **kwargs)
    with pytest.raises(CheckpointError, match=f"no layout can say how it differs.*{difference}"):
        ijepa_zoo.export(model, tmp_path / "a", to)
    assert not list(tmp_path.iterdir())


def test_what_a_layout_cannot_say_is_refused(source, official, tiny, tmp_path):
    cases = [
        ({"norm_layer": torch.nn.LayerNorm}, "timm", "epsilon 1e-05"),
        ({"num_classes": 5, "global_pool": "max"}, "transformers", "global_pool='max'"),
        ({"num_classes": 5, "global_pool": "map"}, "transformers", "no place for attn_pool"),
        ({"img_size": (96, 64)}, "transformers", "cannot say how images become 96x64"),
        ({}, "official", "has no encoder and no predictor"),
    ]
    for kwargs, to, message in cases:
        with pytest.raises(CheckpointError, match=message):
            ijepa_zoo.export(_encoder(tiny, **kwargs), tmp_path / "a", to)
    with pytest.raises(CheckpointError, match=r"leave network \(--network\) out"):
        source(tmp_path / "a", "official", network="encoder")
    with pytest.raises(CheckpointError, match="give the model, for example"):
        ijepa_zoo.export(official, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"lacks blocks\.2"):
        source(tmp_path / "a", "timm", depth=3)
    with pytest.raises(ValueError, match="to must be one of native, timm"):
        source(tmp_path / "a", "onnx")
    with pytest.raises(ValueError, match="not for a model: depth"):
        ijepa_zoo.export(_encoder(tiny), tmp_path / "a", depth=3)
    with pytest.raises(ValueError, match="IJepa or IJepaEncoder, got Linear"):
        ijepa_zoo.export(torch.nn.Linear(2, 2), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_native_export_of_a_file_that_does_not_name_its_network(source, tiny, tmp_path):
    folder = source(tmp_path / "a", "timm", network="encoder")
    kwargs = {"model_name": "vit_tiny16_ijepa", **tiny}
    bare = folder / "bare.pth"
    torch.save(load_file(folder / "model.safetensors"), bare)
    with pytest.raises(CheckpointError, match="does not say which network it holds"):
        ijepa_zoo.export(bare, tmp_path / "b", **kwargs)
    ijepa_zoo.export(bare, tmp_path / "b", network="encoder", **kwargs)
    ijepa_zoo.create_model(f"local-dir:{tmp_path / 'b'}", network="encoder")
    with pytest.raises(CheckpointError, match="holds encoder, but no target_encoder"):
        ijepa_zoo.create_model(f"local-dir:{tmp_path / 'b'}", network="target_encoder")


# --- folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("to", LAYOUTS)
def test_existing_folder_is_kept_unless_overwritten_and_then_replaced_whole(source, tmp_path, to):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"old")
    (folder / "networks").mkdir()
    (folder / "networks" / "stale.safetensors").write_bytes(b"old")
    with pytest.raises(RunError, match=r"exists: .* overwrite=True \(--overwrite\)"):
        source(folder, to)
    assert (folder / "model.safetensors").read_bytes() == b"old"
    source(folder, to, overwrite=True)
    assert not (folder / "networks" / "stale.safetensors").exists()
    fresh = source(tmp_path / "b", to)
    names = sorted(path.name for path in fresh.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_overwriting_spares_a_folder_of_other_files(source, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(RunError, match=r"no export of this package, it holds photo\.jpg"):
        source(tmp_path, "timm", overwrite=True)
    with pytest.raises(RunError, match="no export"):
        source(tmp_path / "photo.jpg", "timm", overwrite=True)
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("to", LAYOUTS)
def test_interrupted_write_leaves_nothing_behind(source, tmp_path, monkeypatch, to, error, exists):
    folder = tmp_path / "a"
    if exists:
        folder.mkdir()
        (folder / "README.md").write_text("old")

    def half(content, target, **kwargs):
        if isinstance(target, Path):
            target.write_bytes(b"half")
        else:
            target.write(b"half")
        raise error

    monkeypatch.setattr("ijepa_zoo.weights.writers.save_file", half)
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt):
        source(folder, to, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == (["a", "README.md"] if exists else [])


@pytest.mark.parametrize("to", LAYOUTS)
def test_half_precision_halves_the_file_and_still_loads(source, tiny, expected, tmp_path, to):
    whole, half = source(tmp_path / "a", to), source(tmp_path / "b", to, dtype=torch.float16)
    name = "ijepa-latest.pth.tar" if to == "official" else "model.safetensors"
    path = half / name
    if to != "official":  # whose optimizer state stays as it is
        assert path.stat().st_size < 0.6 * (whole / name).stat().st_size
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    model = ijepa_zoo.create_model(
        "vit_tiny16_ijepa", checkpoint=path if to == "official" else half, **tiny
    ).eval()
    with torch.no_grad():
        tokens = model.encode(expected["input"])
    assert tokens.dtype == torch.float32
    assert_close(tokens, expected["target_encoder"], rtol=1e-2, atol=1e-2)
    assert not torch.equal(tokens, expected["target_encoder"])


def test_exports_can_be_read_by_everybody(source, tmp_path):
    folder = source(tmp_path / "a", "native")
    assert folder.stat().st_mode & 0o055 == 0o055
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())


# --- descriptions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "words"), [("target_encoder", "target encoder"), ("encoder", "context encoder")]
)
@pytest.mark.parametrize("to", ["native", "timm", "transformers"])
def test_card_says_network_licence_preprocessing_and_how_to_load(
    source, official, tmp_path, to, network, words
):
    folder = source(tmp_path / "a", to, network=network, license="CC-BY-NC-4.0")
    card = (folder / "README.md").read_text(encoding="utf-8")
    head, body = card.removeprefix("---\n").split("---\n", 1)
    assert "license: cc-by-nc-4.0" in head.splitlines()
    library = "transformers" if to == "transformers" else "timm"
    assert f"library_name: {library}" in head.splitlines()
    assert f"the **{words}** of I-JEPA" in body
    assert "CC-BY-NC-4.0" in body
    assert "arXiv:2301.08243" in body
    assert "0.485" in body
    assert str(official.parent) not in card  # no path of this machine
    assert str(official.parent) not in (folder / "config.json").read_text()


@pytest.mark.parametrize("to", ["native", "timm", "transformers"])
@torch.no_grad()
def test_code_in_the_card_runs(source, expected, tmp_path, to):
    if to == "transformers":
        pytest.importorskip("transformers")
    folder = source(tmp_path / "a", to)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"image": _photo(90, 70)}
    exec(code.replace("FOLDER", str(folder)), names)
    model = names["model"].eval()
    if to == "transformers":
        assert names["features"].shape == (1, 48)
        tokens = model(expected["input"]).last_hidden_state
    else:
        tokens = model.forward_features(expected["input"])
    assert_close(tokens, expected["target_encoder"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["native", "timm", "transformers"])
def test_folder_names_its_network(source, tiny, tmp_path, to):
    folder = source(tmp_path / "a", to, network="encoder")
    kwargs = {"checkpoint": folder, **tiny}
    ijepa_zoo.create_model("vit_tiny16_ijepa", network="encoder", **kwargs)
    with pytest.raises(CheckpointError, match="holds encoder, but no target_encoder"):
        ijepa_zoo.create_model("vit_tiny16_ijepa", network="target_encoder", **kwargs)


def test_preprocessing_of_a_model_travels(tiny, tmp_path):
    cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "crop_pct": 0.9}
    model = _encoder(tiny, pretrained_cfg_overlay=cfg)
    for to in ("native", "timm"):
        folder = ijepa_zoo.export(model, tmp_path / to, to)
        for create in (timm.create_model, ijepa_zoo.create_model):
            config = resolve_model_data_config(create(f"local-dir:{folder}", pretrained=True))
            assert tuple(config["mean"]) == cfg["mean"]
            assert tuple(config["std"]) == cfg["std"]
            assert config["crop_pct"] == 0.9
    folder = ijepa_zoo.export(model, tmp_path / "transformers", "transformers")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    assert config["image_mean"] == [0.5, 0.4, 0.3]
    assert config["size"] == {"shortest_edge": 71}
    assert config["crop_size"] == {"height": 64, "width": 64}


def test_released_names_are_exported_by_name(monkeypatch, official, tiny):
    """The bundle of a name has the entry's licence and predictor, read from its own source."""
    states = torch.load(official, weights_only=True)
    record = bundles.catalog.find("vit_nano8_64_ijepa")
    networks = bundles.Networks(
        record.name,
        {n: partial(formats.from_official, states[n]) for n in record.networks},
        record.layout,
        model=record.model,
        license=record.license,
    )
    monkeypatch.setattr(bundles.read, "open_record", lambda *_: networks)
    bundle = bundles.from_source("vit_nano8_64_ijepa.scenes", patch_size=16, **tiny)
    assert bundle.license == "Apache-2.0"
    assert set(bundle.states) == {"target_encoder", "encoder", "predictor"}
    assert bundle.predictor == {"embed_dim": 24, "depth": 2}


def test_push_creates_the_repository_and_uploads_the_whole_folder(source, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            calls.append(("create", repo_id, kwargs))

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            names = {path.name for path in folder_path.iterdir()}
            calls.append(("upload", repo_id, names))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    source(tmp_path / "a", "timm", push_to="me/ijepa")
    assert calls == [
        ("create", "me/ijepa", {"exist_ok": True}),
        ("upload", "me/ijepa", {"config.json", "model.safetensors", "README.md"}),
    ]
    calls.clear()
    source(tmp_path / "b", "timm")
    assert not calls


@pytest.mark.parametrize("to", LAYOUTS)
def test_the_source_is_never_overwritten(official, source, tiny, tmp_path, to):
    folder = source(tmp_path / "a", "native")
    (tmp_path / "link").symlink_to(folder)
    shutil.copy(official, folder / "ijepa-latest.pth.tar")
    before = {path: path.stat().st_size for path in folder.rglob("*")}
    for place in (folder, f"local-dir:{folder}", folder / "ijepa-latest.pth.tar"):
        for target in (folder, tmp_path / "link"):
            with pytest.raises(RunError, match="holds the source"):
                ijepa_zoo.export(place, target, to, overwrite=True)
    assert {path: path.stat().st_size for path in folder.rglob("*")} == before


def test_interrupt_while_folders_change_places_loses_none(source, tmp_path, monkeypatch):
    folder = source(tmp_path / "a", "timm")
    replace, calls = os.replace, []

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        source(folder, "timm", overwrite=True)
    assert (folder / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_full_disk_is_an_error_of_the_operating_system(source, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("ijepa_zoo.weights.writers.save_file", full)
    with pytest.raises(RunError, match=r"/a cannot be written \(No space left on device: model"):
        source(tmp_path / "a", "timm")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("to", LAYOUTS)
def test_a_file_that_does_not_fit_is_said_in_one_sentence_and_leaves_no_rest(
    source, tmp_path, to, exists
):
    """A limit of the process stands for a full disk, whose words differ in the system's alone."""
    fits = source(tmp_path / "fits", to)
    files = {file.name: file.stat().st_size for file in fits.rglob("*.*") if file.is_file()}
    shutil.rmtree(fits)
    if exists:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "README.md").write_text("old")
    free = shutil.disk_usage(tmp_path).free
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(RunError, match="cannot be written") as caught:
            source(tmp_path / "a", to, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    found = re.fullmatch(
        rf"{tmp_path}/a cannot be written \(File too large: (?P<file>[\w.-]+) takes "
        r"(?P<size>[\d,]+) bytes, (?P<free>[\d,]+) are free\): check the space, limits and "
        r"permissions there, or choose another folder",
        str(caught.value),
    )
    size = int(found["size"].replace(",", ""))
    assert 0.5 * files[found["file"]] < size <= files[found["file"]]  # but for names and headers
    assert 0.5 < int(found["free"].replace(",", "")) / free < 2
    assert [path.name for path in tmp_path.rglob("*")] == (["a", "README.md"] if exists else [])


def test_the_command_names_its_own_option(source, official, tmp_path, capsys):
    folder = source(tmp_path / "a", "timm")
    assert cli.main(["export", str(official), str(folder), "--to", "timm"]) == 1
    assert "or replace it, overwrite=True (--overwrite)" in capsys.readouterr().err


def test_system_errors_name_the_folder_and_not_the_temporary_one(tmp_path):
    def full(part):
        raise OSError(errno.ENOSPC, "No space left on device", str(part / "model.onnx"))

    def source_is_gone(part):
        raise FileNotFoundError(errno.ENOENT, "No such file", "weights.pth")

    with pytest.raises(RunError, match=r"/a cannot be written \(No space left") as caught:
        write_whole(tmp_path / "a", full)
    assert ".part" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"weights\.pth"):
        write_whole(tmp_path / "a", source_is_gone)
    assert not list(tmp_path.iterdir())


_KILLED = """
import os, signal, sys
from pathlib import Path
from ijepa_zoo.weights.export import write_folder
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def write(part):
    (part / "new").touch()
    if sys.argv[2] == "writing":
        die()
    replace = os.replace
    os.replace = lambda a, b: replace(a, b) if Path(a) != part else die()
write_whole(Path(sys.argv[1]), write)
"""


@pytest.mark.parametrize("moment", ["writing", "changing places"])
def test_leftovers_of_killed_processes_and_only_those_are_removed(tmp_path, moment):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "old").touch()
    foreign = tmp_path / ".a.mine"
    foreign.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(ijepa_zoo.__file__).parents[1])}
    words = [sys.executable, "-c", _KILLED, str(folder), moment]
    assert subprocess.run(words, env=environment, timeout=100).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".a.*.part"))) == 1
    assert folder.exists() == (moment == "writing")

    def write(part):
        assert [place for place in tmp_path.glob(".a.*.part")] == [part.parent]
        assert [path.name for path in folder.iterdir()] == ["old"]  # the earlier
        write_whole(tmp_path / "b", lambda other: None)
        write_whole(folder, lambda other: (other / "second").touch())  # spares the living
        (part / "first").touch()

    write_whole(folder, write)
    assert [path.name for path in folder.iterdir()] == ["first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.mine", "a", "b"]


def test_arguments_that_would_spoil_the_weights_are_refused(source, tiny, tmp_path):
    with pytest.raises(ValueError, match="floating-point"):
        source(tmp_path / "a", "timm", dtype=torch.int8)
    with pytest.raises(ValueError, match="network must be"):
        ijepa_zoo.export(_encoder(tiny), tmp_path / "a", network="../../evil")


def test_classifier_of_a_file_travels(tiny, tmp_path):
    encoder = ijepa_zoo.create_model("vit_tiny16_ijepa", pretrained=False, num_classes=5, **tiny)
    torch.save(encoder.state_dict(), tmp_path / "finetuned.pth")
    folder = ijepa_zoo.export(
        tmp_path / "finetuned.pth", tmp_path / "out", "timm", model_name="vit_tiny16_ijepa", **tiny
    )
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(loaded.head.weight, encoder.head.weight)
    assert "classifier of 5 classes" in (folder / "README.md").read_text()
