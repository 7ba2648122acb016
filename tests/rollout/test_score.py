"""How far two readings of the same tokens lie from each other."""

import numpy as np
import pytest

from opd_jax.rollout import Rollout, Score
from opd_jax.rollout.score import attach, mismatch, null_drift


def scored(behaviour, old, again=None):
    """A rollout with these log-probs."""
    behaviour, old = np.asarray(behaviour, np.float32), np.asarray(old, np.float32)
    again = None if again is None else np.asarray(again, np.float32)
    ids = np.arange(1, 1 + len(old), dtype=np.int32)
    k = np.zeros((len(old), 1))
    score = Score(old, old, k.astype(np.int32), k, k[:, 0], again_logprobs=again)
    return Rollout(0, "p", 0, ids[:1], ids, behaviour, False, 1.0, score)


def test_distances_by_hand():
    # Differences 0, 1/2, 0 and -1 over two rollouts; about their means the readings are (6, 2, -2, -6)/8 and
    # (5, -3, -3, 1)/8: products sum to 24/64, squares to 80/64 and 44/64.
    told = mismatch([scored([-1, -1.5], [-1, -2]), scored([-2, -2.5], [-2, -1.5])])
    assert told == {
        "mean": 0.375,
        "p99": pytest.approx(0.985),  # 0.97 of the way from 1/2 to 1
        "max": 1.0,
        "pearson": pytest.approx(24 / (80 * 44) ** 0.5),
    }


def test_the_trainer_against_itself():
    assert null_drift([scored([-1, -2], [-1, -2])]) is None
    told = null_drift([scored([-9, -9], [-1, -2], again=[-1, -2]), scored([-9], [-4])])
    assert told == {"mean": 0.0, "p99": 0.0, "max": 0.0, "pearson": pytest.approx(1.0)}


def test_readings_that_do_not_vary_have_no_correlation():
    assert mismatch([scored([-1, -1], [-1, -2])])["pearson"] is None
    assert mismatch([scored([-1], [-2])])["pearson"] is None


def test_mass_that_is_left_out_is_never_below_zero():
    """Rounded log-probs may come to a little more than 1."""
    told = {"teacher_topk_logprobs": np.array([[0, -20], [np.log(0.75), -20], [-30, -31]], np.float32)}
    told["teacher_topk_ids"] = np.zeros((3, 2), np.int32)
    told["old_logprobs"] = told["teacher_logprobs"] = told["teacher_topk_logprobs"][:, 0]
    [rollout] = attach([scored([-1, -1, -1], [-1, -1, -1])], [told])
    np.testing.assert_allclose(rollout.score.teacher_outside_mass, [0, 0.25, 1], atol=1e-7)
    assert (rollout.score.teacher_outside_mass >= 0).all()
