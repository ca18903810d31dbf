"""What can differ on a CUDA GPU: run with `python -m pytest -m gpu`.

Tests that take `device` run on the CPU otherwise.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ijepa_zoo
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.models.jepa import IJepa
from ijepa_zoo.train.precision import autocast

NAME = "vit_nano8_64_ijepa"
PHOTOS = Path(__file__).parent.parent / "examples" / "images" / "photos"
IMAGES = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def relative(a, b):
    return ((a.cpu().float() - b.cpu().float()).norm() / b.cpu().float().norm()).item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_loads_straight_onto_the_gpu_and_compiles():
    model = ijepa_zoo.create_model(NAME, device="cuda", dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert model.pos_embed.is_cuda
    reference = ijepa_zoo.create_model(NAME)
    assert relative(model.encode(IMAGES.cuda().bfloat16()), reference.encode(IMAGES)) < 0.03
    with torch.inference_mode():
        compiled = torch.compile(reference.cuda().eval())(IMAGES.cuda())
        assert relative(compiled, reference(IMAGES.cuda())) < 1e-3


def one_step(device, precision):
    """Tokens, loss, gradients and the target encoder of one update without an optimizer."""
    context, targets = MultiBlockMasks((8, 8), min_keep=4).sample(8, seed=0, step=0)
    images, context, targets = (part.to(device) for part in (IMAGES, context, targets))
    ijepa: IJepa = ijepa_zoo.create_ijepa(NAME).to(device)
    with autocast(torch.device(device), precision):
        predicted = ijepa.predict(images, context, targets)
        loss = ijepa(images, context, targets)
    loss.backward()
    ijepa.update_target(0.9)
    gradients = torch.cat([p.grad.flatten() for p in ijepa.parameters() if p.grad is not None])
    target = torch.cat([p.flatten() for p in ijepa.target_encoder.parameters()])
    return predicted.detach(), loss.detach(), gradients, target.detach()


@pytest.mark.parametrize(
    ("precision", "limits"),
    [("fp32", (1e-4, 1e-4, 5e-3, 1e-6)), ("bf16", (0.03, 0.02, 0.1, 1e-6))],
)
def test_one_step_is_near_the_cpu_in_fp32(device, precision, limits, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's default for patches
    exact, found = one_step("cpu", "fp32"), one_step(device, precision)
    errors = [relative(*pair) for pair in zip(found, exact)]
    assert all(error < limit for error, limit in zip(errors, limits)), errors
    assert precision == "fp32" or errors[0] > 1e-4


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
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_features_in_every_precision(tmp_path, precision, tolerance):
    found = []
    for device, chosen in (("cuda", precision), ("cpu", "float32")):
        out, model = tmp_path / f"{device}.safetensors", ijepa_zoo.create_model(NAME)
        options = {"device": device, "precision": chosen, "layers": "last4"}
        report = ijepa_zoo.extract_features([PHOTOS], model, out, **options)
        assert report.settings["device"] == device
        assert chosen != "auto" or "float16" in report.settings["precision"]
        found.append(load_file(out)["features"])
    assert relative(*found) < tolerance
