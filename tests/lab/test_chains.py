"""The lab's task: solvable, disjoint, exact, of the promised length."""

import pytest

from opd_jax.errors import InputError
from opd_jax.lab import chains, heldout, solution, train, validation
from opd_jax.lab.chains import split_of
from opd_jax.lab.tokenizer import TOKENS, VOCABULARY
from opd_jax.tasks import Problem, encode_prompt, grade, newline_table


def test_solutions_are_right_and_what_they_look_like():
    problem = Problem("x", "a+3b+9c-4\n", "8")
    assert solution(problem) == "a+3=3\nb+9=12\nc-4=8\n\\boxed{8}"
    for problem in chains("train", 200):
        expression = problem.prompt.strip()
        for label in "abcdefghijklmnopqrstuvwxyz":
            expression = expression.replace(label, " ")
        assert sum(int(term) for term in expression.split()) == int(problem.answer)
        assert grade(solution(problem), problem.answer)


def test_train_and_heldout_share_nothing():
    # So few short chains exist that splits drawn at random would overlap.
    train, heldout = chains("train", 1500, terms=(2, 3)), chains("heldout", 200, terms=(2, 3))
    assert not {p.prompt for p in train} & {p.prompt for p in heldout}
    assert all(split_of(p.prompt) == "heldout" for p in heldout)
    assert len({p.id for p in train}) == 1500


def test_settings_are_chosen_on_problems_of_their_own():
    splits = [{problem.id for problem in split()} for split in (train, validation, heldout)]
    assert [len(split) for split in splits] == [4096, 200, 200]
    assert len(set.union(*splits)) == 4496


def test_seeds_and_difficulty():
    assert chains("train", 5) == chains("train", 5) != chains("train", 5, seed=1)
    for problem in chains("train", 300, terms=(4, 4), largest=99):
        totals = [int(line.split("=")[1]) for line in solution(problem).splitlines()[:-1]]
        assert len(totals) == 4
        assert all(0 <= total <= 99 for total in totals)


def test_answers_are_long_enough_for_blocks(tokenizer):
    lengths = [len(encode_prompt(tokenizer, solution(p))) + 1 for p in chains("train", 500)]
    assert min(lengths) >= 96
    assert max(lengths) <= 144


def test_the_impossible_is_refused():
    with pytest.raises(InputError, match="1 to 26 terms"):
        chains("train", 1, terms=(1, 27))
    with pytest.raises(InputError, match="enough distinct chains"):
        chains("train", 1000, terms=(1, 1))


def test_the_tokenizer_loads_and_round_trips(tokenizer):
    problem = chains("heldout", 1)[0]
    text = problem.prompt + solution(problem)
    ids = encode_prompt(tokenizer, text)
    assert tokenizer.decode(ids.tolist()) == text
    assert len(tokenizer) == len(TOKENS) < VOCABULARY
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    table = newline_table(tokenizer, VOCABULARY)
    assert [TOKENS[i] for i in range(len(TOKENS)) if table[i]] == ["\n"]
