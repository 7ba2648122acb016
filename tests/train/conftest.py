"""One uninterrupted tiny run, shared by the tests that compare with it."""

import pytest

from opd_jax.interrupt import never
from opd_jax.train.loop import distill
from opd_jax.train.opening import open_run
from opd_jax.train.run import Run
from tests.conftest import tiny_config

WHOLE = ("--log.diagnose_every=3",)  # the settings of the run that others are compared with


def ignore(line: dict) -> None:
    """Receive metrics and do nothing."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Run:
    run = open_run(tmp_path_factory.mktemp("runs") / "whole", tiny_config(*WHOLE))
    distill(run, ignore, never)
    return run
