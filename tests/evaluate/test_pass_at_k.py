"""pass@k against all subsets."""

from itertools import combinations

import pytest

from opd_jax.evaluate import Answer, by_problem, pass_at_k


def test_it_is_the_mean_over_all_subsets():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * c + [False] * (n - c), k))
                want = sum(any(s) for s in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(want)


def test_nonsense_is_refused():
    for n, c, k in ((3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at_k(n, c, k)


def test_by_problem_groups_samples():
    records = [
        Answer(p, s, c, False, 1, "") for p, s, c in (("a", 0, True), ("b", 0, False), ("a", 1, False))
    ]
    assert by_problem(records[:1] + records[2:], 1) == {"a": 0.5}
    assert by_problem(records, 1) == {"a": 0.5, "b": 0.0}
