"""Intervals: Student t, paired by problem."""

import numpy as np
import pytest

from opd_jax.study.statistics import mean_interval, paired_difference, share_interval


def test_interval_is_students_t():
    values = np.random.default_rng(0).normal(size=9)
    got = mean_interval(values)
    half = 2.306004135 * values.std(ddof=1) / 3  # t quantile 0.975 with 8 degrees of freedom
    assert got.mean == pytest.approx(values.mean())
    assert got.low == pytest.approx(values.mean() - half)
    assert got.high == pytest.approx(values.mean() + half)


def test_coverage_of_the_interval():
    rng = np.random.default_rng(1)
    covered = [(i := mean_interval(rng.normal(size=12))).low <= 0 <= i.high for _ in range(2000)]
    assert 0.935 < np.mean(covered) < 0.965


def test_pairs_are_matched_by_problem_not_by_order():
    new, old = {"a": 1.0, "b": 0.5, "c": 0.0}, {"c": 0.0, "a": 0.0, "b": 0.5}
    assert paired_difference(new, old).mean == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="same problems"):
        paired_difference(new, {"a": 1.0})


def test_without_spread_there_is_no_interval():
    for values in ([0.5], [1.0, 1.0]):
        got = mean_interval(values)
        assert (got.mean, got.low, got.high) == (values[0], None, None)
        assert got.percent() == f"{100 * values[0]:.1f}"
    assert share_interval([1.0]).low is None
    assert share_interval([0.5, 0.5]).low is None


def test_intervals_of_shares_stay_among_shares():
    got = share_interval([1.0] * 197 + [0.0] * 3)
    # Wilson: (p + z^2/2n +- z sqrt(p q / n + z^2/4n^2)) / (1 + z^2/n)
    p, n, z = 0.985, 200, 1.959963985
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert got.low == pytest.approx((middle - half) / (1 + z**2 / n))
    assert got.high == pytest.approx((middle + half) / (1 + z**2 / n))
    assert got.high < 1 < mean_interval([1.0] * 197 + [0.0] * 3).high
    assert share_interval([0.0] * 5).low == 0
    parts = [0.0, 0.125, 1.0]
    assert share_interval(parts).low == 0 > mean_interval(parts).low
    inside = [0.5, 0.5, 0.625, 0.5]
    assert share_interval(inside) == mean_interval(inside)
