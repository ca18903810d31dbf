"""Is SGD far from what it should have come to? A convex solution on the same cached features."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .feeds import CachedFeed
from .heads import HeadGrid
from .logistic import choose_logistic
from .representations import Representations

_WORK = 4e8  # images x features x classes, which bound the time: about 10 s on one CPU core
_L2S = (1e-2, 1e-3, 1e-4)  # of standardised features
_ITERATIONS = 100
_FAR = 1.0  # points of accuracy


def convex_check(
    feed: CachedFeed, source: Representations, grid: HeadGrid, chosen: int, sgd: float | None
) -> dict[str, Any] | None:
    """Logistic regression by L-BFGS on the representation of the chosen head.

    It sees the same images without their mirror images, at most as many as take some seconds, and
    is measured on the same held-out images.

    Args:
        feed: Cached features.
        source: What they are of.
        grid: The trained heads.
        chosen: Number of the chosen head.
        sgd: Its accuracy on the held-out images in percent; None where there are none.

    Returns:
        Figures, with `warning` where SGD is more than one point and two standard errors behind;
        None without held-out images.
    """
    if sgd is None or not len(feed.choose):
        return None
    representation, classes = grid.specs[chosen].representation, grid.num_classes
    most = max(int(_WORK / (source.widths[representation] * classes)), 2 * classes)
    places = np.linspace(0, len(feed.fit), min(most, len(feed.fit)), endpoint=False).astype(int)
    (x, y), (held, answers) = (
        (
            source.split(feed.train.rows[of].to(feed.device))[representation].float(),
            feed.labels(feed.probe.train, feed.train, of),
        )
        for of in (feed.fit[places], feed.choose)
    )
    path = choose_logistic(
        x, y, held, answers, _L2S, num_classes=classes, max_iterations=_ITERATIONS
    )
    convex = 100 * max(path.correct.values()) / len(feed.choose)
    error = 100 * math.sqrt(convex / 100 * (1 - convex / 100) / len(feed.choose))
    found: dict[str, Any] = {
        "method": "logistic regression, L-BFGS",
        "representation": representation,
        "l2": path.best.l2,
        "fit_images": len(places),
        "held_out": convex,
        "held_out_sgd": sgd,
    }
    if convex - sgd > max(_FAR, 2 * error):
        found["warning"] = (
            f"SGD is far from converged: its best head has {sgd:.1f} % on the held-out images, "
            f"logistic regression {convex:.1f} % on the same features ({representation})"
        )
    return found
