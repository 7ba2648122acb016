"""Drift-gated on-policy distillation, arrays in and arrays out. Read `objective` first."""

from opd_jax.method.diagnostics import (
    DRIFT_EDGES,
    WEIGHT_EDGES,
    drift_diagnostics,
    effective_token_ratio,
    histogram,
    masked_sum,
)
from opd_jax.method.gates import STATISTICS, drift, drift_gate, gate, normalise, segment_score
from opd_jax.method.losses import cross_entropy, importance_ratio, sampled_token_loss, topk_loss
from opd_jax.method.objective import Objective, objective, sequence_mean, token_mean
from opd_jax.method.segments import (
    every_token,
    fixed_blocks,
    newline_spans,
    segment_largest,
    segment_total,
    whole_sequence,
)

__all__ = [
    "DRIFT_EDGES",
    "STATISTICS",
    "WEIGHT_EDGES",
    "Objective",
    "cross_entropy",
    "drift",
    "drift_diagnostics",
    "drift_gate",
    "effective_token_ratio",
    "every_token",
    "fixed_blocks",
    "gate",
    "histogram",
    "importance_ratio",
    "masked_sum",
    "newline_spans",
    "normalise",
    "objective",
    "sampled_token_loss",
    "segment_largest",
    "segment_score",
    "segment_total",
    "sequence_mean",
    "token_mean",
    "topk_loss",
    "whole_sequence",
]
