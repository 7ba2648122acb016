"""Drift and gates read off a store: by hand, and against the printed form of the gate."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from opd_jax.cli import main
from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.lab import student
from opd_jax.rollout import Rollout, RolloutStore, Score
from opd_jax.rollout.import_dumps import import_dump
from opd_jax.settings import load_config
from opd_jax.study.inspection import inspect_store
from opd_jax.tasks import load_tokenizer
from tests.oracle.gates import gate


def scored(folder, old, cur, round_=0, with_score=True, **about):
    """A store of rollouts with these log-probs, prompts of one to three tokens."""
    store = RolloutStore(folder, about)
    rollouts = []
    for row, (a, b) in enumerate(zip(old, cur, strict=True)):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        k = np.zeros((len(a), 2))
        score = Score(b, a, k.astype(np.int32), k, np.zeros(len(a))) if with_score else None
        ids = np.arange(2, 2 + len(a), dtype=np.int32)
        rollouts.append(
            Rollout(round_, f"p{row}", 0, np.arange(1 + row % 3, dtype=np.int32), ids, a, False, 1.0, score)
        )
    store.append(rollouts)
    store.seal(round_)
    return folder


def test_by_hand(tmp_path):
    ln2 = np.log(2.0)
    # Blocks of two drift by ln 2 and 0, and by 0 and -ln 2: gates 1/2, 1, 1 and 1/2, of mean 3/4.
    old = [[-3, -3, -3, -3], [-3, -3, -3, -3]]
    cur = [[-3 + ln2, -3 + ln2, -3, -3], [-3, -3, -3 - ln2, -3 - ln2]]
    [reading] = inspect_store(scored(tmp_path / "s", old, cur), load_config(None, ["--gate.block=2"]))
    assert (reading.rollouts, reading.tokens) == (2, 8)
    assert reading.drift == pytest.approx(0, abs=1e-7)
    assert reading.drift_abs == pytest.approx(ln2 / 2, rel=1e-6)
    assert reading.drift_abs_percentiles[-1] == pytest.approx(ln2, rel=1e-6)
    np.testing.assert_allclose([reading.weight_percentiles[i] for i in (0, -1)], [2 / 3, 4 / 3], rtol=1e-6)
    assert reading.effective_token_ratio == pytest.approx(0.9, rel=1e-6)  # (8 * 3/4)^2 / (8 * (4 + 4/4))
    first, second = reading.segments
    assert (first["first"], first["last"], first["tokens"]) == (0, 0, 4)
    np.testing.assert_allclose([first["drift"], second["drift"]], [ln2 / 2, -ln2 / 2], rtol=1e-6)
    np.testing.assert_allclose(
        [first["score"], first["weight"], second["weight"]], [ln2 / 2, 1, 1], rtol=1e-6
    )


def test_against_the_printed_gate(tmp_path):
    rng = np.random.default_rng(0)
    lengths = [70, 3, 33, 64]
    old = [-rng.exponential(size=n) - 1 for n in lengths]
    cur = [a + rng.normal(scale=0.3, size=n) for a, n in zip(old, lengths, strict=True)]
    config = load_config(None, ["--gate.block=4", "--gate.tau=2", "--gate.statistic=rms"])
    [reading] = inspect_store(scored(tmp_path / "s", old, cur), config)
    mask = np.arange(70) < np.array(lengths)[:, None]
    padded = [np.array([np.pad(np.float32(x), (0, 70 - len(x))) for x in xs]) for xs in (cur, old)]
    segments = np.where(mask, np.arange(70) // 4, -1)
    g = gate(*padded, mask, segments, tau=2.0, statistic="rms")
    w = g / g[mask].mean()
    np.testing.assert_allclose(
        reading.weight_percentiles, np.percentile(w[mask], [0, 1, 5, 25, 50, 75, 95, 99, 100]), rtol=2e-5
    )
    assert reading.effective_token_ratio == pytest.approx(
        w[mask].sum() ** 2 / mask.sum() / (w[mask] ** 2).sum(), rel=1e-5
    )
    # 18 blocks in 9 lines of two; the last holds what is left of the longest response.
    assert [reading.segments[0][name] for name in ("first", "last", "tokens")] == [0, 1, 27]
    assert sum(s["tokens"] for s in reading.segments) == mask.sum()
    here = (segments >= 4) & (segments < 6)
    assert reading.segments[2]["weight"] == pytest.approx(w[here].mean(), rel=1e-5)


def test_no_gate_is_weight_one(tmp_path):
    store = scored(tmp_path / "s", [[-1, -2]], [[-2, -1]])
    [reading] = inspect_store(store, load_config(None, ["--gate.segments=none"]))
    assert set(reading.weight_percentiles) == {1.0}
    assert reading.segments == []


def test_what_cannot_be_read_is_refused(tmp_path):
    store = scored(tmp_path / "s", [[-1, -2]], [[-2, -1]])
    for words, message in (
        (["--gate.segments=newline"], "name the model's folder with --tokenizer"),
        (["--weights.members=[tip]"], "weights.members=tip needs entropy, kl"),
        (["--gate.control=oracle"], "gate.control=oracle needs"),
    ):
        with pytest.raises(InputError, match=message):
            inspect_store(store, load_config(None, words))
    with pytest.raises(InputError, match="has no rounds"):
        inspect_store(tmp_path / "none", Config())
    with pytest.raises(InputError, match="has behaviour_logprobs alone"):
        inspect_store(scored(tmp_path / "raw", [[-1, -2]], [[-2, -1]], with_score=False), Config())


def test_log_probs_at_two_temperatures_are_no_drift(tmp_path):
    about = {"temperature": 0.7, "behaviour_logprob_temperature": 1.0}
    store = scored(tmp_path / "server", [[-1, -2]], [[-2, -1]], **about)
    with pytest.raises(InputError, match=r"server has the sampler's at 1\.0 and the trainer's at 0\.7"):
        inspect_store(store, Config())
    about["behaviour_logprob_temperature"] = 0.7
    assert inspect_store(scored(tmp_path / "jax", [[-1, -2]], [[-2, -1]], **about), Config())


def test_an_imported_store_by_the_command(tmp_path, capsys):
    (tmp_path / "dump").mkdir()
    ones = np.ones((2, 6), np.int64)
    tensors = {
        "prompts": 20 * ones[:, :2],
        "responses": 21 * ones[:, :4],
        "attention_mask": ones,
        "rollout_log_probs": np.full((2, 4), -3, np.float32),
        "old_log_probs": np.array([[-2.5] * 4, [-3] * 4], np.float32),
        "token_level_scores": np.zeros((2, 4), np.float32),
    }
    save_file(tensors, tmp_path / "dump" / "7.safetensors")
    import_dump(tmp_path / "dump", "verl", tmp_path / "store", load_tokenizer(student()))
    figures = tmp_path / "figures.json"
    words = ["inspect", str(tmp_path / "store"), "--gate.segments", "sequence", "--json", str(figures)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "gate: sequence, signed_mean, exp, tau 1, scope minibatch" in out
    assert "round 7: 2 rollouts, 8 tokens, drift +0.25000, |drift| 0.25000" in out
    [told] = json.loads(figures.read_text())
    e = np.exp(-0.5)
    np.testing.assert_allclose(told["weight_percentiles"][0], 2 * e / (1 + e), rtol=1e-6)
    assert main(["inspect", str(tmp_path / "store"), "--loss.kind=scope"]) == 2
    assert "takes settings of gate and weights" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "store"), "--round", "8"]) == 2
