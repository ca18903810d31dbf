"""Products in float8; on a GPU with `python -m pytest -m gpu`."""

from functools import partial

import numpy as np
import pytest
import torch
from small_run import CONFIG, change, pictures, rows, train

import ijepa_zoo
from ijepa_zoo.errors import MissingPackageError, SettingsError
from ijepa_zoo.train import dry_run
from ijepa_zoo.train.precision import require_float8, use_float8, without_float8

CUDA = torch.device("cuda")
FP8 = change(CONFIG, model={"embed_dim": 32}, optim={"precision": "fp8"})
NANO = {"embed_dim": 32, "depth": 2, "num_heads": 2, "predictor_embed_dim": 16}


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip("torchao")


def make(name="vit_nano8_64_ijepa", **network):
    torch.manual_seed(0)
    return ijepa_zoo.create_ijepa(name, pretrained=False, **network).train()


def rounded(tensor, mantissa, least_exponent, largest):
    """Values times a scale that makes the greatest `largest`, rounded to even, over that scale."""
    values = tensor.detach().float().numpy()
    scale = np.float32(largest / np.abs(values).max())
    exponent = np.maximum(np.frexp(values * scale)[1] - 1, least_exponent)
    step = np.ldexp(np.float32(1), exponent - mantissa)
    return np.rint(values * scale / step) * step / scale


def error(found, expected):
    return np.linalg.norm(found.detach().float().numpy() - expected) / np.linalg.norm(expected)


def test_products_are_of_rounded_matrices(torchao, monkeypatch):
    from torchao import float8

    emulated = partial(float8.Float8LinearConfig, emulate=True)
    monkeypatch.setattr(float8, "Float8LinearConfig", emulated)
    model = make(**NANO)
    use_float8(model)
    layer = model.encoder.blocks[1].mlp.fc1
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(3, 7, 32).bfloat16().requires_grad_()
    gradient = torch.randn(3, 7, 128).bfloat16()
    out = layer.bfloat16()(x)
    out.backward(gradient)
    weight = rounded(layer.weight, 3, -6, 448)  # e4m3
    bias = layer.bias.detach().float().numpy()
    whole = x.detach().float().numpy() @ layer.weight.detach().float().numpy().T + bias
    assert error(out, rounded(x, 3, -6, 448) @ weight.T + bias) < 4e-3 < 1e-2 < error(out, whole)
    assert error(x.grad, rounded(gradient, 2, -14, 57344) @ weight) < 4e-3  # e5m2
    # the weight's gradient is a product of bfloat16 matrices
    rows_in, rows_out = (t.detach().view(21, -1).float().numpy() for t in (x, gradient))
    assert error(layer.weight.grad, rows_out.T @ rows_in) < 4e-3


def test_only_the_encoders_blocks_change_and_no_name_does(torchao):
    model, plain = make(**NANO), make(**NANO)
    before = dict(model.named_parameters())
    use_float8(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(before[name] is value for name, value in model.named_parameters())
    changed = {n for n, m in model.named_modules() if type(m).__name__ == "Float8Linear"}
    assert changed == {
        f"{network}.blocks.{block}.{layer}"
        for network in ("encoder", "target_encoder")
        for block in range(2)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), without_float8(model.encoder):  # as monitors do
        assert torch.equal(model.encoder.encode(images), plain.encoder.encode(images))
    assert type(model.encoder.blocks[0].attn.qkv).__name__ == "Float8Linear"
    odd = make(**NANO, mlp_ratio=1.25)  # the kernels do not take a hidden width of 40
    use_float8(odd)
    assert type(odd.encoder.blocks[0].mlp.fc1) is torch.nn.Linear


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
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="torchao"):
        require_float8(CUDA)


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a CUDA GPU of compute capability 8.9")
@pytest.mark.parametrize(("compile", "recompute"), [(False, False), (True, True)])
def test_on_a_gpu_the_losses_are_those_of_bf16(tmp_path, torchao, compile, recompute):
    # widths at which float8 kernels and the fast attention work
    config = change(
        FP8,
        model={"embed_dim": 64, "num_heads": 4, "predictor_embed_dim": 32},
        runtime={"device": "cuda", "compile": compile, "activation_checkpointing": recompute},
    )
    losses = {}
    for precision in ("fp8", "bf16"):
        folder = tmp_path / precision
        train(folder, change(config, optim={"precision": precision}))
        losses[precision] = [float(row["loss"]) for row in rows(folder)]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.03)
    assert losses["fp8"] != losses["bf16"]
