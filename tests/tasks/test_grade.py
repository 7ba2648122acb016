"""Grading: exact on integers, literal otherwise, never by evaluation."""

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
