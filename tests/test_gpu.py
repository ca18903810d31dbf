"""What can differ on a CUDA GPU: run with `python -m pytest -m gpu`.

Tests that take `device` run on the CPU otherwise.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ijepa_zoo
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.models.jepa import IJepa
from ijepa_zoo.train.precision import autocast

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
NAME = "vit_nano8_64_ijepa"
IMAGES = Path(__file__).parent.parent / "examples" / "images"


def relative(a, b):
    return ((a.cpu().float() - b.cpu().float()).norm() / b.cpu().float().norm()).item()


@pytest.fixture(scope="module")
def images():
    return torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.gpu
@no_gpu
def test_loads_straight_onto_the_gpu(images):
    model = ijepa_zoo.create_model(NAME, device="cuda", dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert model.pos_embed.is_cuda
    reference = ijepa_zoo.create_model(NAME).encode(images)
    assert relative(model.encode(images.cuda().bfloat16()), reference) < 0.03


def one_step(images, device, precision):
    """Tokens, loss, gradients and the target encoder of one update without an optimizer."""
    context, targets = MultiBlockMasks((8, 8), min_keep=4).sample(8, seed=0, step=0)
    images, context, targets = (part.to(device) for part in (images, context, targets))
    ijepa: IJepa = ijepa_zoo.create_ijepa(NAME).to(device)
    with autocast(torch.device(device), precision):
        predicted = ijepa.predict(images, context, targets)
        loss = ijepa(images, context, targets)
    loss.backward()
    ijepa.update_target(0.9)
    gradients = {n: p.grad for n, p in ijepa.named_parameters() if p.grad is not None}
    return predicted.detach(), loss.detach(), gradients, ijepa.target_encoder.state_dict()


def test_one_step_equals_the_cpu(device, images, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's default for patches
    exact, found = one_step(images, "cpu", "fp32"), one_step(images, device, "fp32")
    assert relative(found[0], exact[0]) < 1e-4
    assert relative(found[1], exact[1]) < 1e-4
    assert max(relative(found[2][n], g) for n, g in exact[2].items()) < 5e-3
    assert max(relative(found[3][n], t) for n, t in exact[3].items()) < 1e-6


def test_one_step_in_bf16_is_near_the_cpu_in_fp32(device, images):
    exact, found = one_step(images, "cpu", "fp32"), one_step(images, device, "bf16")
    assert 1e-4 < relative(found[0], exact[0]) < 0.03
    assert relative(found[1], exact[1]) < 0.02
    assert found[2].keys() == exact[2].keys()
    gradients, wanted = (
        torch.cat([g.flatten().cpu() for g in s[2].values()]) for s in (found, exact)
    )
    assert relative(gradients, wanted) < 0.1


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("float32", 1e-3),
        ("bfloat16", 0.03),
        ("float16", 0.01),
        ("bfloat16-weights", 0.05),
        ("auto", 0.03),
    ],
)
def test_features_in_every_precision(tmp_path, precision, tolerance):
    found = {}
    for device, chosen in (("cpu", "float32"), ("cuda", precision)):
        out = tmp_path / f"{device}.safetensors"
        model = ijepa_zoo.create_model(NAME)
        ijepa_zoo.extract_features(
            [IMAGES], model, out, device=device, precision=chosen, layers="last4"
        )
        found[device] = load_file(out)["features"]
        record = json.loads((tmp_path / f"{device}.run.json").read_text())
        assert record["settings"]["device"] == device
        if chosen == "auto":
            assert record["settings"]["precision"] in ("bfloat16", "float16")
    assert relative(found["cuda"], found["cpu"]) < tolerance


@pytest.mark.gpu
@no_gpu
def test_compiled_encoder_equals_eager(images):
    model = ijepa_zoo.create_model(NAME, pretrained=False, depth=2).cuda().eval()
    with torch.inference_mode():
        assert relative(torch.compile(model)(images.cuda()), model(images.cuda())) < 1e-3
