"""Warnings in words when a run's figures show that its features collapse or do not improve."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from statistics import median

# how far from collapsed a figure is, and below which share of its best value it counts as low
_HEALTH: dict[str, tuple[Callable[[float], float], float]] = {
    "rankme": (lambda rank: rank - 1, 0.5),
    "spread": (lambda spread: spread, 0.5),
    "cosine": (lambda cosine: 1 - cosine, 0.25),  # the square of the spread
}
_BEST = {"rankme": "highest", "spread": "highest", "cosine": "lowest"}
_PROBES = ("knn", "linear")
_PATIENCE = 3  # measurements in a row that are low and no better than the one before
_WARMUP_PATIENCE = 8  # at the start healthy runs fall far below initialisation, and then recover
_SAME = 1.02  # values that differ by less are equal
_WINDOW, _FIRST_LOSSES, _LAST_LOSSES = 50, 20, 3
_JUMP = 2.0  # times the median of the losses before
_PROBED, _FIRST_PROBES = 5, 8
_GAIN = 1.03  # times the accuracy at initialisation


class CollapseWatch:
    """Looks at the rows of a run's log and says what is wrong, once per onset.

    - Collapse: rank, spread or 1 - cosine is below half (a quarter for 1 - cosine) of the best
      value so far, initialisation included, in three measurements in a row that do not recover;
      eight while the learning rate still rises.
    - Jump: three losses in a row above twice the median of up to 50 before. The slow rise after
      the first fall, which is normal, is not reported.
    - No gain: kNN and linear accuracy of the last five measurements are on average no better than
      at initialisation; after eight measurements, and not while the learning rate rises.
    - Figures that are not finite.

    What it knows is a function of the rows alone, so `replay` of a log restores it.

    Args:
        initial: Figures of the monitor at initialisation.
    """

    def __init__(self, initial: dict[str, float] | None = None) -> None:
        self.initial = dict(initial or {})
        self._best = {name: self.initial[name] for name in _HEALTH if name in self.initial}
        self._last: dict[str, float] = {}
        self._low = dict.fromkeys(_HEALTH, 0)
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._probes: dict[str, list[float]] = {name: [] for name in _PROBES}
        self._lr, self._rising = 0.0, False
        self._reported: set[str] = set()

    def replay(self, rows: Iterable[dict[str, float]]) -> None:
        """Take in the rows of a log (`read_log`) without a warning."""
        for row in rows:
            self.update(int(row["step"]) + 1, row)

    def update(self, step: int, figures: dict[str, float]) -> list[str]:
        """Take in a row of the log.

        Args:
            step: Updates done.
            figures: Values by column of the log; any may be missing.

        Returns:
            Warnings that are new: what is seen, what it means and what to try.
        """
        if "lr" in figures:
            self._rising, self._lr = figures["lr"] > self._lr, figures["lr"]
        texts = {
            "finite": _not_finite(figures),
            "jump": self._jump(figures),
            "collapse": self._collapse(figures),
            "gain": self._no_gain(figures),
        }
        new = [text for kind, text in texts.items() if text and kind not in self._reported]
        for kind, text in texts.items():
            if text:
                self._reported.add(kind)
            elif text is not None:  # measured, and all is well again
                self._reported.discard(kind)
        return [f"step {step}: {text}" for text in new]

    def _collapse(self, figures: dict[str, float]) -> str | None:
        """A warning; empty where all is well; None where nothing can be said."""
        measured = {k: figures[k] for k in _HEALTH if math.isfinite(figures.get(k, math.nan))}
        if not measured:
            return None
        for name, value in measured.items():
            health, share = _HEALTH[name]
            now, before = health(value), health(self._last.get(name, value))
            best = max(self._best.get(name, value), value, key=health)
            low = now < share * health(best)
            self._low[name] = self._low[name] + 1 if low and now <= _SAME * before else int(low)
            self._best[name], self._last[name] = best, value
        if not any(self._low.values()):
            return ""
        if max(self._low.values()) < (_WARMUP_PATIENCE if self._rising else _PATIENCE):
            return None
        return (
            f"the features are collapsing: {', '.join(map(self._beside, measured))}. The target "
            "encoder tells images apart less and less; a low loss then means nothing. It rarely "
            f"mends by itself: start again with a lower optim.lr{self._rate()}, another range of "
            "the moving average (optim.momentum=0.995, 0.996 or 0.998), a regularizer "
            "(optim.regularizer_weight=0.1 optim.regularizer_over=residuals), a longer "
            "optim.warmup, or larger targets (mask.target_scale)"
        )

    def _beside(self, name: str) -> str:
        parts = [f"{_BEST[name]} {self._best[name]:.3g}"]
        if name in self.initial:
            parts.append(f"at initialisation {self.initial[name]:.3g}")
        return f"{name} {self._last[name]:.3g} ({', '.join(parts)})"

    def _rate(self) -> str:
        return f" (now {self._lr:.2g})" if self._lr else ""

    def _jump(self, figures: dict[str, float]) -> str | None:
        if not math.isfinite(figures.get("loss", math.nan)):
            return None
        self._losses.append(figures["loss"])
        losses = list(self._losses)
        if len(losses) < _FIRST_LOSSES:
            return None
        usual, last = median(losses[:-_LAST_LOSSES]), losses[-_LAST_LOSSES:]
        if min(last) <= _JUMP * usual:
            return ""
        self._losses.clear()  # later jumps are measured against the new level
        return (
            f"the loss jumped from {usual:.3g} to {last[-1]:.3g} and stays there. A slow rise "
            "after the first fall is normal, a sudden one usually means that the features "
            "collapse in part: look at rankme and spread (ijepa-zoo plot). If they fall, go back "
            f"to a lower optim.lr{self._rate()} or another optim.momentum"
        )

    def _no_gain(self, figures: dict[str, float]) -> str | None:
        names = [
            k for k in _PROBES if k in self.initial and math.isfinite(figures.get(k, math.nan))
        ]
        for name in names:
            self._probes[name].append(figures[name])
        if not names or self._rising or len(self._probes[names[0]]) < _FIRST_PROBES:
            return None
        recent = {name: sum(self._probes[name][-_PROBED:]) / _PROBED for name in names}
        if any(value > _GAIN * self.initial[name] for name, value in recent.items()):
            return ""
        seen = ", ".join(f"{k} {v:.1f} % (then {self.initial[k]:.1f} %)" for k, v in recent.items())
        return (
            f"the features are no better than at initialisation: {seen}, mean of the last five "
            "measurements. The published recipe does this on small data sets: try a lower "
            f"optim.lr{self._rate()} with more steps, a regularizer "
            "(optim.regularizer_weight=0.1 optim.regularizer_over=residuals), smaller targets "
            "(mask.target_scale) on small images, or start from released weights (--init)"
        )


def _not_finite(figures: dict[str, float]) -> str | None:
    measured = [name for name in (*_HEALTH, *_PROBES) if name in figures]
    bad = [name for name in measured if not math.isfinite(figures[name])]
    if not bad:
        return "" if measured else None
    return (
        f"{', '.join(bad)} cannot be measured: features of held-out images are not finite. Use "
        "optim.precision=fp32, or a lower optim.lr"
    )
