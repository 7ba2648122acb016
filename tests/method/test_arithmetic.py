"""The two rules of arithmetic: what is divided by nothing is 0, and nothing is added up in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.method.arithmetic import quotient, wide


@pytest.mark.parametrize("kind", [jnp.float32, jnp.int32])
def test_a_quotient_is_zero_where_there_is_nothing_to_divide_by(kind):
    total, count = jnp.array([6.0, 3.0, 5.0, 0.0, -2.0]), jnp.array([4, 1, 0, 0, 2]).astype(kind)
    with jax.debug_nans(True), jax.debug_infs(True):  # no step of it is infinite either
        np.testing.assert_array_equal(quotient(total, count), [1.5, 3, 0, 0, -1])
    np.testing.assert_array_equal(quotient(total, jnp.array([0.5, 0.25, -1.0, 0.0, 1.0])), [12, 12, 0, 0, -2])
    np.testing.assert_array_equal(quotient(jnp.array([jnp.nan, jnp.inf]), jnp.zeros(2)), 0)


def test_a_quotient_has_a_finite_slope_everywhere():
    total, count = jnp.array([6.0, 0.0, 5.0]), jnp.array([4.0, 0.0, 0.0])
    slopes = jax.grad(lambda *x: jnp.sum(quotient(*x)), (0, 1))(total, count)
    np.testing.assert_allclose(slopes[0], [0.25, 0, 0])
    np.testing.assert_allclose(slopes[1], [-6 / 16, 0, 0])


def test_wide_is_float32_at_least():
    for kind in (bool, jnp.int32, jnp.bfloat16, jnp.float16, jnp.float32):
        assert wide(jnp.ones(3, kind)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert wide(jnp.ones(3, jnp.float64)).dtype == jnp.float64
