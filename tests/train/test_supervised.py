"""The supervised step learns, and learns from responses alone."""

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.rollout import make_rows
from opd_jax.train.optimizer import make_optimizer
from opd_jax.train.supervised import make_supervised_step


def test_loss_falls_to_nothing_on_one_batch(small):
    config, params = small
    rng = np.random.default_rng(0)
    rows = make_rows([rng.integers(40, size=4)] * 4, [rng.integers(40, size=6) for _ in range(4)], 10)
    optimizer = make_optimizer(1e-2, weight_decay=0.0)
    step = make_supervised_step(config, optimizer)
    params = jax.tree.map(jnp.copy, params)
    state = optimizer.init(params)
    losses = []
    for _ in range(60):
        params, state, loss = step(params, state, rows)
        losses.append(float(loss))
    assert losses[0] > 3.0
    # The first response tokens cannot be told apart by their equal prompts: log(4) / 6 a token at best.
    assert losses[-1] < 0.3


def test_prompts_and_padding_teach_nothing(small):
    config, params = small
    rows = make_rows([[1, 2, 3]], [[4, 5]], 9)
    optimizer = make_optimizer(1e-2)
    step = make_supervised_step(config, optimizer)

    def updated(rows):
        copy = jax.tree.map(jnp.copy, params)
        return step(copy, optimizer.init(copy), rows)

    other = rows.replace(targets=np.where(rows.mask, rows.targets, 7))
    a, b = updated(rows), updated(other)
    assert a[2] == b[2]
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])
