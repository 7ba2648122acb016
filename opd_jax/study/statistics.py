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
    """A mean and its two-sided 95% interval; without one where the values do not give any."""

    mean: float
    low: float | None
    high: float | None

    def percent(self) -> str:
        """As percentages, for example ``41.2 [38.0, 44.4]``; ``41.2`` without an interval."""
        if self.low is None or self.high is None:
            return f"{100 * self.mean:.1f}"
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def mean_interval(values: Sequence[float]) -> Interval:
    """Student-t interval of a mean over independent values, at least one.

    A single value, or values that are all equal, give none: there is no spread to go by.

    >>> mean_interval([0.0, 1.0, 0.5, 0.5]).percent()
    '50.0 [-15.0, 115.0]'
    """
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2 or np.ptp(array) == 0:
        return Interval(mean, None, None)
    low, high = stats.ttest_1samp(array, 0.0).confidence_interval(0.95)
    return Interval(mean, float(low), float(high))


def share_interval(values: Sequence[float]) -> Interval:
    """Interval of a mean of shares, each in [0, 1], which does not leave [0, 1].

    Of values that are all 0 or 1, as pass@n of n samples is, Wilson's interval (1927); of others Student's t,
    cut at the ends.

    >>> share_interval([1.0] * 8).percent(), share_interval([0.0, 1.0, 0.5, 0.5]).percent()
    ('100.0 [67.6, 100.0]', '50.0 [0.0, 100.0]')
    """
    if len(values) > 1 and set(values) <= {0.0, 1.0}:
        found = stats.binomtest(int(sum(values)), len(values)).proportion_ci(0.95, method="wilson")
        return Interval(float(np.mean(values)), float(found.low), float(found.high))
    told = mean_interval(values)
    if told.low is None or told.high is None:
        return told
    return Interval(told.mean, max(told.low, 0.0), min(told.high, 1.0))


def paired_difference(new: Mapping[str, float], old: Mapping[str, float]) -> Interval:
    """Interval of the mean of ``new - old`` over the same problems.

    Raises:
      ValueError: the two do not cover the same problems.
    """
    if new.keys() != old.keys():
        raise ValueError("a paired difference needs the same problems on both sides")
    return mean_interval([new[problem] - old[problem] for problem in old])
