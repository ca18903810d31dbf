"""Multi-block masks (arXiv 2301.08243, section 3), sampled for a whole batch at once.

Two modes share the code. `published` draws what the released weights were trained with, including
its three biases: scale and aspect ratio come from one uniform draw, the last row and column are
never used, and masks are cut at the bottom. `unbiased` removes all three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from .errors import SettingsError
from .seeds import Stream, numpy_generator

_TRIES = 20  # draws of the context corner before a target is dropped from the constraint
_Size = tuple[int, int]
_Bool = npt.NDArray[np.bool_]
_Int = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MultiBlockMasks:
    """Sampler of one context block and several target blocks per image.

    Block sizes are equal within a batch and depend on `step` alone; positions are drawn per image.
    All masks are a pure function of (seed, step): any step can be repeated on its own, and any
    part of a batch can be drawn without the rest.

    Attributes:
        grid_size: Patches of the image as (height, width).
        num_targets: Target blocks per image, M.
        target_scale: Area of a target block as a fraction of the grid, (min, max).
        target_aspect: Height / width of a target block, (min, max).
        context_scale: Area of the (square) context block before targets are removed, (min, max).
        min_keep: Every block has more than this many patches, the context also after removal of
            the targets.
        allow_overlap: Keep target patches in the context.
        mode: `published` reproduces the sampler of the official repository; `unbiased` draws scale
            and aspect independently, uses the whole grid and cuts long contexts at random.

    Raises:
        ValueError: A value is out of range, or `grid_size` is too small for `min_keep`.
    """

    grid_size: _Size
    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    min_keep: int = 10
    allow_overlap: bool = False
    mode: Literal["published", "unbiased"] = "published"

    def __post_init__(self) -> None:
        """Refuse settings under which some step could not be sampled."""
        if self.mode not in ("published", "unbiased"):
            raise SettingsError(f"mode is {self.mode!r}; it must be 'published' or 'unbiased'")
        if min(self.grid_size) < 2:
            raise SettingsError(
                f"grid_size {self.grid_size} is too small: it must be at least (2, 2)"
            )
        if self.num_targets < 1 or self.min_keep < 0:
            raise SettingsError(
                f"num_targets is {self.num_targets} and min_keep {self.min_keep}; "
                "they must be at least 1 and 0"
            )
        for name in ("target_scale", "target_aspect", "context_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (high > 1 and name != "target_aspect"):
                bound = "" if name == "target_aspect" else " <= 1"
                raise SettingsError(f"{name} is {(low, high)}; it must be 0 < min <= max{bound}")
        for name, sizes in (
            ("target", self._possible_sizes(self.target_scale, self.target_aspect)),
            ("context", self._possible_sizes(self.context_scale, (1.0, 1.0))),
        ):
            height, width = min(sizes, key=math.prod)
            if height * width <= self.min_keep:
                most = height * width - 1  # without a patch, no min_keep would do
                fewer = f"min_keep={most} or less, " if most >= 0 else ""
                raise SettingsError(
                    f"on a grid of {self.grid_size} a {name} block can be {height} x {width}, "
                    f"which is not more than min_keep={self.min_keep} patches: use {fewer}a larger "
                    f"{name}_scale or a larger grid (a larger image or smaller patches)"
                )
        self._check_room()

    def _check_room(self) -> None:
        """Refuse targets that leave no patch for the context, wherever the blocks are."""
        height, width = max(
            self._possible_sizes(self.target_scale, self.target_aspect), key=math.prod
        )
        spare = 1 if self.mode == "published" else 0  # of the last row and column
        left = (self.grid_size[0] - spare) * (self.grid_size[1] - spare) - height * width
        if left <= self.min_keep and not self.allow_overlap:
            raise SettingsError(
                f"on a grid of {self.grid_size} a target block can be {height} x {width}, which "
                f"leaves no context of more than min_keep={self.min_keep} patches: use a smaller "
                "target_scale"
            )

    def block_sizes(self, step: int) -> tuple[_Size, _Size]:
        """Sizes (height, width) of the target blocks and of the context block at `step`."""
        # The same numbers as in the official repository, which draws them one by one.
        draws = iter(torch.rand(4, generator=torch.Generator().manual_seed(step)).tolist())

        def draw(scale: tuple[float, float], aspect: tuple[float, float]) -> _Size:
            first = next(draws)
            second = first if self.mode == "published" else next(draws)
            return self._size(_between(scale, first), _between(aspect, second))

        return draw(self.target_scale, self.target_aspect), draw(self.context_scale, (1.0, 1.0))

    def sample(
        self,
        batch_size: int,
        *,
        seed: int,
        step: int,
        part: slice | None = None,
        group_size: int | Literal["global"] = "global",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the masks of one batch, or of a part of it.

        Args:
            batch_size: Images B of the whole batch, over all processes.
            seed: The run's seed.
            step: Updates done so far.
            part: Images whose masks are returned; None for all.
            group_size: How many consecutive images share one context length, that of the shortest
                (in the official repository the images of a GPU). `global` for the whole batch.

        Returns:
            `context` [b, K] and `targets` [b, M, L], int64 patch indices in raster order, of the
            b images of `part`. K is the length of the shortest context of their group.

        Raises:
            ValueError: `batch_size` is below 1, or `part` spans several groups.
        """
        if batch_size < 1:
            raise SettingsError(f"batch_size is {batch_size}; it must be at least 1")
        first, last, _ = (part or slice(None)).indices(batch_size)
        group = _group(first, last, batch_size if group_size == "global" else group_size)
        rng = numpy_generator(seed, Stream.MASKS, step)
        target_size, context_size = self.block_sizes(step)
        shape = (batch_size, self.num_targets)
        tops, lefts = self._corners(rng, target_size, shape)
        columns = self.grid_size[1]
        first_block = np.arange(target_size[0])[:, None] * columns + np.arange(target_size[1])
        targets = (tops * columns + lefts)[..., None] + first_block.reshape(-1)
        if self.allow_overlap:
            blocked = np.zeros((self.num_targets, batch_size, math.prod(self.grid_size)), np.bool_)
        else:
            blocked = self._blocks(target_size, tops.T, lefts.T)
        allowed, counts = self._contexts(rng, context_size, blocked)
        if self.mode == "unbiased":  # drawn for the whole batch, so that `part` does not matter
            keys = rng.integers(2**32, size=allowed.shape, dtype=np.uint32)[first:last]
        else:
            keys = None
        shortest = int(counts[group].min())
        context = self._cut(allowed[first:last], counts[first:last], shortest, keys)
        return torch.from_numpy(context), torch.from_numpy(targets[first:last])

    def _size(self, scale: float, aspect: float) -> _Size:
        grid_h, grid_w = self.grid_size
        area = int(grid_h * grid_w * scale)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if self.mode == "published":
            return min(height, grid_h - 1), min(width, grid_w - 1)
        # A side that does not fit is clipped and the other one keeps the area.
        if height > grid_h:
            height, width = grid_h, round(area / grid_h)
        elif width > grid_w:
            height, width = round(area / grid_w), grid_w
        return min(height, grid_h), min(width, grid_w)

    def _possible_sizes(
        self, scale: tuple[float, float], aspect: tuple[float, float]
    ) -> set[_Size]:
        draws = [i / 128 for i in range(129)]
        pairs = (
            [(u, u) for u in draws]
            if self.mode == "published"
            else [(u, v) for u in draws[::8] for v in draws[::8]]
        )
        return {self._size(_between(scale, u), _between(aspect, v)) for u, v in pairs}

    def _corners(
        self, rng: np.random.Generator, size: _Size, shape: tuple[int, ...]
    ) -> tuple[_Int, _Int]:
        """Top and left of blocks of `size`; the published upper bound is one too small."""
        spare = 0 if self.mode == "published" else 1
        tops = rng.integers(self.grid_size[0] - size[0] + spare, size=shape)
        return tops, rng.integers(self.grid_size[1] - size[1] + spare, size=shape)

    def _contexts(
        self, rng: np.random.Generator, size: _Size, blocked: _Bool
    ) -> tuple[_Bool, _Int]:
        """Context patches [B, H * W] and their numbers [B], given blocked patches [M, B, H * W]."""
        num_targets, batch_size, patches = blocked.shape
        allowed = np.empty((batch_size, patches), np.bool_)
        counts = np.empty(batch_size, np.int64)
        waiting = np.arange(batch_size)
        for constraints in range(num_targets, -1, -1):
            free = ~np.logical_or.reduce(blocked[:constraints], axis=0)
            for _ in range(_TRIES):
                tops, lefts = self._corners(rng, size, waiting.shape)
                tried = self._blocks(size, tops, lefts)
                tried &= free[waiting]
                allowed[waiting], counts[waiting] = tried, tried.sum(axis=1)
                waiting = waiting[counts[waiting] <= self.min_keep]
                if not len(waiting):
                    return allowed, counts
        raise AssertionError("a context block without constraints is larger than min_keep")

    def _blocks(self, size: _Size, tops: _Int, lefts: _Int) -> _Bool:
        """Patches [..., H * W] of blocks of `size` with the given corners."""
        # One row per possible top or left: taking whole rows is faster than comparing.
        height, width = self.grid_size
        in_rows = _intervals(height, size[0]).repeat(width, axis=1)
        in_columns = np.tile(_intervals(width, size[1]), height)
        blocks: _Bool = in_rows.take(tops, axis=0)
        blocks &= in_columns.take(lefts, axis=0)
        return blocks

    def _cut(
        self, allowed: _Bool, counts: _Int, shortest: int, keys: npt.NDArray[np.uint32] | None
    ) -> _Int:
        """Indices [b, shortest] of the allowed patches; the first ones, or those of lowest keys."""
        patches = allowed.shape[1]
        if keys is not None:
            # The index in the low bits makes keys distinct; the top bit sorts patches outside the
            # context last.
            low_bits = np.uint32((1 << (patches - 1).bit_length()) - 1)
            keys &= np.uint32(2**31 - 1) ^ low_bits
            keys |= np.arange(patches, dtype=np.uint32)
            keys |= (~allowed).astype(np.uint32) << np.uint32(31)
            allowed = keys <= np.partition(keys, shortest - 1, axis=1)[:, shortest - 1, None]
            counts = np.full_like(counts, shortest)
        row_starts = np.arange(0, allowed.size, patches)[:, None]
        firsts = np.cumsum(counts) - counts
        kept: _Int = np.flatnonzero(allowed)[firsts[:, None] + np.arange(shortest)] - row_starts
        return kept


def _group(first: int, last: int, size: int) -> slice:
    """The group of `size` images that contains images `first` to `last`."""
    start = first // size * size
    if not first < last <= start + size:
        raise SettingsError(
            f"images {first} to {last} of the batch span several groups of group_size={size}: "
            "draw each group on its own, or use group_size='global'"
        )
    return slice(start, start + size)


def _intervals(length: int, size: int) -> _Bool:
    """Positions of an interval for each start, [length, length]."""
    offset = np.arange(length) - np.arange(length)[:, None]
    return (offset >= 0) & (offset < size)


def _between(bounds: tuple[float, float], u: float) -> float:
    low, high = bounds
    return low + u * (high - low)
