import numpy as np
import pytest
import torch

from ijepa_zoo.train.monitor import rankme, spread


def test_rankme_of_known_spectra():
    basis = torch.linalg.qr(torch.randn(50, 8, dtype=torch.float64))[0]
    assert rankme(basis) == pytest.approx(8, rel=1e-4)
    assert rankme(basis[:, :1] * torch.ones(1, 8)) == pytest.approx(1, abs=1e-4)
    singular = np.array([4.0, 2.0, 1.0, 1.0])
    p = singular / singular.sum()
    expected = np.exp(-(p * np.log(p)).sum())
    assert rankme(basis[:, :4] * torch.from_numpy(singular)) == pytest.approx(expected, rel=1e-4)


def test_spread():
    torch.manual_seed(0)
    assert spread(torch.ones(10, 4)) == 0
    assert spread(torch.randn(4000, 32)) == pytest.approx(1, abs=0.02)
    assert spread(torch.randn(4000, 32) + 5) < 0.25


@pytest.mark.parametrize("shape", [(3,), (1, 4), (2, 3, 4)])
def test_shapes(shape):
    with pytest.raises(ValueError, match=r"\[n, D\]"):
        rankme(torch.ones(shape))
