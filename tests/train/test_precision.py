"""What a device multiplies natively, and products in float8 (GPU: `python -m pytest -m gpu`)."""

import pytest
import torch
from small_run import CONFIG, change, pictures, rows, stop_after, train

import ijepa_zoo
from ijepa_zoo.errors import MissingPackageError, RunError, SettingsError
from ijepa_zoo.train import dry_run
from ijepa_zoo.train.folder import read_settings
from ijepa_zoo.train.precision import (
    has_native_bf16,
    require_float8,
    use_float8,
    without_float8,
)  # fmt: skip

CUDA = torch.device("cuda")
AUTO = change(CONFIG, optim={"precision": "auto", "duration": "6 steps"})


def bf16_is_native(monkeypatch, native):
    monkeypatch.setattr("ijepa_zoo.train.precision.has_native_bf16", lambda device: native)


def test_native_bf16(monkeypatch):
    for found, native in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=found: f, raising=False)
        assert has_native_bf16(torch.device("cpu")) == native
    for found, native in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, f=found: f)
        assert has_native_bf16(CUDA) == native
    assert not has_native_bf16(torch.device("mps"))


def test_a_run_keeps_its_precision_on_another_device(tmp_path, monkeypatch):
    bf16_is_native(monkeypatch, True)
    stop_after(monkeypatch, 3, tmp_path, AUTO)
    bf16_is_native(monkeypatch, False)
    train(tmp_path, AUTO)
    assert read_settings(tmp_path).optim.precision == "bf16"
    with pytest.raises(RunError, match=r"optim\.precision"):
        train(tmp_path, change(AUTO, optim={"precision": "fp32"}))


# --- float8

FP8 = change(CONFIG, model={"embed_dim": 32}, optim={"precision": "fp8"})
NANO = {"embed_dim": 32, "depth": 2, "num_heads": 2, "predictor_embed_dim": 16}


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip("torchao")


def make(name="vit_nano8_64_ijepa", **network):
    torch.manual_seed(0)
    return ijepa_zoo.create_ijepa(name, pretrained=False, **network).train()


def test_only_the_encoders_blocks_change_and_no_name_does(torchao):
    model, plain = make(**NANO), make(**NANO)
    before = dict(model.named_parameters())
    use_float8(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(before[name] is value for name, value in model.named_parameters())
    changed = [n for n, m in model.named_modules() if type(m).__name__ == "Float8Linear"]
    assert len(changed) == 2 * 2 * 4  # encoders, blocks, layers
    assert all("encoder.blocks" in name for name in changed)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), without_float8(model.encoder):  # as monitors do
        assert torch.equal(model.encoder.encode(images), plain.encoder.encode(images))
    assert type(model.encoder.blocks[0].attn.qkv).__name__ == "Float8Linear"
    odd = make(**NANO, mlp_ratio=1.25)  # the kernels do not take a hidden width of 40
    use_float8(odd)
    assert type(odd.encoder.blocks[0].mlp.fc1) is torch.nn.Linear
    with pytest.raises(SettingsError, match=r"model\.embed_dim=24"):
        use_float8(make(**{**NANO, "embed_dim": 24, "mlp_ratio": 1.0}))


def test_cuda_takes_the_products_of_a_huge_encoder(torchao, monkeypatch):
    """Of any number of tokens. On `meta` torch checks what its CUDA kernels demand."""
    multiplied, product = [], torch._scaled_mm

    def watched(left, right, **options):
        multiplied.append((left.dtype, right.dtype, options["use_fast_accum"]))
        return product(left, right, **options)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    with torch.device("meta"):
        model = make("vit_huge14_ijepa", depth=1)
        tokens = torch.zeros(3, 67, 1280, dtype=torch.bfloat16, requires_grad=True)
    use_float8(model)
    block = model.encoder.blocks[-1]
    hidden = block.attn.proj(block.attn.qkv(tokens)[..., :1280])
    block.mlp.fc2(block.mlp.fc1(hidden)).sum().backward()
    forward = (torch.float8_e4m3fn, torch.float8_e4m3fn, True)
    backward = (torch.float8_e5m2, torch.float8_e4m3fn, False)
    assert multiplied == 4 * [forward] + 4 * [backward]


def test_what_float8_needs(torchao, monkeypatch):
    with pytest.raises(SettingsError, match=r"cpu.* 8\.9"):
        dry_run(FP8, pictures())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    require_float8(CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(SettingsError, match=r"cuda.* 8\.9"):
        require_float8(CUDA)
    monkeypatch.setattr("ijepa_zoo.train.precision.version", lambda name: "0.17.0")
    with pytest.raises(MissingPackageError, match=r"torchao 0\.18"):
        require_float8(CUDA)


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a CUDA GPU of compute capability 8.9")
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_the_losses_are_those_of_bf16(tmp_path, torchao, compile):
    # widths at which float8 kernels and the fast attention work
    model = {"embed_dim": 64, "num_heads": 4, "predictor_embed_dim": 32}
    runtime = {"device": "cuda", "compile": compile, "activation_checkpointing": compile}
    losses = []
    for precision in ("fp8", "bf16"):
        folder = tmp_path / precision
        train(folder, change(FP8, model=model, runtime=runtime, optim={"precision": precision}))
        losses.append([float(row["loss"]) for row in rows(folder)])
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    assert losses[0] != losses[1]
