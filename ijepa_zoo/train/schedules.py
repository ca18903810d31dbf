"""Learning rate, weight decay and momentum as pure functions of the step (updates done).

They reproduce the published schedulers (facebookresearch/ijepa, `src/utils/schedulers.py`), which
advance before the update: learning rate and weight decay of step 0 are one step along their curve,
the momentum is not. Past the horizon every schedule stays at its final value.
"""

from __future__ import annotations

import math


def warmup_cosine(
    step: int, *, start: float, peak: float, final: float, warmup_steps: int, horizon: int
) -> float:
    """Learning rate: linear from `start` to `peak`, then half a cosine down to `final`.

    Args:
        step: Updates done.
        start: Value before the first step.
        peak: Value at the end of the warm-up.
        final: Value at `horizon`.
        warmup_steps: Steps of the linear part.
        horizon: Steps of the whole schedule.

    Returns:
        The learning rate of this update.
    """
    done = step + 1
    if done < warmup_steps:
        return start + done / warmup_steps * (peak - start)
    return _half_cosine(peak, final, (done - warmup_steps) / max(1, horizon - warmup_steps))


def cosine(step: int, *, first: float, final: float, horizon: int) -> float:
    """Weight decay: half a cosine from `first` to `final` over `horizon` steps."""
    return _half_cosine(first, final, (step + 1) / horizon)


def linear(step: int, *, first: float, final: float, horizon: int) -> float:
    """Momentum of the target encoder: a line from `first` to `final` over `horizon` steps."""
    return first + min(step / horizon, 1.0) * (final - first)


def _half_cosine(first: float, final: float, progress: float) -> float:
    return final + (first - final) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
