"""Exports: loaded by the other libraries, exact in round trips, safe to overwrite, described."""

import shutil
from unittest.mock import Mock, call

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError, FetchError, RunError, SettingsError
from ijepa_zoo.weights.writers import WRITERS

FORMATS = ("native", "timm", "transformers", "official")
FOLDERS = FORMATS[:3]  # that name and load one encoder
OFFICIAL_FILE = "ijepa-latest.pth.tar"


@pytest.fixture
def source(official, tiny):
    """Exports the official file."""

    def export(folder, to, **kwargs):
        kwargs = {"model_name": "vit_tiny16_ijepa", **tiny, **kwargs}
        return ijepa_zoo.export(official, folder, to, **kwargs)

    return export


@pytest.fixture
def encoder(tiny):
    def create(**kwargs):
        model = ijepa_zoo.create_model("vit_tiny16_ijepa", pretrained=False, **{**tiny, **kwargs})
        with torch.no_grad():  # std 0.02 makes a nearly linear network
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return create


def front_matter(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    head, body = text.removeprefix("---\n").split("---\n", 1)
    return yaml.safe_load(head), body


# --- loaded by other libraries


@pytest.mark.parametrize(("to", "network"), [("timm", "encoder"), ("native", None)])
@torch.no_grad()
def test_stock_timm_loads_it(source, expected, tmp_path, to, network):
    folder, images = source(tmp_path / "a", to, network=network), expected["input"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(model) is timm.models.VisionTransformer
    tokens = expected[network or "target_encoder"]
    assert_close(model.forward_features(images), tokens, rtol=1e-5, atol=1e-5)
    assert_close(model(images), tokens.mean(1), rtol=1e-5, atol=1e-5)
    tuned = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)
    assert tuned(images).shape == (2, 3)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"img_size": (96, 64), "patch_size": (8, 16), "in_chans": 1},
        {"mlp_ratio": 1.7, "qkv_bias": False},
        {"num_classes": 5},
        {"num_classes": 5, "global_pool": "map"},
        {"drop_path_rate": 0.1, "dynamic_img_size": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_stock_timm_gives_the_output_of_any_plain_encoder(encoder, tmp_path, kwargs):
    model = encoder(**kwargs)
    images = torch.randn(2, kwargs.get("in_chans", 3), *model.patch_embed.img_size)
    for to in ("timm", "native"):
        folder = ijepa_zoo.export(model, tmp_path / to, to)
        for create in (timm.create_model, ijepa_zoo.create_model):
            loaded = create(f"local-dir:{folder}", pretrained=True).eval()
            assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_transformers_loads_it(source, expected, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = source(tmp_path / "a", "transformers", network="encoder")
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    tokens = model.eval()(expected["input"]).last_hidden_state
    assert_close(tokens, expected["encoder"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"patch_size": 8, "mlp_ratio": 1.7},
        {"qkv_bias": False, "img_size": 96},
        {"norm_layer": torch.nn.LayerNorm},
        {"num_classes": 5},
    ],
    ids=str,
)
@torch.no_grad()
def test_transformers_gives_the_output_of_any_plain_encoder(encoder, tmp_path, kwargs):
    transformers = pytest.importorskip("transformers")
    model = encoder(**kwargs)
    folder = ijepa_zoo.export(model, tmp_path / "a", "transformers")
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    if "num_classes" in kwargs:
        theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        assert_close(theirs(images).logits, model(images), rtol=1e-4, atol=1e-5)
    else:
        theirs = transformers.IJepaModel.from_pretrained(folder).eval()
        tokens = theirs(images).last_hidden_state
        assert_close(tokens, model.encode(images), rtol=1e-4, atol=1e-5)
    again = ijepa_zoo.create_model(f"local-dir:{folder}").eval()
    assert again.norm.eps == theirs.config.layer_norm_eps == model.norm.eps
    assert_close(again(images), model(images), rtol=1e-5, atol=1e-5)


# --- round trips


def test_round_trip_of_an_official_file_is_exact(source, official, tmp_path):
    native = source(tmp_path / "native", "native")
    end = ijepa_zoo.export(native, tmp_path / "end", "official") / OFFICIAL_FILE
    ours, theirs = (torch.load(path, weights_only=True) for path in (end, official))
    assert set(ours) == set(theirs)
    for network in ("encoder", "predictor", "target_encoder"):
        assert_close(dict(ours[network]), dict(theirs[network]), rtol=0, atol=0)


@pytest.mark.parametrize("context", ["repeated", "shared"])
def test_round_trip_of_all_networks_in_memory_is_exact(tiny, tiny_predictor, tmp_path, context):
    args = {**tiny, **tiny_predictor, "predictor_context": context}
    ijepa = ijepa_zoo.create_ijepa("vit_tiny16_ijepa", pretrained=False, **args)
    ijepa.encoder.norm.bias.data.normal_()
    state = dict(ijepa.state_dict())
    native = ijepa_zoo.export(ijepa, tmp_path / "native")
    copied = ijepa_zoo.export(native, tmp_path / "copy")
    for folder in (native, copied):
        again = ijepa_zoo.create_ijepa(f"local-dir:{folder}")
        assert_close(dict(again.state_dict()), state, rtol=0, atol=0)
        assert again.predictor.context == context
    fresh = ijepa_zoo.create_ijepa(f"local-dir:{native}", pretrained=False, predictor_depth=1)
    assert fresh.predictor.mask_token.shape[-1] == 24
    assert (len(fresh.predictor.predictor_blocks), fresh.predictor.context) == (1, context)
    if context == "shared":
        with pytest.raises(CheckpointError, match="'shared'"):
            ijepa_zoo.export(native, tmp_path / "official", "official")


def test_official_repository_accepts_the_fresh_optimizer(source, tmp_path):
    """It builds four groups and loads the file's optimizer state into them."""
    content = torch.load(source(tmp_path / "a", "official") / OFFICIAL_FILE, weights_only=True)
    groups = [
        [torch.nn.Parameter(t) for n, t in state.items() if ("bias" in n or t.ndim == 1) == exempt]
        for exempt in (False, True)
        for state in (content["encoder"], content["predictor"])
    ]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    optimizer.load_state_dict(content["opt"])
    assert [group["weight_decay"] for group in optimizer.param_groups][2:] == [0, 0]
    torch.amp.GradScaler("cpu").load_state_dict(content["scaler"])
    assert content["epoch"] == 0


@pytest.mark.parametrize("to", FORMATS)
@torch.no_grad()
def test_exports_are_byte_identical_also_in_half_precision(source, tiny, expected, tmp_path, to):
    one, two = (source(tmp_path / name, to, dtype=torch.float16) for name in ("one", "two"))
    files = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert files == {path.relative_to(two) for path in two.rglob("*") if path.is_file()}
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
        if name.suffix == ".safetensors":
            with safe_open(one / name, framework="pt") as opened:
                assert opened.metadata() == {"format": "pt"}
                assert opened.get_tensor(next(iter(opened.keys()))).dtype == torch.float16
    model = ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=one, **tiny).eval()
    tokens = model.encode(expected["input"])
    assert tokens.dtype == torch.float32
    assert 0 < (tokens - expected["target_encoder"]).abs().max() < 0.02


def test_classifier_of_a_file_is_kept(encoder, tiny, tmp_path):
    model = encoder(num_classes=5)
    torch.save(model.state_dict(), tmp_path / "tuned.pth")
    kwargs = {"model_name": "vit_tiny16_ijepa", **tiny}
    folder = ijepa_zoo.export(tmp_path / "tuned.pth", tmp_path / "a", "timm", **kwargs)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert front_matter(folder)[0]["pipeline_tag"] == "image-classification"


# --- refusals


@pytest.mark.parametrize(
    ("kwargs", "to", "named"),
    [
        ({"qk_norm": True}, "native", "k_norm"),
        ({"act_layer": "relu"}, "timm", "ReLU"),
        ({"norm_layer": torch.nn.LayerNorm}, "timm", "1e-05"),
        ({"num_classes": 5, "global_pool": "max"}, "transformers", "'max'"),
        ({"num_classes": 5, "global_pool": "map"}, "transformers", "attn_pool"),
        ({"img_size": (96, 64)}, "transformers", "96x64"),
        ({}, "official", "three networks"),
    ],
)
def test_what_a_format_cannot_express_is_refused(encoder, tmp_path, kwargs, to, named):
    with pytest.raises(CheckpointError, match=named):
        ijepa_zoo.export(encoder(**kwargs), tmp_path / "a", to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "kwargs", "error", "named"),
    [
        ("onnx", {}, SettingsError, "'onnx'"),
        ("timm", {"network": "predictor"}, SettingsError, "'predictor'"),
        ("timm", {"dtype": torch.int8}, SettingsError, "int8"),
        ("timm", {"model_name": None}, CheckpointError, "--model"),
        ("official", {"network": "encoder"}, CheckpointError, "network=encoder"),
        ("timm", {"depth": 3}, CheckpointError, r"blocks\.2"),
    ],
)
def test_wrong_arguments_are_refused(source, tmp_path, to, kwargs, error, named):
    with pytest.raises(error, match=named):
        source(tmp_path / "a", to, **kwargs)
    with pytest.raises(SettingsError, match="Linear"):
        ijepa_zoo.export(torch.nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(CheckpointError, match="vit_base16_ijepa"):
        ijepa_zoo.export("vit_base16_ijepa", tmp_path / "a")
    assert not list(tmp_path.iterdir())


# --- folders


@pytest.mark.parametrize("to", ["native", "official"])
def test_existing_folder_is_replaced_whole_and_only_when_asked(source, tmp_path, to):
    folder = tmp_path / "a"
    (folder / "networks").mkdir(parents=True)
    (folder / "networks" / "stale.safetensors").touch()
    with pytest.raises(RunError, match=str(folder)):
        source(folder, to)
    assert [*folder.rglob("*.safetensors")] == [folder / "networks" / "stale.safetensors"]
    source(folder, to, overwrite=True)
    fresh = source(tmp_path / "b", to)
    names = [sorted(p.relative_to(top) for p in top.rglob("*")) for top in (folder, fresh)]
    assert names[0] == names[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert folder.stat().st_mode & 0o055 == 0o055
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.rglob("*"))


def test_other_files_and_the_source_are_never_overwritten(source, official, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    for target in ("mine", "mine/photo.jpg"):
        with pytest.raises(RunError, match="mine"):
            source(tmp_path / target, "timm", overwrite=True)
    folder = source(tmp_path / "a", "native")
    shutil.copy(official, folder / OFFICIAL_FILE)
    (tmp_path / "link").symlink_to(folder)
    for given in (f"local-dir:{folder}", folder / OFFICIAL_FILE):
        with pytest.raises(RunError, match="source"):
            ijepa_zoo.export(given, tmp_path / "link", "timm", overwrite=True)


@pytest.mark.parametrize("exists", [False, True])
def test_interrupted_export_leaves_nothing_behind(source, tmp_path, monkeypatch, exists):
    if exists:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "README.md").write_text("old")

    def half(content, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        source(tmp_path / "a", "official", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == (["a", "README.md"] if exists else [])


def test_a_link_stays_a_link_and_a_folder_that_appears_meanwhile_is_kept(
    source, tmp_path, monkeypatch
):
    source(tmp_path / "real", "timm")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    source(tmp_path / "link", "timm", dtype=torch.bfloat16, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    tensors = load_file(tmp_path / "real" / "model.safetensors")
    assert tensors["norm.weight"].dtype == torch.bfloat16
    folder, write = tmp_path / "out", WRITERS["timm"]

    def write_and_make(*args):
        write(*args)
        folder.mkdir()
        (folder / "precious.txt").write_text("mine")

    monkeypatch.setitem(WRITERS, "timm", write_and_make)
    with pytest.raises(RunError, match=str(folder)):
        source(folder, "timm")
    assert (folder / "precious.txt").read_text() == "mine"


# --- labels and cards


@pytest.mark.parametrize("to", FOLDERS)
def test_network_and_license_are_claimed_where_they_are_known(
    source, encoder, official, tiny, tmp_path, to
):
    kwargs = {"model_name": "vit_tiny16_ijepa", **tiny}
    torch.save(encoder().state_dict(), tmp_path / "bare.pth")
    loaded = ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=official, **tiny)
    exports = {
        "bare": ijepa_zoo.export(tmp_path / "bare.pth", tmp_path / "bare", to, **kwargs),
        "in memory": ijepa_zoo.export(encoder(), tmp_path / "memory", to),
        "loaded": ijepa_zoo.export(loaded, tmp_path / "loaded", to),
        "told": ijepa_zoo.export(encoder(), tmp_path / "told", to, network="target_encoder"),
    }
    exports["copy"] = ijepa_zoo.export(exports["bare"], tmp_path / "copy", to)
    for name, folder in exports.items():
        is_known = name in ("loaded", "told")
        assert ("target encoder" in front_matter(folder)[1]) is is_known, name
        origin = ijepa_zoo.create_model(f"local-dir:{folder}").weights_origin
        assert origin.startswith("target encoder of ") is is_known, name
    folder = source(tmp_path / "context", to, network="encoder", license="CC-BY-NC-4.0")
    head, body = front_matter(folder)
    assert head["license"] == "cc-by-nc-4.0"
    assert head["library_name"] == ("transformers" if to == "transformers" else "timm")
    assert head["pipeline_tag"] == "image-feature-extraction"
    for known in ("vit_custom_ijepa", "CC-BY-NC-4.0", "**context encoder**"):
        assert known in body
    for text in (body, (folder / "config.json").read_text()):
        assert str(official.parent) not in text
    with pytest.raises(CheckpointError, match="'target_encoder'"):
        ijepa_zoo.create_model(f"local-dir:{folder}", network="target_encoder")


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("to", FOLDERS)
@torch.no_grad()
def test_code_in_the_card_runs(encoder, tmp_path, to, num_classes):
    if to == "transformers":
        pytest.importorskip("transformers")
    model, images = encoder(num_classes=num_classes), torch.randn(2, 3, 64, 64)
    folder = ijepa_zoo.export(model, tmp_path / "a", to)
    code = front_matter(folder)[1].split("```python\n")[1].split("```")[0]
    names = {"image": Image.new("RGB", (90, 70))}
    exec(code.replace("FOLDER", str(folder)), names)
    output = names["model"].eval()(images)
    if to == "transformers":
        output = output.logits if num_classes else output.last_hidden_state.mean(1)
        assert names["logits" if num_classes else "features"].shape == (1, num_classes or 48)
    assert_close(output, model(images), rtol=1e-4, atol=1e-5)


def test_push_creates_the_repository_and_uploads_the_folder(source, tmp_path, monkeypatch):
    api = Mock()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    folder = source(tmp_path / "a", "timm", push_to="me/ijepa", private=True, revision="v2")
    assert api.mock_calls == [
        call.create_repo("me/ijepa", private=True, exist_ok=True),
        call.create_branch("me/ijepa", branch="v2", exist_ok=True),
        call.upload_folder(repo_id="me/ijepa", folder_path=folder, revision="v2"),
    ]
    api.create_repo.side_effect = OSError("401 unauthorized")
    with pytest.raises(FetchError, match="me/ijepa"):
        source(tmp_path / "c", "timm", push_to="me/ijepa")
    assert (tmp_path / "c" / "config.json").exists()


def test_other_vits_of_timm(tmp_path):
    """Such as those that were pretrained here; formats of I-JEPA alone cannot express them."""
    sizes = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 0}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    images = torch.randn(1, 3, 32, 32)
    for to in ("native", "timm"):
        folder = ijepa_zoo.export(vit, tmp_path / to, to)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert_close(again(images), vit(images))
    with pytest.raises(CheckpointError, match="vit_tiny_patch16_224"):
        ijepa_zoo.export(vit, tmp_path / "a", "transformers")
    vit.blocks[0].norm1 = torch.nn.Linear(24, 24)
    with pytest.raises(CheckpointError, match="norm1"):
        ijepa_zoo.export(vit, tmp_path / "a")
    vit.pretrained_cfg = {**vit.pretrained_cfg, "architecture": "vit_mine"}
    with pytest.raises(CheckpointError, match="vit_mine"):
        ijepa_zoo.export(vit, tmp_path / "a")
