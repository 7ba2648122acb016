"""No parameter, activation or optimizer slot moves on a pod without somebody having said so."""

import json

import pytest

from tests.golden.shardings import CASES, FOLDER, describe


@pytest.mark.parametrize("name", CASES)
def test_shardings_are_the_golden_ones(name):
    assert describe(CASES[name]) == json.loads((FOLDER / f"{name}.json").read_text()), (
        "a sharding changed; if that was meant, write the files anew: python -m tests.golden.shardings"
    )
