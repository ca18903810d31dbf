import math

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from ijepa_zoo.models.encoder import sincos_positions


def _by_hand(width, rows, columns):
    """One number at a time: [sin, cos] of the column, then [sin, cos] of the row."""
    quarter = width // 4
    table = []
    for row in range(rows):
        for column in range(columns):
            values = []
            for place in (column, row):
                angles = [place / 10000 ** (k / quarter) for k in range(quarter)]
                values += [math.sin(angle) for angle in angles]
                values += [math.cos(angle) for angle in angles]
            table.append(values)
    return torch.tensor([table], dtype=torch.float64)


@pytest.mark.parametrize(("width", "grid"), [(8, (3, 3)), (12, (2, 5)), (64, (7, 4)), (4, (1, 1))])
def test_table_equals_the_formula_computed_one_number_at_a_time(width, grid):
    table = sincos_positions(width, grid)
    assert table.dtype == torch.float32
    assert_close(table.double(), _by_hand(width, *grid), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["encoder_pos_embed", "predictor_pos_embed"])
def test_table_equals_the_published_one(golden, name):
    published = load_file(golden / "step.safetensors")[name]
    assert_close(sincos_positions(published.shape[2], (6, 6)), published, rtol=0, atol=1e-6)


def test_width_that_does_not_divide_by_four_is_refused():
    with pytest.raises(ValueError, match="divisible by 4, got 42"):
        sincos_positions(42, (3, 3))
