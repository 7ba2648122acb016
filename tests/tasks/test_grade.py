"""Grading: exact on integers, literal otherwise, never by evaluation."""

import sys

import pytest

from opd_jax.tasks import boxed, grade


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        (r"a+3=3" "\n" r"\boxed{3}", "3", True),
        (r"\boxed{3} no, \boxed{4}", "4", True),
        (r"\boxed{3} no, \boxed{4}", "3", False),
        (r"\boxed{ -07 }", "-7", True),
        (r"\boxed{+7}", "7", True),
        (r"\boxed{-0}", "0", True),
        (r"\boxed{7.0}", "7", False),
        (r"\boxed{2+5}", "7", False),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{" + "9" * 5000 + "}", "9" * 5000, True),
        (r"\boxed{1 2}", "12", False),
        (r"\boxed{1  2}", "12", False),
        ("\\boxed{ 1 \n 2 , 3}", "1 2,3", True),
        (r"\boxed{7", "7", False),
        ("7", "7", False),
        ("", "7", False),
    ],
)
def test_grade(response, gold, right):
    assert grade(response, gold) is right


def test_the_last_closed_box_counts():
    assert boxed(r"\boxed{1} \boxed{2") == "1"
    assert boxed("no box") is None
    assert boxed(r"\boxed{1 \boxed{2}") == "2"
    assert boxed(r"\boxed{1 \boxed{2} 3}") == "2"
    assert boxed(r"} \boxed{{1} 2} }") == "{1} 2"


def lines_run(act, most):
    """How many lines of Python ``act`` runs; it is stopped after ``most``."""
    count, before = 0, sys.gettrace()

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        assert count <= most
        return trace

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "piece", [r"\boxed{", r"\boxed{1", "{", "}", r"\boxed{}", r"\boxed{1} ", r"\boxed{{}", " ", r"\boxed{ 1"]
)
def test_a_response_that_loops_is_read_once(piece):
    """As it is, and as the answer of a box around it."""
    looping = piece * (100_000 // len(piece))
    for response in (looping, rf"\boxed{{{looping}}}"):
        lines_run(lambda: grade(response, "1"), 10 * len(response))  # noqa: B023
