"""The step under a mesh, its diagnostics, and the optimizer's mask."""

import jax
import numpy as np
import pytest

from opd_jax.model import parameter_table
from opd_jax.model.sharding import on_mesh
from opd_jax.rollout.score import batch_of
from opd_jax.train.collect import minibatch_plan
from opd_jax.train.opening import open_run
from opd_jax.train.optimizer import make_optimizer
from opd_jax.train.step import init_state, make_train_step, state_shardings
from tests.conftest import tiny_config


@pytest.mark.parametrize(
    "mesh", [(2, 2, 1), *(pytest.param(m, marks=pytest.mark.slow) for m in ((4, 1, 1), (1, 8, 1)))]
)
def test_more_devices_give_the_same_updates(finished, tmp_path, mesh):
    config = tiny_config(
        *(f"--mesh.{name}={n}" for name, n in zip(("data", "fsdp", "tensor"), mesh, strict=True))
    )
    run = open_run(tmp_path / "wide", config)
    rollouts = finished.scored.read(1)
    members = [rollouts[i] for i in minibatch_plan(config, 1)[0]]
    batch = batch_of(members, run.width)

    def three_updates(run):
        params = run.base
        shardings = state_shardings(parameter_table(run.model), run.optimizer, run.mesh)
        fresh = init_state(jax.tree.map(jax.numpy.copy, params), run.optimizer)
        state = jax.device_put(fresh, shardings)
        step = make_train_step(
            run.model, run.config, run.optimizer, np.zeros(run.model.vocab_size, bool), shardings, run.mesh
        )
        lines = []
        with jax.set_mesh(run.mesh):
            for _ in range(3):
                state, readings = step(state, on_mesh(batch, run.mesh), {})
                lines.append(jax.device_get({**readings.sums, **readings.whole}))
        return state, lines

    state, lines = three_updates(run)
    want_state, want_lines = three_updates(open_run(finished.folder))
    for line, want in zip(lines, want_lines, strict=True):
        for name in want:
            np.testing.assert_allclose(line[name], want[name], rtol=2e-4, atol=1e-4, err_msg=name)
    params, want_params = jax.device_get((state.params, want_state.params))
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), params, want_params)
    assert max(jax.tree.leaves(moved)) < 5e-4  # Adam turns rounding of tiny gradients into steps of lr
    if mesh[1] > 1:
        assert "fsdp" in str(state.params["layers"]["up"].sharding.spec)
        assert "fsdp" in str(state.opt_state[1][0].mu["layers"]["up"].sharding.spec)


def test_weight_decay_spares_norm_scales(small):
    _, params = small
    optimizer = make_optimizer(0.1, weight_decay=0.5)
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    decayed = {
        jax.tree_util.keystr(path): bool(np.any(np.asarray(u) != 0))
        for path, u in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert {path for path, moved in decayed.items() if not moved} == {
        "['norm']",
        "['layers']['attention_norm']",
        "['layers']['mlp_norm']",
        "['layers']['query_norm']",
        "['layers']['key_norm']",
    }
