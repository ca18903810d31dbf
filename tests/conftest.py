"""Fixtures that several parts share."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in parallel, their networks are tiny

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(autouse=True)
def _clean():
    """A seed; a trainer on a GPU chooses kernels for the whole process."""
    torch.manual_seed(0)
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _NO_GPU])])
def device(request):
    """The CPU; with `-m gpu` a GPU. For tests of what should not depend on it."""
    return request.param


@pytest.fixture(scope="session")
def golden():
    """Folder of the numbers recorded from the published code."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def official(golden):
    """A small checkpoint in the published layout, all three networks and optimizer state."""
    return golden / "official-tiny16-64.pth.tar"


@pytest.fixture(scope="session")
def expected(golden):
    """Its `input` and the tokens of its `encoder` and `target_encoder`."""
    return load_file(golden / "official-tiny16-64.expected.safetensors")


@pytest.fixture
def tiny():
    """Encoder arguments of that checkpoint, beside the name vit_tiny16_ijepa."""
    return {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture
def tiny_predictor():
    return {"predictor_embed_dim": 24, "predictor_depth": 2}
