"""Fixed two-dimensional sine-cosine positions, shared by encoders and predictors."""

import torch
from torch import Tensor

from ..errors import SettingsError


def sincos_positions(embed_dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Sine-cosine table of a grid of patches in raster order.

    The first half of the channels varies along the width, the second along the height; each half
    is ``[sin(p * w_k), cos(p * w_k)]`` with ``w_k = 10000 ** (-k / (embed_dim / 4))`` (Vaswani et
    al., 2017, applied per axis as in MAE and I-JEPA). Computed in float64.

    Args:
        embed_dim: Width of the table, a multiple of 4.
        grid_size: Rows and columns of the grid.

    Returns:
        Tensor ``[1, rows * columns, embed_dim]``, float32.

    Raises:
        ValueError: If ``embed_dim`` is not a multiple of 4.
    """
    if embed_dim % 4:
        raise SettingsError(f"sine-cosine positions need a width divisible by 4, got {embed_dim}")
    omega = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim / 4))
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid_size)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (column, row)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return table.float().unsqueeze(0)
