"""For the tests and for the examples in docstrings alike."""

from collections.abc import Iterator

import numpy as np
import pytest


@pytest.fixture(autouse=True, scope="session")
def short_numbers() -> Iterator[None]:
    """Arrays print four digits, so that an example shows the number and not its rounding."""
    with np.printoptions(precision=4, suppress=True):
        yield
