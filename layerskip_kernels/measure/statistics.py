"""Mean, median and bootstrap interval of repeated measurements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95


def summary(values: Sequence[float], seed: int = 0) -> dict[str, float | None] | None:
    """Mean, median, and the bootstrap interval of the mean (`low`, `high`; None for one value). None without values."""
    if not len(values):
        return None
    low, high = _interval(values, seed)
    return {"mean": float(np.mean(values)), "median": float(np.median(values)), "low": low, "high": high}


def _interval(values: Sequence[float], seed: int) -> tuple[float | None, float | None]:
    from scipy.stats import bootstrap

    if len(values) < 2:
        return None, None
    rng = np.random.default_rng(seed)
    # the percentile method, because BCa has no answer where all values are equal
    found = bootstrap((np.asarray(values),), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=rng)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
