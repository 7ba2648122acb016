"""Drift-gated on-policy distillation, arrays in and arrays out. Read `objective` first.

segments      which tokens share a gate          losses, divergences   what a token costs
gates         drift, gate, mean-one weights      mixed_losses          losses that add or switch terms
bounds        clipped, mixed, always acting      weights, sequence_weights   the wider family of weights
controls      what a gate must beat              family                one interface to all of them
objective     the paper on one page              diagnostics, structure    what is logged
accumulate    the same over micro-batches        scope                 over which tokens a mean runs
"""

from opd_jax.method.accumulate import Share, divisor, merge, rescale, share
from opd_jax.method.bounds import clip_weights, residual, tau_for_ratio
from opd_jax.method.controls import constant, disagreement, inverse, position_mean, random, shuffled
from opd_jax.method.diagnostics import (
    DRIFT_EDGES,
    SCORE_EDGES,
    WEIGHT_EDGES,
    drift_diagnostics,
    effective_token_ratio,
    histogram,
    masked_sum,
    percentiles,
    readings,
    support_mass,
    topk_overlap,
)
from opd_jax.method.divergences import full_kl_loss, jsd_loss
from opd_jax.method.family import WEIGHTS, call, combine, needs
from opd_jax.method.gates import (
    MAPS,
    STATISTICS,
    drift,
    drift_gate,
    gate,
    masked,
    normalise,
    relative_gate,
    segment_score,
)
from opd_jax.method.losses import (
    cross_entropy,
    importance_ratio,
    sampled_token_loss,
    student_topk_loss,
    surrogate_loss,
    topk_generalised_loss,
    topk_loss,
    topk_tail_loss,
    topk_unrenormalised_loss,
)
from opd_jax.method.mixed_losses import (
    entropy_aware_loss,
    reference_kl,
    scope_loss,
    sign_gated_advantage,
    sign_gated_loss,
    stable_loss,
    topk_forward_kl,
    trust_region_loss,
)
from opd_jax.method.objective import (
    Objective,
    drift_weights,
    objective,
    token_mean,
    token_share,
    weighted_loss,
)
from opd_jax.method.scope import masked_quantile, scope_count, scope_least, scope_total
from opd_jax.method.segments import (
    cusum_spans,
    every_token,
    first_response,
    fixed_blocks,
    newline_spans,
    segment_largest,
    segment_total,
    special_tokens_out,
    whole_sequence,
)
from opd_jax.method.sequence_weights import f_opd, fire_opd, scope_opd
from opd_jax.method.structure import structure_readings, structure_sums
from opd_jax.method.weights import iw_opd, popd, prune, sg_opd, tip, token_is

__all__ = [
    "DRIFT_EDGES",
    "MAPS",
    "SCORE_EDGES",
    "STATISTICS",
    "WEIGHTS",
    "WEIGHT_EDGES",
    "Objective",
    "Share",
    "call",
    "clip_weights",
    "combine",
    "constant",
    "cross_entropy",
    "cusum_spans",
    "disagreement",
    "divisor",
    "drift",
    "drift_diagnostics",
    "drift_gate",
    "drift_weights",
    "effective_token_ratio",
    "entropy_aware_loss",
    "every_token",
    "f_opd",
    "fire_opd",
    "first_response",
    "fixed_blocks",
    "full_kl_loss",
    "gate",
    "histogram",
    "importance_ratio",
    "inverse",
    "iw_opd",
    "jsd_loss",
    "masked",
    "masked_quantile",
    "masked_sum",
    "merge",
    "needs",
    "newline_spans",
    "normalise",
    "objective",
    "percentiles",
    "popd",
    "position_mean",
    "prune",
    "random",
    "readings",
    "reference_kl",
    "relative_gate",
    "rescale",
    "residual",
    "sampled_token_loss",
    "scope_count",
    "scope_least",
    "scope_loss",
    "scope_opd",
    "scope_total",
    "segment_largest",
    "segment_score",
    "segment_total",
    "sg_opd",
    "share",
    "shuffled",
    "sign_gated_advantage",
    "sign_gated_loss",
    "special_tokens_out",
    "stable_loss",
    "structure_readings",
    "structure_sums",
    "student_topk_loss",
    "support_mass",
    "surrogate_loss",
    "tau_for_ratio",
    "tip",
    "token_is",
    "token_mean",
    "token_share",
    "topk_forward_kl",
    "topk_generalised_loss",
    "topk_loss",
    "topk_overlap",
    "topk_tail_loss",
    "topk_unrenormalised_loss",
    "trust_region_loss",
    "weighted_loss",
    "whole_sequence",
]
