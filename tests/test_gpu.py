"""What can differ on a CUDA GPU: run with `python -m pytest -m gpu`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ijepa_zoo
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.models.jepa import IJepa

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
NAME = "vit_nano8_64_ijepa"
IMAGES = Path(__file__).parent.parent / "examples" / "images"


def relative(a, b):
    return ((a.cpu().float() - b.cpu().float()).norm() / b.cpu().float().norm()).item()


@pytest.fixture(scope="module")
def images():
    return torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_loads_straight_onto_the_gpu(images):
    model = ijepa_zoo.create_model(NAME, device="cuda", dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert model.pos_embed.is_cuda
    reference = ijepa_zoo.create_model(NAME).encode(images)
    assert relative(model.encode(images.cuda().bfloat16()), reference) < 0.03


def test_loss_and_gradients_equal_the_cpu(images):
    context, targets = MultiBlockMasks((8, 8), min_keep=4).sample(8, seed=0, step=0)
    results = {}
    for device in ("cpu", "cuda"):
        ijepa: IJepa = ijepa_zoo.create_ijepa(NAME).to(device)
        loss = ijepa(images.to(device), context.to(device), targets.to(device))
        loss.backward()
        ijepa.update_target(0.9)
        gradients = {n: p.grad for n, p in ijepa.named_parameters() if p.grad is not None}
        results[device] = (loss.detach(), gradients, ijepa.target_encoder.state_dict())
    (loss, gradients, target), (loss_gpu, gradients_gpu, target_gpu) = results.values()
    assert relative(loss_gpu, loss) < 1e-4
    assert max(relative(gradients_gpu[n], g) for n, g in gradients.items()) < 5e-3
    assert max(relative(target_gpu[n], t) for n, t in target.items()) < 1e-6


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("float32", 1e-3), ("bfloat16", 0.03), ("float16", 0.01), ("bfloat16-weights", 0.05)],
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
    assert relative(found["cuda"], found["cpu"]) < tolerance


def test_compiled_encoder_equals_eager(images):
    model = ijepa_zoo.create_model(NAME, device="cuda").eval()
    with torch.inference_mode():
        assert relative(torch.compile(model)(images.cuda()), model(images.cuda())) < 1e-3
