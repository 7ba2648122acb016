"""Divergences over a vocabulary: loops, literal numbers, limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from opd_jax.method import full_kl_loss, jsd_loss
from tests.method.batches import SHAPE, V, close, fewer, fields, floats, typical
from tests.method.checks import agree, reads_nothing_behind_the_mask, with_slopes
from tests.oracle import divergences as oracle

logits = floats(-5, 5, (*SHAPE, V)) | typical(-5, 5, (*SHAPE, V))
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@fewer
@given(logits, logits)
def test_kl_is_the_formula(direction, student, teacher):
    agree(
        full_kl_loss, lambda x: oracle.full_kl(x, teacher, direction), student, teacher, direction=direction
    )


@pytest.mark.parametrize("beta", BETAS)
@fewer
@given(logits, logits)
def test_jsd_is_the_formula(beta, student, teacher):
    agree(jsd_loss, lambda x: oracle.jsd(x, teacher, beta), student, teacher, beta=beta)


def test_the_reverse_gradient_is_the_printed_one():
    batch = fields(1)
    loss, slope = with_slopes(full_kl_loss)(batch["student_logits"], batch["teacher_logits"])
    p, q = (jax.nn.log_softmax(batch[f"{side}_logits"]) for side in ("student", "teacher"))
    close(slope, jnp.exp(p) * (p - q - loss[..., None]))


def test_jsd_by_hand():
    p, q = jnp.log(jnp.array([[[0.5, 0.5]]])), jnp.log(jnp.array([[[0.25, 0.75]]]))
    # M = .2 q + .8 p = (.45, .55)
    want = 0.2 * (0.25 * np.log(0.25 / 0.45) + 0.75 * np.log(0.75 / 0.55))
    want += 0.8 * (0.5 * np.log(0.5 / 0.45) + 0.5 * np.log(0.5 / 0.55))
    np.testing.assert_allclose(jsd_loss(p, q, beta=0.2), [[want]], rtol=1e-5)


def test_an_id_that_one_side_excludes_stays_in_the_mixture():
    p, q = jnp.array([[[0.0, -jnp.inf]]]), jnp.log(jnp.array([[[0.5, 0.5]]]))
    # M = (.75, .25)
    want = 0.5 * np.log(1 / 0.75) + 0.5 * (0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25))
    for student, teacher in ((p, q), (q, p)):
        loss, slope = with_slopes(jsd_loss)(student, teacher)
        np.testing.assert_allclose(loss, [[want]], rtol=1e-5)
        assert np.isfinite(slope).all()


def test_limits_and_symmetries_of_the_jsd():
    p, q = fields(2)["student_logits"], fields(2)["teacher_logits"]
    np.testing.assert_array_equal(jsd_loss(p, q, beta=0.0), full_kl_loss(p, q, direction="forward"))
    np.testing.assert_array_equal(jsd_loss(p, q, beta=1.0), full_kl_loss(p, q, direction="reverse"))
    close(jsd_loss(p, q, beta=0.3), jsd_loss(q, p, beta=0.7))
    close(full_kl_loss(p, q), full_kl_loss(q, p, direction="forward"))
    # Over its weight the divergence tends to the two KLs.
    close(jsd_loss(p, q, beta=1e-3) / 1e-3, full_kl_loss(p, q, direction="forward"), rtol=0.05, atol=1e-3)
    for beta in BETAS:
        loss, slope = with_slopes(jsd_loss, beta=beta)(p, p)
        close(loss, 0 * loss)
        close(slope, 0 * slope)
        assert (jsd_loss(p, q, beta=beta) > 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_ids_that_both_models_exclude_change_nothing(beta):
    p, q = fields(3)["student_logits"], fields(3)["teacher_logits"]
    never = jnp.full((*SHAPE, 2), -jnp.inf)  # the unused rows of a padded vocabulary
    for loss in (lambda p, q: jsd_loss(p, q, beta=beta), full_kl_loss):
        value, slope = with_slopes(loss)(p, q)
        padded = with_slopes(loss)(*(jnp.concatenate([x, never], axis=-1) for x in (p, q)))
        close(padded[0], value)
        close(padded[1], jnp.concatenate([slope, jnp.zeros((*SHAPE, 2))], axis=-1))


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        *((full_kl_loss, {"direction": direction}) for direction in ("reverse", "forward")),
        *((jsd_loss, {"beta": beta}) for beta in BETAS),
    ],
)
def test_nothing_behind_the_mask_is_read_and_the_teacher_is_detached(loss, options):
    reads_nothing_behind_the_mask(loss, **options)
    p, q = fields(4)["student_logits"], fields(4)["teacher_logits"]
    np.testing.assert_array_equal(with_slopes(loss, argnums=1, **options)(p, q)[1], 0 * q)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_under_jit_without_and_under_pmap(self):
        p, q = fields(5)["student_logits"], fields(5)["teacher_logits"]
        got = self.variant(lambda p, q: jsd_loss(p, q, beta=0.3))(p, q)
        chex.assert_shape(got, SHAPE)
        close(got, oracle.jsd(p, q, 0.3))


def test_nonsense_is_refused():
    x = jnp.zeros((1, 1, 2))
    with pytest.raises(ValueError, match="direction must be reverse or forward"):
        full_kl_loss(x, x, direction="backward")
    for beta in (-0.1, 1.1):
        with pytest.raises(ValueError, match="beta must lie in"):
            jsd_loss(x, x, beta=beta)
