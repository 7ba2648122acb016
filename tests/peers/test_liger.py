"""Against liger-kernel's chunked losses, which are plain torch; its Triton kernels need a GPU."""

from functools import partial

import numpy as np
import pytest

from opd_jax.method import (
    cross_entropy,
    full_kl_loss,
    jsd_loss,
    reference_kl,
    sampled_token_loss,
    surrogate_loss,
    token_is,
)
from tests.peers import batch
from tests.peers.batch import GATES, IDS, MASK, UNGATED, Gate, assert_same, ours, theirs, theirs_reduced

WHY = "the oracles need torch and liger-kernel: pip install -e '.[oracle]'"
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("liger_kernel", reason=WHY)
pytestmark = pytest.mark.oracle

from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss
from liger_kernel.chunked_loss.grpo_loss import k3_loss_fn

every_gate = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
TEACHER, OLD, TEA = (torch.tensor(x) for x in (batch.TEACHER, batch.OLD, batch.TEA))
HEAD = torch.eye(batch.V)  # a vocabulary head that makes hidden states the logits
TOKENS = (batch.B * batch.T, batch.V)


def jsd(z, labels, **options):
    """Their loss of ``[N, V]`` hidden states, soft (to the teacher's logits) unless said."""
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, **options}
    loss = LigerFusedLinearJSDLoss(compiled=False, **options)
    return loss(z, HEAD, TEACHER.reshape(TOKENS), HEAD, labels)


def by_token(z, **options):
    """They divide by the number of labelled tokens, so one label at a time gives each token's own loss."""
    one = torch.full((IDS.size, IDS.size), -100).diagonal_scatter(torch.tensor(IDS).ravel())
    return torch.stack([jsd(z.reshape(TOKENS), labels, **options) for labels in one]).reshape(IDS.shape)


# As in ours, beta is the teacher's share of the mixture: KL(teacher || student) at 0, the reverse at 1.
@every_gate
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jsd(beta, gate):
    want = theirs(lambda z: by_token(z, beta=beta), gate)
    assert_same(ours(lambda z: jsd_loss(z, batch.TEACHER, beta=beta, mask=MASK), gate), want)
    if beta in (0, 1):
        direction = "reverse" if beta else "forward"
        got = ours(lambda z: full_kl_loss(z, batch.TEACHER, direction=direction, mask=MASK), gate)
        assert_same(got, want)


@pytest.mark.parametrize("chunk", [8, 1024])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_as_they_mask_and_reduce(beta, chunk):
    """A temperature divides both sides' logits and brings no factor T^2."""
    t, labels = 0.7, torch.tensor(np.where(MASK, IDS, -100)).ravel()
    want = theirs_reduced(
        lambda z: jsd(z.reshape(TOKENS), labels, beta=beta, temperature=t, chunk_size=chunk)
    )
    assert_same(ours(lambda z: jsd_loss(z / t, batch.TEACHER / t, beta=beta, mask=MASK)), want)


@every_gate
def test_cross_entropy_is_their_hard_loss(gate):
    want = theirs(lambda z: by_token(z, weight_hard_loss=1.0, weight_soft_loss=0.0), gate)
    assert_same(ours(lambda z: cross_entropy(batch.cur_of(z), mask=MASK), gate), want)


def grpo(z, advantages, w, *, ref=None, **options):
    """Their policy loss of ``[N, L, V]`` hidden states.

    A sampler's ratio to the trainer is the one place where they multiply a token's loss by a given weight.
    """
    rows, length = advantages.shape[0], z.numel() // batch.V // advantages.shape[0]
    shape = (rows, length)
    loss = LigerFusedLinearGRPOLoss(compiled=False, use_ref_model=ref is not None, **{"beta": 0.0, **options})
    return loss(
        z.reshape(*shape, batch.V),
        HEAD,
        torch.tensor(IDS).reshape(shape),
        torch.tensor(MASK).float().reshape(shape),
        advantages,
        ref_per_token_logps=None if ref is None else ref.reshape(shape),
        old_per_token_logps=OLD.reshape(shape),
        vllm_is_ratio=w.reshape(shape),
    )[0]


def weights(gate):
    return torch.tensor(batch.gate_weights(gate), dtype=torch.float32)


def by_token_grpo(gate, loss_type="bnpo", ref=None, **options):
    """Their advantage belongs to a sequence: here every token is one, and all count alike."""
    a = (TEA - OLD).ravel()
    return theirs_reduced(lambda z: grpo(z, a, weights(gate), loss_type=loss_type, ref=ref, **options))


def sampled(z, **options):
    return sampled_token_loss(batch.cur_of(z), batch.OLD, batch.TEA, mask=MASK, **options)


token_gates = pytest.mark.parametrize("gate", [UNGATED, Gate(True)], ids=["ungated", "blocks"])


@token_gates
@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
@pytest.mark.parametrize("bounds", [(0.2, 0.2, 3.0), (0.2, 0.28, 2.0)], ids=["even", "higher"])
def test_sampled_token_ppo_is_grpo(bounds, loss_type, gate):
    """Their delta bounds the unclipped ratio whatever the sign; above 1 + high only A < 0 can tell."""
    low, high, delta = bounds
    want = by_token_grpo(gate, loss_type, epsilon_low=low, epsilon_high=high, delta=delta)
    assert_same(ours(lambda z: sampled(z, clip_low=low, clip_high=high, dual_clip=delta), gate), want)


@token_gates
def test_sampled_token_is_is_grpo_without_a_clip(gate):
    want = by_token_grpo(gate, epsilon_low=1.0, epsilon_high=1e9)
    assert_same(ours(lambda z: sampled(z, surrogate="is"), gate), want)


@every_gate
def test_the_surrogate_of_an_advantage_by_sequence(gate):
    a = np.array([-2.0, 1.5, -0.5, 0.8], np.float32)
    loss_type = {"token_mean": "bnpo", "seq_mean_token_mean": "grpo"}[gate.reduction]
    options = {"loss_type": loss_type, "delta": 3.0}
    want = theirs_reduced(lambda z: grpo(z, torch.tensor(a), weights(gate), **options))
    assert_same(ours(lambda z: surrogate_loss(batch.cur_of(z), batch.OLD, a[:, None]), gate), want)


@token_gates
def test_token_is_times_reinforce_is_cispo(gate):
    """They bound the ratio from above only, at epsilon_high itself and not at one more."""

    def ratio(z):
        return token_is(batch.cur_of(z), batch.OLD, MASK, high=1.5)

    weights = (ratio, batch.our_gate) if gate.on else (ratio,)
    got = batch.weighted(partial(sampled, surrogate="reinforce"), *weights)
    assert_same(got, by_token_grpo(gate, "cispo", epsilon_high=1.5))


def test_reference_kl_is_the_kl_term_of_grpo():
    """Added after their weight, so ungated here."""
    want = by_token_grpo(UNGATED, ref=TEA, delta=3.0, beta=0.5)
    assert_same(ours(lambda z: sampled(z) + 0.5 * reference_kl(batch.cur_of(z), batch.TEA)), want)


@every_gate
def test_reference_kl_is_k3(gate):
    """Reference first."""
    ids = torch.tensor(IDS)[..., None]
    want = theirs(lambda z: k3_loss_fn(TEA, z.log_softmax(-1).gather(-1, ids)[..., 0]), gate)
    assert_same(ours(lambda z: reference_kl(batch.cur_of(z), batch.TEA), gate), want)
