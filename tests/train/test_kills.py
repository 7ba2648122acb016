"""Kill -9 at a hundred random moments of sampling, sealing and scoring."""

import json
import os
import sys

import pytest

from tests.conftest import TINY, said_by_a_program

KILLS = 100


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_hundred_kills_end_in_the_uninterrupted_store(tmp_path):
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "TINY": " ".join(TINY)}
    said = said_by_a_program("tests.train.killed", tmp_path, KILLS, 0, **environment)
    told = json.loads(said.splitlines()[-1])
    print(told)
    assert told["kills"] >= KILLS
    assert told["same"] == told["laps"] > 0
    assert any("sample" in where for where in told["where"])
    assert any("score" in where for where in told["where"])
