"""Duplicates and contamination: what must be caught, what must not, and the command that does it."""

import json
import os
from pathlib import Path

import pytest

from opd_jax.cli import main
from opd_jax.tasks import Problem, read_problems
from opd_jax.tasks.contamination import Pair, decontaminate, deduplicate, symbols, words

# Published problem sets; no part of the project.
DATA = Path(os.environ.get("OPD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
LONG = "A bag holds three red and five blue marbles and two are drawn without looking, so what is the chance"


def rules(trained, heldout, **options):
    _, pairs, _ = decontaminate(
        [Problem(f"t{i}", text, "1") for i, text in enumerate(trained)],
        {"e": [Problem(f"e{i}", text, "1") for i, text in enumerate(heldout)]},
        **options,
    )
    return [(pair.first, pair.second, pair.rule) for pair in pairs]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"Find $x$ if $\sqrt{120-\sqrt{x}}=2$.", r"find \(x\) if \[\sqrt{120 - \sqrt{x}} = 2\]"),
        (r"\begin{align*}x&=\dfrac{1}{2}\\y&\leq 1{,}000\end{align*}", r"x=\tfrac{1}{2}, \quad y \le 1000"),
        (r"\left(\text{area}\right)", "(area)"),
        ("Jackson\u2019s 10% of $f'(x)$", r"Jackson's $10\%$ of $f^{}'(x)$".replace("^{}", "")),
        ("函数 $f(x)$", "函数f(x)"),
        (r"$x^{2}=\sqrt{{x+1}}$", r"$x^2=\sqrt{x+1}$"),
        (r"$\sqrt{x}$\textbf{ is even or $\sqrt{x+1}$}", r"$\sqrt x$ is even or $\sqrt{x+1}$"),
        (r"\left\{\begin{array}{l}x+y=1\\x-y=3\end{array}\right.", r"\begin{cases}x+y=1\\x-y=3\end{cases}"),
        (r"$\left\{x\right\}$ or ${1,2}$", r"$\{x\}$ or $1,2$"),
        (
            r"\underbrace{9\ldots9}_\text{3 digits} of $\dfrac1{k^2+k}$",
            r"\underbrace{9\cdots9}_{3 ~digits} of \frac{1}{k^2+k}",
        ),
        (r"$k ~ \mbox{is an integer}$", r"$k ~ {is ~an~ integer}$"),
        ("2^{x+1", "2^x+1}"),
    ],
)
def test_the_same_in_other_clothes(a, b):
    assert symbols(a) == symbols(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("x+1", "x-1"),
        ("f'(2)", "f(2)"),
        ("1.5", "15"),
        (r"\frac{1}{23}", r"\frac{12}{3}"),
        ("x≤1", "x≥1"),
        ("x!", "x"),
        (r"\sqrt{x+1}=3", r"\sqrt{x}+1=3"),
        (r"\frac{6}{x+1}=2", r"\frac{6}{x}+1=2"),
        ("2^{x+1}=9", "2^{x}+1=9"),
        (r"{n+1 \choose k}", r"n+{1 \choose k}"),
        (r"\sqrt{\text{area of it} + 1}", r"\sqrt{\text{area of it}} + 1"),
        (r"\sqrt{\{x+1\}}", r"\sqrt{x+1}"),
        (r"\{x+1\}", r"\{x\}+1"),
        (r"\frac1{x+1}", r"\frac1{x}+1"),
        (r"\sqrt[3]{x+1}", r"\sqrt[3]{x}+1"),
        (r"{x+1 \over y}", r"x+{1 \over y}"),
    ],
)
def test_what_differs(a, b):
    assert symbols(a) != symbols(b)


def test_duplicates_keep_the_first_and_tell_of_other_answers():
    problems = [
        Problem("a", "What is $x+1$?", "1"),
        Problem("b", "what is x + 1", "2"),
        Problem("c", "??", "1"),
    ]
    kept, pairs = deduplicate([*problems, Problem("d", "...", "1")], "set")
    assert [problem.id for problem in kept] == ["a", "c", "d"]
    assert pairs == [Pair("b", "a", "set", "equal", "what is x + 1", False)]


def test_a_13_gram_is_13_words():
    text = words(LONG)
    thirteen, twelve = " ".join(text[:13]), " ".join(text[:12])
    other = " ".join(f"w{i}" for i in range(30))
    assert rules([f"{thirteen} {other}"], [LONG]) == [
        ("t0", "e0", "contained" if len(text) == 13 else "13-gram")
    ]
    assert rules([f"{twelve} {other}"], [LONG]) == []


def test_the_fragment_is_the_longest_run():
    _, [pair], _ = decontaminate(
        [Problem("t", f"Now: {LONG} of two red? Give it as a fraction of whole numbers.", "3")],
        {"e": [Problem("e", f"{LONG} of a pair of unlike colours, rounded to tenths of a percent?", "3")]},
    )
    assert pair == Pair("t", "e", "e", "13-gram", " ".join(words(LONG)) + " of", True)


def test_short_problems():
    short = "How many positive perfect squares less than $2023$ are divisible by $5$?"
    assert len(words(short)) < 13
    assert rules([f"{short} Fill in the number."], [short]) == [("t0", "e0", "contained")]
    assert rules(["Compute $1+1$."], ["compute 1 + 1"]) == [("t0", "e0", "equal")]
    assert rules(["Compute $1+1$.", "Compute $1+1$ and then its square root"], ["Compute $1-1$"]) == []
    near = "How many ways are there to arrange the letters of the word {}?"
    assert rules([near.format("TARTAR")], [near.format("ELLIPSE")]) == [("t0", "e0", "near")]
    assert (
        rules(["How many ways are there to arrange six red and four green balls in a circle of ten"], [near])
        == []
    )


def test_phrasing_is_no_evidence():
    phrase = "can be written as m over n where m and n are relatively prime positive integers find m plus n"
    question = [f"Topic {'abcdefghijklmno'[i] * 4} {i} asks {i * 7} things {phrase}" for i in range(15)]
    own = "Quite unlike all these is a question on 12345 circles that touch a line at its ends"
    asked = [f"{own} {phrase}"]
    assert rules(question, asked) == []
    assert len(rules(question[:5], asked)) == 5
    assert len(rules(question, asked, common=20)) == 15
    copy = f"{asked[0]} ok"  # its own words are evidence still
    assert rules([*question, copy], asked) == [("t15", "e0", "contained")]


@pytest.mark.skipif(
    not (DATA / "dapo_contamination.jsonl").is_file(), reason="the published sets are not at hand"
)
def test_every_known_pair_of_dapo_math_is_caught():
    known = [json.loads(line) for line in (DATA / "dapo_contamination.jsonl").read_text().splitlines()]
    heldout = {
        name: read_problems(DATA / f"{name}.jsonl") for name in ("aime24", "aime25", "amc23", "math500")
    }
    clean = read_problems(DATA / "train_math.jsonl")[:4000]
    bad = {
        row["train_id"]: Problem(row["train_id"], row["train_prompt"], row["train_answer"]) for row in known
    }
    kept, repeats = deduplicate([*clean, *bad.values()])
    left, pairs, _ = decontaminate(kept, heldout)
    same = {pair.first: pair.second for pair in repeats}
    found = {(pair.first, pair.second) for pair in pairs}
    missed = [
        row["train_id"]
        for row in known
        if (same.get(row["train_id"], row["train_id"]), row["eval_id"]) not in found
    ]
    assert missed == []
    assert len({pair.first for pair in pairs} - set(bad)) < 0.015 * len(clean)
    assert not {problem.id for problem in left} & set(bad)


def test_a_copy_is_one_however_many_there_are():
    """A held-out problem that is copied often makes its own words common."""
    asked = (
        "{} hikers walk around the circular lake at constant speeds while a ferry crosses between two "
        "opposite piers every hour; how long until all of them meet again at the north pier?"
    )
    copies = [f"Story {i}. {asked.format(f'{i} or')}" for i in range(11)]
    assert rules(copies, [asked.format("Seven")]) == [(f"t{i}", "e0", "13-gram") for i in range(11)]
    # Half of the words are no copy of the whole; they are told.
    half = " ".join(asked.split()[1:16])
    quoted = [Problem(f"t{i}", f"{half} number {i}", "1") for i in range(11)]
    clean, pairs, waived = decontaminate(quoted, {"e": [Problem("e", asked.format("Seven"), "1")]})
    assert (clean, pairs) == (quoted, [])
    assert waived[0] == Pair("t0", "e", "e", "13-gram", " ".join(words(half)), True)
    assert [pair.first for pair in waived] == [problem.id for problem in quoted]


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_the_command(tmp_path, capsys):
    a = lines(
        tmp_path / "a.jsonl",
        [{"id": 1, "problem": "Clean?", "answer": 1}, {"id": 2, "problem": LONG, "answer": 2}],
    )
    b = lines(
        tmp_path / "b.jsonl",
        [{"id": 1, "question": "clean", "answer": "#### 3"}, {"id": 5, "question": "More?", "answer": "5"}],
    )
    held = lines(tmp_path / "held.jsonl", [{"id": "h", "problem": f"{LONG} of it?", "answer": "1/2"}])
    out = tmp_path / "out" / "clean.jsonl"
    assert main(["problems", a, b, "--against", held, "--out", str(out)]) == 0
    assert "problems: 2 in" in capsys.readouterr().out
    # Ids that two sets use stand behind the name of their set.
    assert read_problems(out) == [Problem("a/1", "Clean?", "1"), Problem("b/5", "More?", "5")]
    told = json.loads((tmp_path / "out" / "clean.report.json").read_text())
    assert (
        told["problems"],
        told["duplicates"],
        told["duplicates_with_other_answers"],
        told["contaminated"],
    ) == (2, 1, 1, 1)
    assert told["contaminated_pairs"][0] == {
        "first": "a/2",
        "second": "h",
        "set": held,
        "rule": "contained",
        "fragment": " ".join(symbols(LONG)),
        "answers_agree": False,
    }
    text = (tmp_path / "out" / "clean.report.txt").read_text()
    assert f"a/2 = h of {held} (contained, another answer): a bag holds" in text
    assert "b/1 = a/1 (equal, another answer): clean" in text

    def refused(*words):
        assert main(["problems", *words]) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    before = out.read_bytes()
    assert "is there already" in refused(a, "--out", str(out))
    assert out.read_bytes() == before
    assert "what is left after decontamination has none" in refused(
        a, "--against", a, "--out", str(tmp_path / "x.jsonl")
    )
    assert "no such file" in refused(str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "x.jsonl")).lower()
    assert "takes no settings" in refused(a, "--out", str(tmp_path / "x.jsonl"), "--gate.block=3")
    assert "--common must be at least 1: got 0" in refused(
        a, "--out", str(tmp_path / "x.jsonl"), "--common", "0"
    )
    assert not (tmp_path / "x.jsonl").exists()


def test_the_command_tells_of_phrasing(tmp_path, capsys):
    copies = [{"id": f"t{i}", "prompt": f"{LONG} {i} {'and so on ' * 9}?", "answer": "1"} for i in range(11)]
    train = lines(tmp_path / "a.jsonl", copies)
    asked = {"id": "h", "problem": f"{LONG} of {' '.join(f'w{i}' for i in range(30))}?", "answer": "1"}
    held, out = lines(tmp_path / "held.jsonl", [asked]), tmp_path / "clean.jsonl"
    assert main(["problems", train, "--against", held, "--out", str(out)]) == 0
    assert "kept 11 that share but common phrasing with it" in capsys.readouterr().out
    told = json.loads(out.with_suffix(".report.json").read_text())
    assert (told["phrasing"], told["contaminated"], len(told["phrasing_pairs"])) == (11, 0, 11)
    assert f"t0 = h of {held} (13-gram): a bag holds" in out.with_suffix(".report.txt").read_text()
