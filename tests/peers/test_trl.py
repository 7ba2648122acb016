"""Against trl's divergences: generalised JSD over the vocabulary, reverse KL on a support."""

import jax
import numpy as np
import pytest

from opd_jax.method import (
    full_kl_loss,
    jsd_loss,
    student_topk_loss,
    topk_forward_kl,
    topk_loss,
    topk_tail_loss,
    topk_unrenormalised_loss,
)
from tests.peers import batch
from tests.peers.batch import GATES, IDS, MASK, assert_same, ours, theirs, theirs_reduced

WHY = "the oracles need torch and trl: pip install -e '.[oracle]'"
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("trl", reason=WHY)
pytestmark = pytest.mark.oracle

from trl.experimental.async_distillation.async_distillation_trainer import _jsd_loss_chunk
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer
from trl.experimental.iw_opd.iw_opd_trainer import _jsd_divergence
from trl.experimental.sdft import loss_utils
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.distillation_trainer import _chunked_divergence_loss
from trl.trainer.utils import selective_log_softmax

every_gate = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
TEACHER = torch.tensor(batch.TEACHER)
HEAD = torch.eye(batch.V)  # a vocabulary head that makes hidden states the logits
LABELS = torch.tensor(np.where(MASK, IDS, -100))
# As in ours, beta is the teacher's share of the mixture: KL(teacher || student) at 0, the reverse at 1.
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def unreduced(trainer):
    """A trainer's loss by token; ``none`` leaves the vocabulary axis too."""
    return lambda z, beta: trainer.generalized_jsd_loss(z, TEACHER, beta=beta, reduction="none").sum(-1)


PER_TOKEN = {
    "gkd": unreduced(GKDTrainer),
    "gold": unreduced(GOLDTrainer),
    "iw_opd": unreduced(IWOPDTrainer),
    "sdft": lambda z, beta: loss_utils.compute_full_logit_self_distillation_loss(
        z, TEACHER, distillation_alpha=beta
    ),
    # hidden states and heads in, and a backward pass of its own
    "chunked": lambda z, beta: ChunkedDivergenceFunction.apply(
        z.reshape(-1, batch.V), HEAD, None, TEACHER.reshape(-1, batch.V), HEAD, None, beta
    )[0].reshape(IDS.shape),
}


@every_gate
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("peer", PER_TOKEN)
def test_divergences_over_the_vocabulary(peer, beta, gate):
    want = theirs(lambda z: PER_TOKEN[peer](z, beta), gate)
    assert_same(ours(lambda z: jsd_loss(z, batch.TEACHER, beta=beta, mask=MASK), gate), want)
    if beta in (0, 1):
        direction = "reverse" if beta else "forward"
        got = ours(lambda z: full_kl_loss(z, batch.TEACHER, direction=direction, mask=MASK), gate)
        assert_same(got, want)


# Their own mask, their own division. "batchmean" divides by the number of labelled tokens; a temperature
# divides both sides' logits and brings no factor T^2.
REDUCED = {
    "gkd": lambda z, beta, t: GKDTrainer.generalized_jsd_loss(z, TEACHER, LABELS, beta, t),
    "gold": lambda z, beta, t: GOLDTrainer.generalized_jsd_loss(z, TEACHER, LABELS, beta, t),
    "iw_opd": lambda z, beta, t: IWOPDTrainer.generalized_jsd_loss(z, TEACHER, LABELS, beta, t),
    "chunked": lambda z, beta, t: _chunked_divergence_loss(
        z, TEACHER, HEAD, HEAD, torch.tensor(MASK), beta, temperature=t
    )[0],
}


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("peer", REDUCED)
def test_divergences_as_they_mask_and_reduce(peer, beta):
    t = 0.7
    want = theirs_reduced(lambda z: REDUCED[peer](z, beta, t))
    assert_same(ours(lambda z: jsd_loss(z / t, batch.TEACHER / t, beta=beta, mask=MASK)), want)


def by_token(z, tail):
    """Their asynchronous distillation, on the teacher's top K; it adds up its rows, so one row at a time."""
    ids = torch.tensor(batch.TEACHER_IDS).reshape(-1, 1, batch.K)
    logps = selective_log_softmax(TEACHER.reshape(-1, 1, batch.V), ids)
    every = torch.ones(1, batch.K, dtype=torch.bool)
    losses = [
        # unscaled, uncapped head; reverse KL; temperature one; no index of teachers
        _jsd_loss_chunk(row, HEAD, None, 1.0, None, i, q, every, 1.0, 1.0, tail, None, 1)[0]
        for row, i, q in zip(z.reshape(-1, 1, batch.V), ids, logps, strict=True)
    ]
    return torch.stack(losses).reshape(IDS.shape)


@every_gate
@pytest.mark.parametrize("tail", [False, True], ids=["renormalised", "tail"])
def test_teacher_topk(tail, gate):
    loss = topk_tail_loss if tail else topk_loss
    got = ours(lambda z: loss(*batch.on_support(z, batch.TEACHER_IDS), mask=MASK), gate)
    assert_same(got, theirs(lambda z: by_token(z, tail), gate))


@every_gate
@pytest.mark.parametrize("tail", [False, True], ids=["renormalised", "tail"])
@pytest.mark.parametrize("peer", ["sdft", "iw_opd"])
def test_topk_losses_on_the_students_support(peer, tail, gate):
    """The same losses, on the support that the student chooses, as these peers do."""

    def peers(z):
        if peer == "sdft":
            return loss_utils.compute_topk_self_distillation_loss(
                z, TEACHER, distillation_topk=batch.K, distillation_alpha=1.0, distillation_add_tail=tail
            )
        return IWOPDTrainer.generalized_jsd_loss(
            z, TEACHER, beta=1, reduction="none", top_k=batch.K, add_tail=tail
        ).sum(-1)

    want = theirs(peers, gate)
    loss = topk_tail_loss if tail else topk_loss
    assert_same(ours(lambda z: loss(*batch.on_support(z, batch.STUDENT_IDS), mask=MASK), gate), want)
    if not tail:
        # With the ratio of renormalised probabilities: at rho = 1 its gradient is the reverse KL's.
        def surrogate(z):
            cur, tea = (jax.nn.log_softmax(x, axis=-1) for x in batch.on_support(z, batch.STUDENT_IDS))
            return student_topk_loss(cur, jax.lax.stop_gradient(cur), tea, mask=MASK)

        assert_same(ours(surrogate, gate), want)


@every_gate
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_raw_probabilities_on_a_support(direction, gate):
    """Their divergence takes any log-probs, so also ones that do not add up to one."""
    ids = torch.tensor(batch.TEACHER_IDS)
    every = torch.ones_like(ids, dtype=torch.bool)

    def peers(z):
        p, q = selective_log_softmax(z, ids), selective_log_softmax(TEACHER, ids)
        return _jsd_divergence(p, q, int(direction == "reverse"), support_mask=every).sum(-1)

    loss = topk_unrenormalised_loss if direction == "reverse" else topk_forward_kl
    assert_same(ours(lambda z: loss(*batch.on_support(z, batch.TEACHER_IDS)), gate), theirs(peers, gate))
