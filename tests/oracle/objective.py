"""sum(m w base) / sum(m), and the mean over sequences of their token means."""

from __future__ import annotations

from tests.oracle.gates import mean
from tests.oracle.segments import sequences


def weighted_loss(base, w, mask, reduction="token_mean", sequence_ids=None) -> float:
    terms = [
        [float(w[b, t]) * float(base[b, t]) for t in where] for b, where in sequences(mask, sequence_ids)
    ]
    if reduction == "seq_mean_token_mean":
        return mean([mean(sequence) for sequence in terms])
    return mean([term for sequence in terms for term in sequence])
