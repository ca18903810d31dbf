"""Whether the contenders of `bench train` compute the same, before their times are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..train.config import Precision
from .published import PUBLISHED
from .published_step import PublishedStep
from .result import agreed
from .steps import OurStep, Step, StepSettings
from .timing import OURS

_COMPARED = 3  # updates whose losses must agree
_EXACT, _LOOSE = 1e-5, 2e-2  # relative; bfloat16 keeps 8 bits


def compare_first_updates(
    own: StepSettings, steps: Mapping[str, Step], precisions: Mapping[str, Precision]
) -> dict[str, dict[str, Any]]:
    """Compare the others' first updates with ours: as they are timed, the published also in fp32.

    Args:
        own: What our step is done with.
        steps: By contender; none has done an update yet.
        precisions: Of each of them.

    Raises:
        DisagreementError: A loss differs by more than rounding explains.
    """
    found: dict[str, dict[str, Any]] = {}
    compared = {name: _LOOSE for name in steps if name != OURS}
    published = steps.get(PUBLISHED)
    if isinstance(published, PublishedStep):
        exact = replace(own, precision="fp32", compile=False, predictor_context=None)
        if exact == own and precisions[PUBLISHED] == "fp32":
            compared[PUBLISHED] = _EXACT
        else:
            first = OurStep(exact)
            both: dict[str, Step] = {
                OURS: first,
                PUBLISHED: PublishedStep(published.code, first, "fp32"),
            }
            whole: dict[str, Precision] = {OURS: "fp32", PUBLISHED: "fp32"}
            same = compare_losses(both, whole, {PUBLISHED: _EXACT})
            found["published in fp32"] = same[PUBLISHED]
        if own.predictor_context not in (None, "repeated"):
            del compared[PUBLISHED]
    return found | compare_losses(steps, precisions, compared) if compared else found


def compare_losses(
    steps: Mapping[str, Step],
    precisions: Mapping[str, Precision],
    compared: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """Do the first updates of all, and compare their losses with ours.

    Args:
        steps: By contender, with the same weights and batches.
        precisions: Of each of them.
        compared: Those that are compared, and the largest relative difference of a loss.

    Raises:
        DisagreementError: A loss differs by more.
    """
    losses = {name: [step.update() for _ in range(_COMPARED)] for name, step in steps.items()}
    found = {}
    for name, tolerance in compared.items():
        pairs = list(zip(losses[OURS], losses[name]))
        difference = max(abs(one - two) / abs(one) for one, two in pairs)
        what = " and ".join(dict.fromkeys((precisions[OURS], precisions[name])))
        words = f"losses of the first {_COMPARED} updates in {what}, relative,"
        shown = ", ".join(f"{one:.6g} and {two:.6g}" for one, two in pairs)
        found[name] = agreed(words, difference, tolerance, shown)
    return found
