"""Intervals of accuracies."""

from __future__ import annotations

import math

from ..errors import SettingsError

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of an accuracy, in percent.

    Wilson's score interval (E. B. Wilson, "Probable inference, the law of succession, and
    statistical inference", JASA 22, 1927): unlike the normal approximation it stays in 0..100 and
    holds for small numbers and accuracies near the ends.

    Args:
        right: Right answers.
        total: Answers, at least 1.

    Raises:
        ValueError: There are no answers, or more right ones than answers.
    """
    if not 0 <= right <= total or total < 1:
        raise SettingsError(
            f"{right} right answers of {total}: give 0 <= right <= total, total >= 1"
        )
    share, spread = right / total, _Z * _Z / total
    middle = share + spread / 2
    half = _Z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low, high = middle - half, middle + half
    return 100 * max(low / (1 + spread), 0.0), 100 * min(high / (1 + spread), 1.0)
