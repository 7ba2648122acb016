"""Rules: where things lie, what cannot be split, and that splitting changes no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from opd_jax.errors import InputError
from opd_jax.model import make_mesh, param_shardings, token_logprobs
from opd_jax.model.sharding import batch_sharding, partition
from opd_jax.rollout import make_rows


def test_the_rules_place_every_parameter(small):
    placed = param_shardings(small[0], make_mesh(2, 2, 2))
    assert placed["embed"].spec == P("tensor", "fsdp")
    assert placed["layers"]["query"].spec == P(None, "fsdp", "tensor", None)
    assert placed["layers"]["output"].spec == P(None, "tensor", None, "fsdp")
    assert placed["layers"]["down"].spec == P(None, "tensor", "fsdp")
    assert placed["norm"].spec == P(None)


def test_what_cannot_be_split_is_refused(small):
    with pytest.raises(InputError, match=r"kv_heads = 2, mesh tensor = 4"):
        param_shardings(small[0], make_mesh(1, 1, 4))
    with pytest.raises(InputError, match="needs 64"):
        make_mesh(4, 4, 4)
    with pytest.raises(ValueError, match="one mesh axis"):
        partition("heads", "mlp")


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 1), (2, 1, 2), (2, 2, 2)])
def test_sharded_equals_unsharded(small, shape):
    config, params = small
    rng = np.random.default_rng(0)
    rows = make_rows([rng.integers(40, size=3)] * 8, [rng.integers(40, size=n) for n in range(2, 10)], 12)

    def loss(params, rows):
        return jnp.sum(jnp.sin(token_logprobs(params, rows, config)) * rows.mask)

    want, want_gradient = jax.jit(jax.value_and_grad(loss))(params, rows)
    mesh = make_mesh(*shape)
    placed = param_shardings(config, mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(loss),
            in_shardings=(placed, batch_sharding(mesh)),
            out_shardings=(None, placed),
        )
        got, got_gradient = step(jax.device_put(params, placed), rows)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got_gradient), jax.tree.leaves(want_gradient), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=1e-5)
    assert got_gradient["layers"]["up"].sharding.spec == placed["layers"]["up"].spec
