"""What the peers are asked about reaches every branch: an oracle that is never asked agrees with anything."""

import numpy as np
import pytest

from opd_jax.method import cross_entropy
from tests.peers import batch
from tests.peers.batch import GATES, MASK, ours

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("x", [batch.OLD, batch.CUR], ids=["frozen", "recomputed"])
def test_every_branch_of_the_clip(x):
    rho, a = np.exp(batch.CUR - batch.OLD)[MASK], (batch.TEA - x)[MASK]
    inside = (rho > 0.8) & (rho < 1.2)
    above, below, far = rho > 1.28, rho < 0.8, rho > 3.0
    for branch in inside & (a > 0), above & (a > 0), below & (a > 0), above & ~far & (a < 0), below & (a < 0):
        assert branch.any()
    assert (far & (a < 0)).any()  # the dual clip


@pytest.mark.parametrize("name", ["blocks", "blocks by sequence"])
def test_the_gate_weighs_tokens_apart(name):
    w = batch.gate_weights(batch.GATES[name])[MASK]
    assert w.min() < 0.7
    assert w.max() > 1.3


def test_the_two_supports_differ():
    assert (np.sort(batch.TEACHER_IDS) != np.sort(batch.STUDENT_IDS)).any(-1).mean() > 0.5


def test_a_gate_moves_the_gradient():
    """The comparisons would miss a gate that both sides lack."""
    gradients = [
        ours(lambda z: cross_entropy(batch.cur_of(z), mask=MASK), gate).gradient for gate in GATES.values()
    ]
    for gated in gradients[1:]:
        assert np.abs(gated - gradients[0]).max() > 0.1 * np.abs(gradients[0]).max()
