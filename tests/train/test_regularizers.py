import numpy as np
import pytest
import torch

from ijepa_zoo.errors import SettingsError
from ijepa_zoo.train.regularizers import VarianceCovariance


def by_hand(samples, share):
    """VICReg equations 1-4 with NumPy's covariance."""
    covariance = np.cov(samples, rowvar=False)
    variance = np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean()
    off_diagonal = covariance - np.diag(np.diag(covariance))
    return variance + share * (off_diagonal**2).sum() / len(covariance)


@pytest.mark.parametrize("over", ["images", "residuals"])
def test_variance_covariance_is_the_formula(over):
    tokens = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0)) * 0.7
    means = tokens.mean(1)
    samples = means if over == "images" else (tokens - means[:, None]).reshape(35, 6)
    expected = 0.3 * by_hand(samples.double().numpy(), 0.2)
    term = VarianceCovariance(0.3, over, covariance_share=0.2)
    assert term(tokens).item() == pytest.approx(expected, rel=1e-5)
    assert term.value.item() == pytest.approx(expected, rel=1e-5)


def test_float32_under_autocast():
    tokens = torch.randn(16, 4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = VarianceCovariance(1.0)(tokens)
    assert inside.dtype == torch.float32
    assert inside.item() == VarianceCovariance(1.0)(tokens.float()).item()


def test_one_image_has_no_variance():
    with pytest.raises(SettingsError, match="two images"):
        VarianceCovariance(1.0, "images")(torch.ones(1, 3, 4))
