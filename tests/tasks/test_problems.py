"""Problem files: read, written, refused."""

import pytest

from opd_jax.errors import InputError
from opd_jax.tasks import Problem, read_problems


def test_lines_are_read_in_order(tmp_path):
    # U+2028 ends a line for Python, not for JSON.
    lines = ['{"id": "a", "prompt": "1+1", "answer": "2"}', '{"id": "b", "prompt": "é\u2028", "answer": 0.5}']
    (tmp_path / "p.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert read_problems(tmp_path / "p.jsonl") == [Problem("a", "1+1", "2"), Problem("b", "é\u2028", "0.5")]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "a", "prompt": "q", "answer": 3}\n', encoding="utf-8-sig")
    assert read_problems(tmp_path / "p.jsonl") == [Problem("a", "q", "3")]


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
        ('{"prompt": "", "answer": "1"}', "the prompt must be text"),
        ('{"prompt": "q", "answer": null}', "the answer must be text"),
        ('{"prompt": "q", "answer": " "}', "the answer must be text"),
        ('{"prompt": "\\ud800", "answer": "1"}', "the prompt must be text"),
        ('{"id": "\\ud800", "prompt": "q", "answer": "1"}', "the id must be text: line 1 of"),
        ("[" * 100_000, "line 1 of"),
        ('{"id": "x", "prompt": "q", "answer": 1}\n' * 2, "'x' twice"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_problems(tmp_path / "p.jsonl")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="readable UTF-8 text"):
        read_problems(tmp_path / "none.jsonl")
