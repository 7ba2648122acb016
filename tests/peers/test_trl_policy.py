"""Against trl's policy gradients: GRPO's surrogate and its relatives, self-distillation, IW-OPD, weights."""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.method import (
    iw_opd,
    reference_kl,
    sampled_token_loss,
    tip,
    token_is,
    topk_loss,
    topk_tail_loss,
)
from tests.peers import batch
from tests.peers.batch import GATES, IDS, MASK, UNGATED, Gate, assert_same, ours, theirs, theirs_reduced

WHY = "the oracles need torch and trl: pip install -e '.[oracle]'"
torch = pytest.importorskip("torch", reason=WHY)
trl = pytest.importorskip("trl", reason=WHY)
pytestmark = pytest.mark.oracle

from trl.experimental.iw_opd import IWOPDTrainer
from trl.experimental.sdft import SDFTTrainer, loss_utils
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

every_gate = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
TEACHER, OLD, TEA = (torch.tensor(x) for x in (batch.TEACHER, batch.OLD, batch.TEA))


def sampled(z, **options):
    return sampled_token_loss(batch.cur_of(z), batch.OLD, batch.TEA, mask=MASK, **options)


def ratio(z):
    return token_is(batch.cur_of(z), batch.OLD, MASK, high=1.5)


@every_gate
def test_sampled_token_reinforce(gate):
    """Their advantage is the recomputed one, sg(cur) - tea with the sign of a loss."""
    want = theirs(
        lambda z: loss_utils.compute_sampled_token_self_distillation_loss(
            z, TEACHER, torch.tensor(IDS), distillation_alpha=1.0
        ),
        gate,
    )
    assert_same(ours(lambda z: sampled(z, surrogate="reinforce", advantage="cur"), gate), want)


class Grpo:
    """The parts of a GRPOTrainer that its loss reads; the model is the logits."""

    aux_loss_enabled = _entropy_bonus_enabled = False
    top_entropy_quantile, off_policy_mask_threshold = 1.0, None
    importance_sampling_level = "token"
    epsilon_low, epsilon_high, beta = 0.2, 0.2, 0.0
    # A sampler's ratio to the trainer is the one place where they multiply a token's loss by a given weight.
    use_vllm = vllm_importance_sampling_correction = True
    model = SimpleNamespace(training=False)
    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, **_: x,
    )

    def __init__(self, loss_type, delta=None, **options):
        self.loss_type, self._metrics = loss_type, {"eval": defaultdict(list)}
        self.args = SimpleNamespace(delta=delta, use_bias_correction_kl=False)
        vars(self).update(options)

    def _get_per_token_logps_and_entropies(self, logits, *args, **kwargs):
        return selective_log_softmax(logits, torch.tensor(IDS)), entropy_from_logits(logits).detach(), None

    def loss(self, z, advantages, gate=UNGATED, ref=None):
        inputs = {
            "prompt_ids": torch.zeros(batch.B, 0, dtype=torch.long),
            "prompt_mask": torch.zeros(batch.B, 0),
            "completion_ids": torch.tensor(IDS),
            "completion_mask": torch.tensor(MASK).float(),
            "advantages": advantages,
            "old_per_token_logps": OLD,
            "ref_per_token_logps": ref,
            "importance_sampling_ratio": torch.tensor(batch.gate_weights(gate), dtype=torch.float32),
            "num_items_in_batch": torch.tensor(MASK).sum(),
        }
        return trl.GRPOTrainer._compute_loss(self, z, inputs)


# Of their reductions these two are ours: all tokens alike, or sequences alike.
LOSS_TYPE = {"token_mean": "bnpo", "seq_mean_token_mean": "grpo"}


def advantages(z, advantage):
    return TEA - (OLD if advantage == "old" else selective_log_softmax(z, torch.tensor(IDS)).detach())


@every_gate
@pytest.mark.parametrize("advantage", ["old", "cur"])
@pytest.mark.parametrize("bounds", [(0.2, 0.2, 3.0), (0.2, 0.28, 2.0)], ids=["even", "higher"])
def test_sampled_token_ppo_is_grpo(bounds, advantage, gate):
    """Their delta bounds the unclipped ratio whatever the sign; above 1 + high only A < 0 can tell."""
    low, high, delta = bounds
    peer = Grpo(LOSS_TYPE[gate.reduction], delta, epsilon_low=low, epsilon_high=high)
    want = theirs_reduced(lambda z: peer.loss(z, advantages(z, advantage), gate))
    options = {"advantage": advantage, "clip_low": low, "clip_high": high, "dual_clip": delta}
    assert_same(ours(lambda z: sampled(z, **options), gate), want)


@every_gate
@pytest.mark.parametrize("advantage", ["old", "cur"])
def test_sampled_token_is_is_grpo_without_a_clip(advantage, gate):
    peer = Grpo(LOSS_TYPE[gate.reduction], epsilon_low=1.0, epsilon_high=1e9)
    want = theirs_reduced(lambda z: peer.loss(z, advantages(z, advantage), gate))
    assert_same(ours(lambda z: sampled(z, surrogate="is", advantage=advantage), gate), want)


@pytest.mark.parametrize("gate", [UNGATED, Gate(True)], ids=["ungated", "blocks"])
def test_token_is_times_reinforce_is_cispo(gate):
    """They bound the ratio from above only, at epsilon_high itself and not at one more."""
    peer = Grpo("cispo", epsilon_high=1.5)
    want = theirs_reduced(lambda z: peer.loss(z, advantages(z, "old"), gate))
    base = partial(sampled, surrogate="reinforce")
    weights = (ratio, batch.our_gate) if gate.on else (ratio,)
    assert_same(batch.weighted(base, *weights), want)


@pytest.mark.parametrize("weight", [0.04, 1.0])
def test_reference_kl_is_the_kl_term_of_grpo(weight):
    """Added after their weight, so ungated here."""
    peer = Grpo("bnpo", 3.0, beta=weight)
    want = theirs_reduced(lambda z: peer.loss(z, advantages(z, "old"), ref=TEA))
    got = ours(lambda z: sampled(z) + weight * reference_kl(batch.cur_of(z), batch.TEA))
    assert_same(got, want)


@pytest.mark.parametrize("tail", [False, True], ids=["renormalised", "tail"])
def test_token_is_times_topk_is_sdft(tail):
    """The trainer's whole loss: top-k of the student, a clipped ratio, means by sequence."""
    args = SimpleNamespace(
        distillation_mode="topk_logits",
        distillation_topk=batch.K,
        distillation_alpha=1.0,
        distillation_add_tail=tail,
        distillation_is_clip=1.5,
    )
    trainer = SimpleNamespace(
        args=args, accelerator=Grpo.accelerator, _log_self_distillation_metric=lambda *_: None
    )

    def peers(z):
        logits = SimpleNamespace(
            student_logits=z,
            teacher_logits=TEACHER,
            completion_ids=torch.tensor(IDS),
            loss_mask=torch.tensor(MASK).float(),
        )
        return SDFTTrainer._compute_self_distillation_loss(
            trainer, Grpo.model, {"old_per_token_logps": OLD}, logits
        )

    loss = topk_tail_loss if tail else topk_loss
    got = batch.weighted(
        lambda z: loss(*batch.on_support(z, batch.STUDENT_IDS), mask=MASK),
        ratio,
        reduction="seq_mean_token_mean",
    )
    assert_same(got, theirs_reduced(peers))


def test_iw_opd_times_reinforce_is_iw_opd():
    """Their weight is not normalised to mean one; the share that lies before a token leaves the token out."""
    constants = {"temperature": 1.0, "iw_opd_gamma": 0.5, "iw_opd_epsilon": 1e-8}
    trainer = SimpleNamespace(model=Grpo.model, _metrics={"eval": defaultdict(list)}, **constants)
    ids, labels = torch.tensor(IDS), torch.tensor(np.where(MASK, IDS, -100))
    want = theirs_reduced(lambda z: IWOPDTrainer._compute_iw_opd_loss(trainer, z, ids, labels, TEA, OLD))
    base = partial(sampled, surrogate="reinforce")
    got = batch.weighted(base, lambda z: iw_opd(batch.OLD, batch.TEA, MASK))
    assert_same(got, want)


@pytest.mark.parametrize("keep", [0.2, 0.7])
def test_tip_by_entropy_alone_keeps_the_tokens_of_their_quantile(keep):
    entropy = entropy_from_logits(torch.tensor(batch.STUDENT))
    want = trl.GRPOTrainer.get_high_entropy_mask(Grpo("grpo"), entropy, torch.tensor(MASK), 1 - keep)
    no_kl = jnp.zeros(MASK.shape)
    got = tip(jnp.array(entropy.numpy()), no_kl, jnp.array(MASK), keep=keep, clip_quantile=1.0)
    np.testing.assert_array_equal(np.asarray(got, bool), want.numpy())
