"""Order statistics and bootstrap intervals, the same for every experiment.

A summary is computed from the samples that are kept in the same file, with a seed that depends only on what is
summarised, so that anyone who repeats the computation gets the same digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

BOOTSTRAP_RESAMPLES = 2000
PERCENTILES = (5, 50, 95, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile, linear between neighbours (numpy's default)."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), percent))


def bootstrap_ci95(values: Sequence[float], *, seed: int, resamples: int = BOOTSTRAP_RESAMPLES) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of the median; of one value, that value twice."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("no values to resample")
    if data.size == 1:
        return float(data[0]), float(data[0])
    draws = np.random.default_rng(seed).integers(0, data.size, size=(resamples, data.size))
    medians = np.median(data[draws], axis=1)
    return float(np.percentile(medians, 2.5)), float(np.percentile(medians, 97.5))


def seed_of(label: str) -> int:
    """A seed that depends on `label` alone (Python's own `hash` changes from run to run)."""
    return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little")


def summarise(values: Sequence[float], *, label: str) -> dict[str, float | int]:
    """median, p05, p50, p95, p99, ci95_low, ci95_high and n of `values`; `label` seeds the bootstrap."""
    low, high = bootstrap_ci95(values, seed=seed_of(label))
    row: dict[str, float | int] = {"median": percentile(values, 50)}
    row |= {f"p{percent:02d}": percentile(values, percent) for percent in PERCENTILES}
    return row | {"ci95_low": low, "ci95_high": high, "n": len(values)}
