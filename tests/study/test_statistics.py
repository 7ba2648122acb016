"""Intervals: Student t, paired by problem."""

import numpy as np
import pytest

from opd_jax.study.statistics import mean_interval, paired_difference


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


def test_no_spread_gives_no_width():
    assert mean_interval([0.5]).high == mean_interval([1.0, 1.0]).high - 0.5 == 0.5
