"""Against torch's own kl_div and cross_entropy, on which the other peers are built."""

import pytest

from opd_jax.method import cross_entropy, full_kl_loss, topk_generalised_loss, topk_loss
from tests.peers import batch
from tests.peers.batch import GATES, IDS, MASK, assert_same, ours, theirs, theirs_reduced

torch = pytest.importorskip("torch", reason="the oracles need torch: pip install -e '.[oracle]'")
pytestmark = pytest.mark.oracle

every_gate = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
TEACHER = torch.tensor(batch.TEACHER)


def kl(log_a, log_b):
    """KL(a || b): kl_div takes what is measured against first, and leaves the vocabulary axis."""
    return torch.nn.functional.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


@every_gate
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_full_kl(direction, gate):
    def peers(z):
        p, q = z.log_softmax(-1), TEACHER.log_softmax(-1)
        return kl(p, q) if direction == "reverse" else kl(q, p)

    got = ours(lambda z: full_kl_loss(z, batch.TEACHER, direction=direction, mask=MASK), gate)
    assert_same(got, theirs(peers, gate))


def test_batchmean_is_the_token_mean_of_tokens_in_a_row():
    """It divides by the first axis alone: over ``[B, T, V]`` it would be T times as large."""
    valid = torch.tensor(MASK)

    def peers(z):
        p, q = z.log_softmax(-1)[valid], TEACHER.log_softmax(-1)[valid]
        return torch.nn.functional.kl_div(p, q, reduction="batchmean", log_target=True)

    got = ours(lambda z: full_kl_loss(z, batch.TEACHER, direction="forward", mask=MASK))
    assert_same(got, theirs_reduced(peers))


@every_gate
def test_topk(gate):
    ids = torch.tensor(batch.TEACHER_IDS)
    want = theirs(
        lambda z: kl(z.gather(-1, ids).log_softmax(-1), TEACHER.gather(-1, ids).log_softmax(-1)), gate
    )
    got = ours(
        lambda z: topk_loss(
            batch.pick(z, batch.TEACHER_IDS), batch.pick(batch.TEACHER, batch.TEACHER_IDS), mask=MASK
        ),
        gate,
    )
    assert_same(got, want)


@every_gate
def test_topk_generalised(gate):
    ids = torch.tensor(batch.TEACHER_IDS)

    def peers(z):
        p, q = z.log_softmax(-1).gather(-1, ids), TEACHER.log_softmax(-1).gather(-1, ids)
        return kl(p, q) - p.exp().sum(-1) + q.exp().sum(-1)

    got = ours(lambda z: topk_generalised_loss(*batch.on_support(z, batch.TEACHER_IDS), mask=MASK), gate)
    assert_same(got, theirs(peers, gate))


@every_gate
def test_cross_entropy(gate):
    ids = torch.tensor(IDS)
    want = theirs(lambda z: torch.nn.functional.cross_entropy(z.transpose(1, 2), ids, reduction="none"), gate)
    assert_same(ours(lambda z: cross_entropy(batch.cur_of(z), mask=MASK), gate), want)
