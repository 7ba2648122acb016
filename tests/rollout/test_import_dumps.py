"""Dumps of other trainers: read to the number, or refused by file and row."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from opd_jax.cli import main
from opd_jax.errors import InputError
from opd_jax.lab import student
from opd_jax.rollout import RolloutStore
from opd_jax.rollout.import_dumps import import_dump, old_store
from opd_jax.tasks import load_tokenizer

EOS, A, B, C = 0, 17, 18, 19  # ids of the lab's tokenizer: its end of text, and three letters

# Two rollouts of a step as verl holds them: prompts padded on the left, responses on the right; the second
# response is cut at its limit, the first ends, and the pad is the very id that ends it.
STEP = {
    "prompts": np.array([[0, A, B], [A, B, C]]),
    "responses": np.array([[C, EOS, 0, 0], [A, A, B, C]]),
    "attention_mask": np.array([[0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
    "response_mask": np.array([[1, 1, 0, 0], [1, 1, 1, 1]]),
    "rollout_log_probs": np.array([[-1, -2, -1, -1], [-3, -4, -5, -6]], np.float32),
    "old_log_probs": np.array([[-1.5, -2, 0, 0], [-3, -4.25, -5, -6]], np.float32),
    "token_level_scores": np.array([[0, 1, 0, 0], [0, 0, 0, 0]], np.float32),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(student())


def step(folder, number, **changes):
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor for name, tensor in {**STEP, **changes}.items() if tensor is not None}
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        folder / f"{number}.safetensors",
    )
    return folder


def test_tensors_of_verl(tmp_path, tokenizer):
    dump = step(step(tmp_path / "dump", 10), 9)
    told = import_dump(dump, "verl", tmp_path / "store", tokenizer)
    assert (told.rollouts, told.rounds, told.columns) == (4, [9, 10], ["rollout_log_probs", "old_log_probs"])
    for path, column in (
        (tmp_path / "store", "rollout_log_probs"),
        (old_store(tmp_path / "store"), "old_log_probs"),
    ):
        first, second = RolloutStore(path).read(10)
        assert first.prompt_ids.tolist() == [A, B]
        assert first.response_ids.tolist() == [C, EOS]
        assert second.response_ids.tolist() == [A, A, B, C]
        assert first.behaviour_logprobs.tolist() == STEP[column][0, :2].tolist()
        assert second.behaviour_logprobs.tolist() == STEP[column][1].tolist()
        assert (first.truncated, second.truncated) == (False, True)
        assert (first.reward, second.reward) == (1.0, 0.0)
        assert first.problem != second.problem
        assert (first.sample, RolloutStore(path).read(9)[0].sample) == (1, 0)
        assert RolloutStore(path).about_store["logprobs"] == column


def test_going_on_writes_what_is_missing(tmp_path, tokenizer):
    dump, store = step(tmp_path / "dump", 1), tmp_path / "store"
    import_dump(dump, "verl", store, tokenizer)
    before = RolloutStore(store).shard(1)
    told = import_dump(step(dump, 2), "verl", store, tokenizer)
    assert (told.rollouts, told.rounds, told.skipped) == (2, [2], [1])
    assert RolloutStore(store).rounds == RolloutStore(old_store(store)).rounds == [1, 2]
    assert [rollout.sample for rollout in RolloutStore(store).read(2)] == [1, 1]
    assert RolloutStore(store).shard(1) == before  # its SHA-256 too
    with pytest.raises(InputError, match="one temperature: .* has 0.7; give --out a new folder"):
        import_dump(dump, "verl", store, tokenizer, temperature=0.7)


@pytest.mark.parametrize(
    "changes",
    [
        {"token_level_scores": -STEP["token_level_scores"]},
        {"old_log_probs": STEP["old_log_probs"] - 1},
        {"responses": STEP["responses"][:, ::-1].copy(), "attention_mask": np.ones((2, 7), int)},
    ],
)
def test_a_step_of_another_dump_is_refused(tmp_path, tokenizer, changes):
    store = tmp_path / "store"
    import_dump(step(tmp_path / "dump", 1), "verl", store, tokenizer)
    other = step(tmp_path / "other", 1, **{"response_mask": None} | changes)
    with pytest.raises(InputError, match="has step 1 of other rollouts, log-probs or rewards than .*other"):
        import_dump(other, "verl", store, tokenizer)
    # Where the files lie and how they are padded is no difference.
    assert import_dump(step(tmp_path / "moved", 1), "verl", store, tokenizer).skipped == [1]


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_import_that_was_stopped_has_both_stores_where_it_has_the_first(
    tmp_path, tokenizer, monkeypatch, at
):
    """Whoever finds a round in the store that is asked first may read it in the other."""
    dump, store = step(step(tmp_path / "dump", 1), 2), tmp_path / "store"
    honest, sealed = RolloutStore.seal, []

    def stopped(self, round_, **about):
        sealed.append(round_)
        if len(sealed) == at:
            raise KeyboardInterrupt
        honest(self, round_, **about)

    with monkeypatch.context() as patched:
        patched.setattr(RolloutStore, "seal", stopped)
        with pytest.raises(KeyboardInterrupt):
            import_dump(dump, "verl", store, tokenizer)
    first, other = (set(RolloutStore(path).rounds) for path in (store, old_store(store)))
    assert first <= other
    assert len(first) + len(other) == at - 1
    import_dump(dump, "verl", store, tokenizer)
    assert RolloutStore(store).rounds == RolloutStore(old_store(store)).rounds == [1, 2]


def test_response_mask_alone_tells_padding(tmp_path, tokenizer):
    padded = row(responses=[A, B, EOS, 0], rollout_log_probs=[-1, -2, -3, -9], response_mask=[1, 1, 1, 0])
    import_dump(lines(tmp_path / "dump", padded), "verl", tmp_path / "store", tokenizer)
    [rollout] = RolloutStore(tmp_path / "store").read(3)
    assert rollout.response_ids.tolist() == [A, B, EOS]
    assert rollout.behaviour_logprobs.tolist() == [-1.0, -2.0, -3.0]


def test_a_store_may_be_a_url_or_the_working_folder(tmp_path, capsys, monkeypatch):
    pytest.importorskip("obstore", reason="object stores need opd_jax[objects]")
    dump = step(tmp_path / "dump", 1)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in ("memory://imported/mine", "."):
        words = ["import", "verl", str(dump), "--out", out, "--tokenizer", str(student())]
        assert main(words) == 0
        assert f"next: opd inspect {out}" in capsys.readouterr().out
        assert main(["inspect", out]) == 0
        assert "round 1: 2 rollouts, 6 tokens" in capsys.readouterr().out
    assert RolloutStore("memory://imported/mine-old").rounds == [1]
    assert RolloutStore(tmp_path / "here-old").rounds == [1]
    assert not (tmp_path / "here" / "memory:").exists()


@pytest.mark.parametrize("temperature", ["-1", "0", "nan", "inf"])
def test_no_temperature_is_refused(tmp_path, capsys, temperature):
    dump = step(tmp_path / "dump", 1)
    words = ["import", "verl", str(dump), "--out", str(tmp_path / "s"), "--tokenizer", str(student())]
    assert main([*words, f"--temperature={temperature}"]) == 2
    assert "--temperature must be a finite number above 0" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def row(**changes):
    fields = {
        "input": "user\nab\nassistant\n",
        "output": "aab",
        "score": 1.0,
        "step": 3,
        "prompts": [A, B],
        "responses": [A, A, B],
        "rollout_log_probs": [-1.0, -0.5, -0.25],
    }
    return {name: value for name, value in {**fields, **changes}.items() if value is not None}


def lines(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "3.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_of_verl_with_one_column(tmp_path, tokenizer, capsys):
    dump = lines(tmp_path / "dump", row(uid="u"), row(uid="u", score=0.0, responses=[A, B, EOS]))
    words = ["import", "verl", str(dump), "--out", str(tmp_path / "store"), "--tokenizer", str(student())]
    assert main(words) == 0
    assert "drift can be read once a second is there" in capsys.readouterr().out
    first, second = RolloutStore(tmp_path / "store").read(3)
    assert (first.problem, second.problem, first.sample, second.sample) == ("u", "u", 0, 1)
    assert (first.reward, second.reward) == (1.0, 0.0)
    assert not old_store(tmp_path / "store").exists()
    assert main(["inspect", str(tmp_path / "store")]) == 2
    assert "has rollout_log_probs alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout_log_probs": None},
            r"line 1 of .*3\.jsonl has input, output, .* no rollout_log_probs or old_log",
        ),
        ({"rollout_log_probs": [-1.0, -2.0]}, "has 2 for 3"),
        ({"rollout_log_probs": [-1.0, float("nan"), -1.0]}, "finite and at most 0"),
        ({"rollout_log_probs": [-1.0, 0.5, -1.0]}, "finite and at most 0"),
        ({"rollout_log_probs": "many"}, "lists of numbers"),
        ({"rollout_log_probs": [[-1.0], [-2.0], [-3.0]]}, r"line 1 of .* has float64 of shape \[3, 1\]"),
        ({"rollout_log_probs": [-1.0, None, -1.0]}, "log-probs must be flat lists of numbers"),
        ({"rollout_log_probs": [-1e300, -1.0, -1.0]}, "finite and at most 0"),
        ({"responses": [17.9, 18.2, 17.7]}, "flat lists of whole numbers: line 1 of .* has float64"),
        ({"responses": [[A], [A], [B]]}, r"whole numbers: line 1 of .* has int64 of shape \[3, 1\]"),
        ({"responses": [A, A, 2**70]}, "whole numbers"),
        ({"responses": [A, A, 999]}, "17 to 999, that has 43 ids"),
        ({"responses": []}, "has 3 for 0"),
        ({"prompts": []}, "at least one token: line 1 of .* has 0 and 3"),
        ({"score": None}, "must have a reward"),
        ({"score": float("nan")}, "a reward must be a finite number: line 1 of .* has nan in score"),
        ({"score": [1.0, None]}, "has nan in score"),
        ({"score": []}, "a reward must be a number: line 1 of .* has none in score"),
        ({"score": 1e300}, "a reward must be a finite number"),
        ({"score": 10**400}, "lists of numbers"),
        ({"Score": 0.0}, "line 1 of .* has 'score' and 'Score'; rename one"),
        ({"step": 1.5}, r"a step must be a whole number below 2\^31: line 1 of .* has '1.5'"),
        ({"step": -1}, "has '-1'"),
        ({"step": 2**40}, "has '1099511627776'"),
        ({"uid": "\ud800"}, "a uid must be text that UTF-8 can hold: line 1 of"),
        ({"attention_mask": [1, 1, 1, 1]}, "attention_mask must be as long .* has 4 positions for 5"),
        (
            {"prompts": [A, B, C], "attention_mask": [1, 0, 1, 1, 1, 1]},
            "on the left, .* line 1 of .*0 behind",
        ),
        ({"attention_mask": [1, 0, 1, 1, 1]}, "padded on the left, and nowhere else: line 1 of"),
        (
            {"attention_mask": [1, 1, 1, 1, float("nan")]},
            "attention_mask must be of 0 and 1: line 1 of .* nan",
        ),
        ({"response_mask": [1, 1, 2]}, "response_mask must be of 0 and 1: line 1 of .* has 2; correct"),
        ({"attention_mask": [1, 1, 1, 1, 1], "response_mask": [1, 0, 1]}, "tokens of others within"),
        ({"response_mask": [1]}, "response_mask must be as long .* has 1 positions for 3"),
        ({"response_mask": [1, 0, 1]}, "tokens of others within"),
        ({"prompts": None, "output": "aa+b"}, "has 3 log-probs for 4 tokens"),
        ({"prompts": None, "output": ["aab"]}, "the texts of one prompt and one answer: line 1 of"),
        ({"prompts": None, "input": [{"role": "user"}]}, "the texts of one prompt and one answer: line 1 of"),
        ({"prompts": None, "output": "a\ud800"}, "the texts of one prompt and one answer: line 1 of"),
    ],
)
def test_rows_that_cannot_be_trusted_are_refused(tmp_path, tokenizer, changes, message):
    with pytest.raises(InputError, match=message):
        import_dump(lines(tmp_path / "dump", row(**changes)), "verl", tmp_path / "store", tokenizer)
    assert not (tmp_path / "store").exists()


def test_a_reward_that_is_missing_is_not_another_column(tmp_path, tokenizer):
    dump = lines(tmp_path / "dump", row() | {"score": None, "accuracy": 1.0})
    with pytest.raises(InputError, match="has nan in score; leave that row out, or name another column"):
        import_dump(dump, "verl", tmp_path / "store", tokenizer)
    import_dump(dump, "verl", tmp_path / "store", tokenizer, reward="accuracy")
    assert RolloutStore(tmp_path / "store").read(3)[0].reward == 1.0


def test_a_dump_without_rows_is_refused(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"a dump must have rollouts: .* has none"):
        import_dump(lines(tmp_path / "dump"), "verl", tmp_path / "store", tokenizer)


def test_pickles_are_refused_unread(tmp_path, tokenizer):
    dump = step(tmp_path / "dump", 1)
    (dump / "1.pt").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(
        InputError, match=r"1\.pt is one; where you trust it, save its tensors with safetensors"
    ):
        import_dump(dump, "verl", tmp_path / "store", tokenizer)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="has none"):
        import_dump(tmp_path / "none", "verl", tmp_path / "store", tokenizer)


def test_tensors_without_a_mask_are_refused(tmp_path, tokenizer):
    with pytest.raises(InputError, match="has no attention_mask"):
        import_dump(step(tmp_path / "dump", 1, attention_mask=None), "verl", tmp_path / "store", tokenizer)


# What trl's completions table holds of a step, with what a reward function may add to it.
def completions(folder, number, rows):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"completions_{number:05d}.parquet")
    return folder


TRL = {"step": 5, "prompt": "ab", "completion": "aab", "accuracy": 1.0, "advantage": 0.5}


def test_completions_of_trl(tmp_path, tokenizer):
    added = {"logprobs": [-1.0, -2.0, -3.0, -4.0], "old_per_token_logps": [-1.0, -2.0, -3.0, -5.0]}
    dump = completions(tmp_path / "completions", 5, [TRL | added])
    again = TRL | {"step": 6} | added
    completions(dump, 6, [again, again | {"completion": "bbb", "accuracy": 0.0}])
    told = import_dump(dump, "trl", tmp_path / "store", tokenizer)
    assert (told.rollouts, told.rounds, told.repeats) == (2, [5, 6], 1)
    [rollout] = RolloutStore(tmp_path / "store").read(5)
    assert rollout.prompt_ids.tolist() == [A, B]
    assert rollout.response_ids.tolist() == [A, A, B, EOS]  # one log-prob more than the text has tokens
    assert rollout.behaviour_logprobs.tolist() == added["logprobs"]
    assert rollout.reward == 1.0
    [old] = RolloutStore(old_store(tmp_path / "store")).read(5)
    assert old.behaviour_logprobs.tolist() == added["old_per_token_logps"]


def test_what_trl_writes_by_itself_has_no_log_probs(tmp_path, tokenizer):
    with pytest.raises(
        InputError, match=r"row 0 of .* has step, prompt, completion, accuracy, advantage, and no sam"
    ):
        import_dump(completions(tmp_path / "c", 5, [TRL]), "trl", tmp_path / "store", tokenizer)


def test_of_several_rewards_one_is_named(tmp_path, tokenizer):
    logged = TRL | {"format": 0.25, "logprobs": [-1.0, -2.0, -3.0]}
    dump = completions(tmp_path / "c", 5, [logged])
    with pytest.raises(InputError, match="has accuracy, format; name one"):
        import_dump(dump, "trl", tmp_path / "store", tokenizer)
    import_dump(dump, "trl", tmp_path / "store", tokenizer, reward="format")
    assert RolloutStore(tmp_path / "store").read(5)[0].reward == 0.25
