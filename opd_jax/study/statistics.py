"""Intervals over problems.

They say how well these problems measure one trained model. They do not say how another training seed
would fall out, which is the larger part of the uncertainty between two training methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its two-sided 95% Student-t interval."""

    mean: float
    low: float
    high: float

    def percent(self) -> str:
        """As percentages, for example ``41.2 [38.0, 44.4]``."""
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def mean_interval(values: Sequence[float]) -> Interval:
    """Student-t interval of a mean over independent values, at least one.

    A single value, or values that are all equal, give an interval of no width: the t interval has
    nothing to go by there.

    >>> mean_interval([0.0, 1.0, 0.5, 0.5]).percent()
    '50.0 [-15.0, 115.0]'
    """
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2 or np.ptp(array) == 0:
        return Interval(mean, mean, mean)
    low, high = stats.ttest_1samp(array, 0.0).confidence_interval(0.95)
    return Interval(mean, float(low), float(high))


def paired_difference(new: Mapping[str, float], old: Mapping[str, float]) -> Interval:
    """Interval of the mean of ``new - old`` over the same problems.

    Raises:
      ValueError: the two do not cover the same problems.
    """
    if new.keys() != old.keys():
        raise ValueError("a paired difference needs the same problems on both sides")
    return mean_interval([new[problem] - old[problem] for problem in old])
