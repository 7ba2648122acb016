r"""Problems that are listed twice, and training problems that an evaluation set also asks.

Two problems are compared as lists of *symbols* (words, numbers, LaTeX commands and operators) or of
*words* (the same without operators and brackets). Before a text is cut into either:

- Unicode is folded (NFKC) and letters are made small;
- ``\begin{...}``, ``\end{...}``, math delimiters (``$``, ``\(``, ``\[``), spacing (``\,``, ``\quad``, ``~``,
  ``\\``), sizes (``\left``, ``\big``), styles (``\displaystyle``) and fonts (``\text``, ``\mathrm``) go;
- ``\dfrac`` and ``\tfrac`` are ``\frac``, ``\leq`` is ``\le``, and so on; ``\%`` is ``%``;
- commas between thousands are dropped, and so is all other punctuation.

Braces are symbols where an argument or a script of more than one stands in them: ``\sqrt{x+1}`` is not
``\sqrt{x}+1``, but ``x^{2}`` is ``x^2``, and ``{x+1}`` by itself is ``x+1``. ``\{`` is a bracket like ``[``.

A training problem is *contaminated* by a held-out one under the first of these rules that holds:

``equal``       the same symbols;
``contained``   all symbols of the one, at least 8, in a row in the other;
``13-gram``     13 words in a row in common;
``near``        7 words in a row in common, and at least 60% of all words alike (the ratio of
                `difflib.SequenceMatcher`): the same question with other numbers.

For the last two a run of words that more than 10 of all problems have is phrasing ("where m and n are
relatively prime positive integers. Find m + n") and is no evidence by itself, unless runs of 13 make up at
least 60% of the held-out problem's words: that is a copy, however many there are. Pairs that have phrasing
alone in common are told apart and kept. A problem of fewer than 13 words has no 13-gram; the other three
rules are there for it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from opd_jax.tasks.problems import Problem

WORDS = 13
NEAR_WORDS = 7
NEAR_RATIO = 0.6
CONTAINED_SYMBOLS = 8
COPIED = 0.6  # share of a held-out problem's words in runs that make a copy of what is common
COMMON = 10  # problems that may share a run of words before it counts as phrasing

# A system's one brace goes with its environment: ``cases`` has it without a word.
_ENVIRONMENT = re.compile(r"(?:\\left\s*\\\{\s*)?\\(?:begin|end)\s*\{[^{}]*\}(?:\{[lcr|\s]*\})?")
_LAYOUT = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|(?:display|text|script)style|(?:no)?limits|q?quad"
    r"|[hv]space\*?\s*\{[^{}]*\})(?![a-zA-Z])"
    r"|\\[,;:!> \n()\[\]\\]|[$~]"
)
_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf)?|math(?:rm|bf|it|bb|cal|sf|frak)|operatorname\*?|mbox|hbox)(?![a-zA-Z])"
    r"\s*(\{?)"
)
_FONT_BRACE = "\\ {"  # what is left of a font
_INFIX = (r"\choose", r"\over", r"\atop")
_SAME = {
    "dfrac": "frac",
    "tfrac": "frac",
    "cfrac": "frac",
    "leq": "le",
    "geq": "ge",
    "neq": "ne",
    "ldots": "dots",
    "cdots": "dots",
    "dotsc": "dots",
    "dotsb": "dots",
    "rightarrow": "to",
    "lvert": "vert",
    "rvert": "vert",
    "cdot": "times",
}
_QUOTES = dict.fromkeys(map(ord, "\u2018\u2019\u2032"), "'")
_COMMAND = re.compile(r"\\([a-z]+)")
_SCRIPT = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: a character is a word
_WORD = re.compile(rf"\\[a-z]+|[{_SCRIPT}]|[^\W_{_SCRIPT}]+")
_SIGNS = r"[-+*/^=<>|!%'()\[\]_\u00b0\u00b1\u00d7\u00f7\u2190-\u22ff]|(?<=\d)\.(?=\d)"
_SYMBOL = re.compile(rf"{_WORD.pattern}|{_SIGNS}|\\ ?\{{|\\?[{{}}]")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two problems that are one, or nearly one."""

    first: str  # id of the one that is dropped, or is kept though it has phrasing in common
    second: str  # id of the one it is like
    set: str  # where the second stands
    rule: str
    fragment: str  # the longest run of words, or all symbols, that both have
    answers_agree: bool


def plain(text: str) -> str:
    r"""Text as it is compared, before it is cut: see the head of this module.

    >>> plain(r"Find $\dfrac{1}{2}\,\left(x+1,000\right)$.").split()
    ['find', '\\frac{1}{2}', '(x+1000', ')', '.']
    """
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    text = _LAYOUT.sub(" ", _ENVIRONMENT.sub(" ", text))
    text = _FONT.sub(r" \\ \1", text).lower()
    text = _COMMAND.sub(lambda match: "\\" + _SAME.get(match[1], match[1]), text)
    return re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", text)


def words(text: str) -> list[str]:
    r"""Words, numbers and LaTeX commands in order.

    >>> words(r"For how many $x$ is $\sqrt{120-\sqrt{x}}$ an integer?")
    ['for', 'how', 'many', 'x', 'is', '\\sqrt', '120', '\\sqrt', 'x', 'an', 'integer']
    """
    return _WORD.findall(plain(text))


def symbols(text: str) -> tuple[str, ...]:
    r"""The same with operators, brackets, and the braces of arguments of more than one symbol.

    >>> symbols(r"$x + 1.5$") == symbols("x+1.5."), symbols("x+1") == symbols("x-1")
    (True, False)
    >>> symbols(r"\frac{6}{x+1}"), symbols(r"\frac{6}{x}+1")
    (('\\frac', '6', '{', 'x', '+', '1', '}'), ('\\frac', '6', 'x', '+', '1'))
    """
    found: list[str] = []
    opened: list[int] = []  # places in `found` of the braces that are open
    held = [0]  # symbols and groups in the text itself, then in each of these braces
    earlier = before = ""
    for token in _SYMBOL.findall(plain(text)):
        if token in ("{", _FONT_BRACE):
            opened.append(len(found))
            held.append(0)
            found.append("{" if _is_argument(token, earlier, before) else "")
        elif token == "}" and opened:
            start, count = opened.pop(), held.pop()
            if found[start] and count > 1:
                found.append("}")
                count = 1
            else:
                found[start] = ""
            held[-1] += count
        elif token != "}":
            if token in _INFIX and opened:  # whose arguments are all that its braces hold
                found[opened[-1]] = "{"
            found.append(token[-1] if token in (r"\{", r"\}") else token)
            held[-1] += 1
        earlier, before = before, token
    for start in opened:  # and never closed
        found[start] = ""
    return tuple(filter(None, found))


def _is_argument(brace: str, earlier: str, before: str) -> bool:
    r"""Whether a brace opens a script or an argument: ``^{``, ``\sqrt{``, ``\frac{1}{``, ``\frac1{``."""
    is_script = before in ("^", "_")
    if brace == _FONT_BRACE:
        return is_script
    return is_script or before in ("]", "}") or any(map(_COMMAND.fullmatch, (earlier, before)))


def deduplicate(problems: Sequence[Problem], source: str = "") -> tuple[list[Problem], list[Pair]]:
    """The first of every group of problems with the same symbols, and the others as pairs with it."""
    first: dict[tuple[str, ...], Problem] = {}
    pairs = []
    for problem in problems:
        key = symbols(problem.prompt) or (problem.prompt,)
        kept = first.setdefault(key, problem)
        if kept is not problem:
            agree = kept.answer.strip() == problem.answer.strip()
            pairs.append(Pair(problem.id, kept.id, source, "equal", " ".join(key), agree))
    return list(first.values()), pairs


Suspects = Mapping[int, Mapping[int, set[int]]]  # training problem -> held-out problem -> kinds of run


def decontaminate(
    problems: Sequence[Problem], heldout: Mapping[str, Sequence[Problem]], *, common: int = COMMON
) -> tuple[list[Problem], list[Pair], list[Pair]]:
    """Training problems that no held-out set asks, and the pairs that the others were dropped for.

    Args:
      problems: for training, each listed once (`deduplicate`), or repeats would count as phrasing.
      heldout: problems of evaluation by the name of their set.
      common: in how many problems, of all given, a run of words may stand and still be evidence.

    Returns:
      The clean problems in order; every pair of a dropped one with a held-out one; every pair of a clean
      one with a held-out one that would hold if phrasing were evidence.
    """
    asked = [(name, problem) for name, problems_ in heldout.items() for problem in problems_]
    kept_out = [(name, problem, symbols(problem.prompt), words(problem.prompt)) for name, problem in asked]
    trained = [(symbols(problem.prompt), words(problem.prompt)) for problem in problems]
    rare, often = _suspects(trained, kept_out, common)
    clean, pairs, waived = [], [], []
    for index, problem in enumerate(problems):
        found, phrased = [], []
        for at in sorted({*rare.get(index, ()), *often.get(index, ())}):
            name, other, s, w = kept_out[at]
            answers_agree = problem.answer.strip() == other.answer.strip()
            phrasing = often.get(index, {}).get(at, set())
            match = _match(*trained[index], s, w, rare.get(index, {}).get(at, ()))
            if match is None and WORDS in phrasing and _covered(trained[index][1], w) >= COPIED:
                match = f"{WORDS}-gram", _fragment(trained[index][1], w)
            if match:
                found.append(Pair(problem.id, other.id, name, *match, answers_agree))
            elif match := _match(*trained[index], s, w, phrasing):
                phrased.append(Pair(problem.id, other.id, name, *match, answers_agree))
        pairs += found
        if not found:
            clean.append(problem)
            waived += phrased
    return clean, pairs, waived


def _suspects(trained: Sequence, kept_out: Sequence, common: int) -> tuple[Suspects, Suspects]:
    """Pairs that share runs of 13 or 7 words, or 8 symbols: those of evidence, and of phrasing."""
    suspects: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    phrased: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for kind, part, limit in ((WORDS, 1, common), (NEAR_WORDS, 1, common), (CONTAINED_SYMBOLS, 0, None)):
        where = defaultdict(set)
        for at, row in enumerate(kept_out):
            for run in _runs(row[2 + part], kind):
                where[run].add(at)
        shared = [[run for run in set(_runs(row[part], kind)) if run in where] for row in trained]
        often = Counter(run for runs in shared for run in runs)
        for index, runs in enumerate(shared):
            for run in runs:
                is_rare = limit is None or often[run] + len(where[run]) <= limit
                for at in where[run]:
                    (suspects if is_rare else phrased)[index][at].add(kind)
    # Texts too short for any run are equal or nothing.
    by_symbols = defaultdict(list)
    for at, row in enumerate(kept_out):
        by_symbols[row[2]].append(at)
    for index, (key, _) in enumerate(trained):
        for at in by_symbols.get(key, ()):
            _ = suspects[index][at]
    return suspects, phrased


def _match(
    s: tuple[str, ...], w: list[str], other_s: tuple[str, ...], other_w: list[str], kinds: Collection[int]
) -> tuple[str, str] | None:
    """The first rule that holds of two problems, with the fragment that shows it."""
    if s == other_s:
        return "equal", " ".join(s)
    short, long = sorted((s, other_s), key=len)
    if (
        CONTAINED_SYMBOLS in kinds
        and len(short) >= CONTAINED_SYMBOLS
        and short in set(_runs(long, len(short)))
    ):
        return "contained", " ".join(short)
    if WORDS in kinds:
        return f"{WORDS}-gram", _fragment(w, other_w)
    size = len(w) + len(other_w)
    if NEAR_WORDS in kinds and 2 * min(len(w), len(other_w)) >= NEAR_RATIO * size:
        matcher = difflib.SequenceMatcher(None, w, other_w, autojunk=False)
        if matcher.ratio() >= NEAR_RATIO:
            return "near", _fragment(w, other_w)
    return None


def _covered(w: list[str], other_w: list[str]) -> float:
    """Share of another problem's words that stand in runs of 13 which both have."""
    have = set(_runs(w, WORDS))
    starts = [at for at, run in enumerate(_runs(other_w, WORDS)) if run in have]
    return len({at + place for at in starts for place in range(WORDS)}) / len(other_w)


def _fragment(a: list[str], b: list[str]) -> str:
    longest = difflib.SequenceMatcher(None, a, b, autojunk=False).find_longest_match()
    return " ".join(a[longest.a : longest.a + longest.size])


def _runs(symbols_: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(symbols_[at : at + length]) for at in range(len(symbols_) - length + 1)]
