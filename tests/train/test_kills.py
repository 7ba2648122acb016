"""Kill -9 at a hundred random moments of sampling, sealing and scoring."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import TINY, as_users_have_it

KILLS = 100


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_hundred_kills_end_in_the_uninterrupted_store(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.killed", str(tmp_path), str(KILLS), "0"],
        env={**as_users_have_it(), "PYTHONPATH": os.pathsep.join(sys.path), "TINY": " ".join(TINY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert told["kills"] >= KILLS
    assert told["same"] == told["laps"] > 0
    assert any("sample" in where for where in told["where"])
    assert any("score" in where for where in told["where"])
