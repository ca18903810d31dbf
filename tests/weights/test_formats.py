import json
import random

import pytest
import torch

from ijepa_zoo.errors import CheckpointError
from ijepa_zoo.weights import formats
from ijepa_zoo.weights.layouts import recognise

WIDTH, DEPTH, CLASSES = 8, 2, 5


def _encoder(head=False):
    """Tensors in our names, each with values of its own."""
    shapes = {
        "pos_embed": (1, 4, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 2, 2),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        for name, (rows, columns) in {
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "mlp.fc1": (4 * WIDTH, WIDTH),
            "mlp.fc2": (WIDTH, 4 * WIDTH),
        }.items():
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
        for norm in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{norm}.weight"] = shapes[f"blocks.{i}.{norm}.bias"] = (WIDTH,)
    if head:
        shapes |= {"head.weight": (CLASSES, WIDTH), "head.bias": (CLASSES,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def _equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("head", [False, True])
def test_transformers_names_and_back_are_exact(head):
    state = _encoder(head)
    theirs = formats.to_transformers(state, "memory")
    assert len(theirs) == len(state) + 4 * DEPTH
    _equal(formats.from_transformers(theirs, "memory"), state)
    assert {name.startswith("ijepa.") for name in theirs} == ({True, False} if head else {False})


def test_query_key_and_value_are_the_thirds_of_qkv():
    state = _encoder()
    theirs = formats.to_transformers(state, "memory")
    qkv = state["blocks.1.attn.qkv.weight"]
    for place, part in enumerate(("query", "key", "value")):
        chunk = theirs[f"encoder.layer.1.attention.attention.{part}.weight"]
        assert torch.equal(chunk, qkv[place * WIDTH : (place + 1) * WIDTH])


@pytest.mark.parametrize("head", [False, True])
def test_transformers_names_are_those_its_library_writes(head, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.IJepaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        intermediate_size=4 * WIDTH,
        image_size=4,
        patch_size=2,
        num_labels=CLASSES,
    )
    kind = transformers.IJepaForImageClassification if head else transformers.IJepaModel
    kind(config).save_pretrained(tmp_path)
    written = _shapes_in_file(tmp_path / "model.safetensors")
    ours = {
        name: tuple(tensor.shape)
        for name, tensor in formats.to_transformers(_encoder(head), "memory").items()
    }
    assert ours == written


def _shapes_in_file(path):
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    return {k: tuple(v["shape"]) for k, v in header.items() if k != "__metadata__"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"pooler.dense.weight": torch.zeros(1)}), "pooler.dense.weight"),
        (lambda s: s.update({"blocks.0.norm1.weight": torch.zeros(1)}), "blocks.0.norm1.weight"),
        (
            lambda s: s.update({"encoder.layer.0.attention.attention.gate.bias": torch.zeros(1)}),
            "without counterpart: encoder.layer.0.attention.attention.gate.bias",
        ),
        (
            lambda s: s.pop("encoder.layer.1.attention.attention.key.bias"),
            "lacks a query, key or value of blocks.1.attn.qkv.bias",
        ),
    ],
    ids=["unknown", "mixed with timm's", "unknown part of attention", "no key"],
)
def test_transformers_files_with_other_names_are_refused(change, message):
    theirs = formats.to_transformers(_encoder(), "memory")
    change(theirs)
    with pytest.raises(CheckpointError, match=f"some/file .*{message}"):
        formats.from_transformers(theirs, "some/file")


def test_names_that_transformers_has_not_are_refused():
    state = {**_encoder(), "blocks.0.ls1.gamma": torch.zeros(WIDTH), "cls_token": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"no place for blocks\.0\.ls1\.gamma, cls_token"):
        formats.to_transformers(state, "memory")


def test_published_names_and_back_are_exact_and_in_the_published_order(golden):
    published = json.loads((golden / "state_dicts.json").read_text())
    for networks in published.values():
        for network in ("encoder", "predictor"):
            names = list(networks[network])
            shuffled = random.Random(0).sample(names, len(names))
            state = {name: torch.tensor(i) for i, name in enumerate(shuffled)}
            theirs = formats.to_official(state)
            assert [name.removeprefix("module.") for name in theirs] == names
            _equal(formats.(lambda s: formats._split(s,"memory")["unlabeled"][0])(theirs), state)


def test_layouts_are_recognised(official):
    state = _encoder()
    assert recognise(torch.load(official, weights_only=True), "x") == "official"
    assert recognise(formats.to_official(state), "x") == "official_network"
    assert recognise(formats.to_transformers(state, "x"), "x") == "transformers"
    assert recognise(formats.to_transformers(_encoder(head=True), "x"), "x") == "transformers"
    assert recognise(state, "x") == "timm"
    for layout, theirs in {
        "official_network": formats.to_official(state),
        "transformers": formats.to_transformers(state, "x"),
        "timm": state,
    }.items():
        _equal(formats.to_timm(theirs, layout, "x"), state)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["state_dict"],
        ["encoder", "target_encoder"],
        ["module.pos_embed", "pos_embed"],
        ["pos_embed", "norm.weight"],
        ["conv1.weight", "fc.bias"],
        ["vit.embeddings.position_embeddings", "vit.embeddings.cls_token"],
    ],
    ids=str,
)
def test_other_contents_are_refused_with_what_was_found(names):
    content = dict.fromkeys(names, torch.zeros(1))
    found = sorted(names)[0] if names else "nothing"
    with pytest.raises(CheckpointError, match=rf"^some/file is no I-JEPA .* it holds {found}"):
        recognise(content, "some/file")


@pytest.mark.parametrize("content", [3, [torch.zeros(1)], {"pos_embed": 1.5}, {"a": None}], ids=str)
def test_contents_that_are_no_tensors_are_refused(content):
    with pytest.raises(CheckpointError, match=r"^some/file holds"):
        formats.to_timm(content, "official", "some/file")


def test_optimizer_state_is_named_after_its_parameters_and_back(official):
    content = torch.load(official, weights_only=True)
    encoder, predictor = (formats.(lambda s: formats._split(s,"memory")["unlabeled"][0])(content[n]) for n in ("encoder", "predictor"))
    groups = formats.official_parameter_groups(encoder, predictor)
    tensors, plain = formats.optimizer_(lambda s: formats._split(s,"memory")["unlabeled"][0])(content["opt"], groups, "x")
    shapes = {f"encoder.{k}": v.shape for k, v in encoder.items()}
    shapes |= {f"predictor.{k}": v.shape for k, v in predictor.items()}
    moments = {k: v for k, v in tensors.items() if k.endswith((".exp_avg", ".exp_avg_sq"))}
    assert moments
    for name, tensor in moments.items():
        assert tensor.shape == shapes[name.rpartition(".")[0]], name
    back = formats.optimizer_to_official(tensors, json.loads(json.dumps(plain)), groups)
    assert back["param_groups"] == content["opt"]["param_groups"]
    assert [type(g["betas"]) for g in back["param_groups"]] == [tuple] * 4
    assert back["state"].keys() == content["opt"]["state"].keys()
    for index, state in content["opt"]["state"].items():
        for key, value in state.items():
            ours = back["state"][index][key]
            assert torch.equal(ours, value) if torch.is_tensor(value) else ours == value


def test_optimizer_of_other_networks_is_refused(official):
    content = torch.load(official, weights_only=True)
    encoder, predictor = (formats.(lambda s: formats._split(s,"memory")["unlabeled"][0])(content[n]) for n in ("encoder", "predictor"))
    del encoder["norm.bias"]
    groups = formats.official_parameter_groups(encoder, predictor)
    with pytest.raises(CheckpointError, match="some/file: the optimizer has groups of"):
        formats.optimizer_(lambda s: formats._split(s,"memory")["unlabeled"][0])(content["opt"], groups, "some/file")
