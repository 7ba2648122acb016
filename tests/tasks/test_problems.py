"""Problem files: read, written, refused."""

import pytest

from opd_jax.errors import InputError
from opd_jax.tasks import Problem, read_problems, write_problems


def test_round_trip(tmp_path):
    problems = [Problem("a", "1+1\n", "2"), Problem("b", "é", "x")]
    write_problems(tmp_path / "p.jsonl", problems)
    assert read_problems(tmp_path / "p.jsonl") == problems


def test_an_id_is_derived_and_lasting(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "q", "answer": 3}\n\n')
    [problem] = read_problems(tmp_path / "p.jsonl")
    assert problem == Problem("8e35c2cd3bf6641b", "q", "3")
    assert problem.key == Problem("8e35c2cd3bf6641b", "other text", "").key < 2**31


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has none"),
        ('{"prompt": "q"}', "line 1 of"),
        ('{"prompt": "q", "answer": "1"}\nnot json', "line 2 of"),
        ("[1, 2]", "line 1 of"),
        ('{"prompt": "", "answer": "1"}', "a prompt must be text"),
        ('{"id": "x", "prompt": "q", "answer": 1}\n' * 2, "'x' twice"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_problems(tmp_path / "p.jsonl")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="check the path"):
        read_problems(tmp_path / "none.jsonl")
