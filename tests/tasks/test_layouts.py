"""Problem sets as they are published: each layout read, what is no problem refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_jax.errors import InputError
from opd_jax.tasks import Problem, read_problem_set, read_problems

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put "
    'your answer on its own line after "Answer:".'
)


def dapo(text, answer, index):
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": DAPO.format(text)}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index},
    }


LITERAL = {
    "verl": (dapo("What is $2+2$?", "4", "9a-1"), Problem("9a-1", "What is $2+2$?", "4")),
    "prompt": ({"id": "a", "prompt": "1+1 ", "answer": "2"}, Problem("a", "1+1 ", "2")),
    "labelled": (
        {"prompt": [{"role": "user", "content": "2*3?"}], "label": "6", "id": 0},
        Problem("0", "2*3?", "6"),
    ),
    "problem": (
        {"problem": "x?", "answer": r"\frac12", "unique_id": "test/a/1.json", "level": 2},
        Problem("test/a/1.json", "x?", r"\frac12"),
    ),
    "solution": (
        {"problem": "y?", "solution": r"First \boxed{1}, so \boxed{\text{(A)}}.", "id": "m"},
        Problem("m", "y?", r"\text{(A)}"),
    ),
    "question": (
        {"question": "How many?", "answer": "2*500=<<2*500=1000>>1000\n#### 1,000", "id": "g"},
        Problem("g", "How many?", "1000"),
    ),
}


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("layout", LITERAL)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_each_layout_is_read(tmp_path, layout, suffix):
    row, problem = LITERAL[layout]
    file = tmp_path / f"p{suffix}"
    if suffix == ".jsonl":
        lines(file, [row])
    else:
        pq.write_table(pa.Table.from_pylist([row]), file)
    read = read_problem_set(file)
    assert (read.layout, read.problems) == (layout, [problem])
    assert read.unwrapped == (layout == "verl")


def test_names_in_any_case_and_numbers_of_tables(tmp_path):
    rows = [
        {"ID": "I-1", "Problem": "p", "Solution": "long", "Answer": 33},
        {"ID": "I-2", "Problem": "q", "Answer": 27.0},
    ]
    assert read_problems(lines(tmp_path / "aime.jsonl", rows)) == [
        Problem("I-1", "p", "33"),
        Problem("I-2", "q", "27"),
    ]


def test_rows_that_repeat_to_the_letter_are_read_once(tmp_path):
    row, other = dapo("A?", "1", "x"), dapo("B?", "2", "y")
    read = read_problem_set(lines(tmp_path / "d.jsonl", [row, other, row, row]))
    assert [p.id for p in read.problems] == ["x", "y"]
    assert (read.rows, read.repeats, read.unwrapped) == (4, 2, 2)
    with pytest.raises(InputError, match="line 2 of .* has 'x' twice"):
        read_problems(lines(tmp_path / "e.jsonl", [row, dapo("C?", "1", "x")]))


def test_numbered_rows_are_named_by_set_and_split(tmp_path):
    row = {**dapo("A?", "1", 7), "extra_info": {"index": 7, "split": "train"}}
    assert read_problems(lines(tmp_path / "v.jsonl", [row]))[0].id == "math_dapo/train/7"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "q", "gold": "1"}, "line 1 of .* has text, gold; rename"),
        ({"problem": "p", "solution": "no box"}, r"line 1 of .* no \\boxed"),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "label": "1"},
            "system, user",
        ),
        ({"prompt": "p", "reward_model": {"style": "rule"}}, "'ground_truth' is missing"),
        ({"prompt": "p", "reward_model": None}, "line 1 of"),
        ({"question": "p", "answer": True}, "has True"),
        ({"prompt": "p", "answer": float("nan")}, "has nan"),
    ],
)
def test_what_is_no_problem_is_refused(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read_problems(lines(tmp_path / "p.jsonl", [row]))


def test_folders_of_tables(tmp_path):
    for name, answer in (
        ("main/train-00000-of-00002", "1"),
        ("main/train-00001-of-00002", "2"),
        ("main/test-00000-of-00001", "3"),
    ):
        file = tmp_path / "gsm" / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{"question": f"q{answer}", "answer": f"#### {answer}"}]), file)
    assert [p.answer for p in read_problems(f"{tmp_path}/gsm#train")] == ["1", "2"]
    assert [p.answer for p in read_problems(f"{tmp_path}/gsm#main/test")] == ["3"]
    with pytest.raises(
        InputError, match=r"has the tables main/test, main/train; name one, as in .*gsm#main/test"
    ):
        read_problems(tmp_path / "gsm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no parquet or JSON-lines file"):
        read_problems(tmp_path / "empty")


def test_what_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    row, problem = LITERAL["question"]
    table = datasets.Dataset.from_list([row])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "two")
    assert read_problems(tmp_path / "one") == [problem]
    assert read_problems(f"{tmp_path}/two#test") == [problem]
    with pytest.raises(InputError, match="the tables test, train"):
        read_problems(tmp_path / "two")


def test_a_hub_name_is_read_from_the_cache_alone(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="someone/maths is not; fetch it with hf download"):
        read_problems("hf:someone/maths")
    repository = tmp_path / "datasets--someone--maths"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    row, problem = LITERAL["problem"]
    lines(repository / "snapshots" / "abc" / "test.jsonl", [row])
    assert read_problems("hf:someone/maths") == [problem]


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"p\.parquet is not"):
        read_problems(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "p", "answer": "1", "Answer": "2"}',
            "line 1 of .* has 'answer' and 'Answer'; rename one",
        ),
        ('{"prompt": "p", "answer": "1", "answer": "2"}', "line 1 of .* has 'answer' twice; rename one"),
        (
            '{"prompt": "p", "reward_model": {"ground_truth": "1", "ground_truth": "2"}}',
            "line 1 of .* has 'ground_truth' twice",
        ),
    ],
)
def test_a_name_that_comes_twice_is_refused(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        read_problems(tmp_path / "p.jsonl")


@pytest.mark.parametrize("again", ["answer", "Answer"])
def test_a_column_that_comes_twice_is_refused(tmp_path, again):
    table = pa.table([["p"], ["1"], ["2"], ["x"], ["y"]], names=["prompt", "answer", again, "Note", "note"])
    pq.write_table(table, tmp_path / "p.parquet")
    with pa.OSFile(str(tmp_path / "p.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    for name in ("p.parquet", "p.arrow"):
        with pytest.raises(InputError, match=f"in more than case: .*{name} has 'answer' and '{again}'"):
            read_problems(tmp_path / name)
    # What is not read takes nobody's place.
    pq.write_table(table.remove_column(2), tmp_path / "p.parquet")
    assert [problem.answer for problem in read_problems(tmp_path / "p.parquet")] == ["1"]
