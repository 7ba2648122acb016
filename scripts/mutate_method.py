"""Break `opd_jax/method` in many small ways and see whether its tests notice.

    .venv/bin/python scripts/mutate_method.py --count 120 --seed 0

Mutants are drawn from all places of the package where one of the kinds below applies, each kind about
equally often. Each is tried in a copy of the project: first the tests and examples of its own module, then
all of the method's. Writes docs/mutations.md: what was caught, and every survivor with its reason.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import copy
import dataclasses
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHOD = Path("opd_jax") / "method"

# Mutants that change nothing a test could see, by file, honest line of code and what the mutant has there.
REASONS: dict[tuple[str, str, str], str] = {
    ("bounds.py", "_WIDEST = 110.0", "111.0"): "any bracket wider than the logarithms of float32 does",
    ("bounds.py", "_HALVINGS = 40", "41"): "past 40 halvings float32 holds nothing between the ends",
    (
        "bounds.py",
        "middle = 0.0 * count  # of the counts, as under shard_map a bracket must vary as they do",
        "1.0",
    ): "any bracket wider than the logarithms of float32 does",
    (
        "bounds.py",
        "log_tau = _bisect(excess, jnp.full_like(mean, -30.0), jnp.full_like(mean, 30.0))",
        "31.0",
    ): "any bracket that holds the answer does",
    (
        "sequence_weights.py",
        "sets = 2 * mask.size",
        "3",
    ): "a larger table holds the same sets",
    (
        "segments.py",
        "return reduce(values, segments, num_segments=values.shape[0] + 1)[segments]",
        "2",
    ): "one more place that nothing is in",
    ("segments.py", "values = jnp.where(inside, values, 0)", "1"): "any finite number does: it is dropped",
    (
        "segments.py",
        "return 0 * jnp.sum(mask, axis=1)",
        "1",
    ): "the first token of a response opens a span, whatever the scan starts from",
    (
        "divergences.py",
        "difference = jnp.where(there, log_a, 0.0) - jnp.where(there, log_b, 0.0)",
        "1.0",
    ): "any finite number does: it is multiplied by exp(-inf) = 0",
    (
        "diagnostics.py",
        "same = jnp.any(ids_a[..., :, None] == ids_b[..., None, :], axis=-1)",
        "2",
    ): "ids of a set are distinct, so those in common are as many from either side",
    (
        "weights.py",
        "low, high = jax.lax.pmin(low, axis_name), jax.lax.pmax(high, axis_name)",
        "jax.lax.pmax(low, axis_name)",
    ): "the score is 1 - (1 - h)(1 - k), and the low end scales 1 - h alone, which changes no order",
    (
        "bounds.py",
        "beyond = beyond / jnp.where(drifts, mean, 1.0)",
        "2.0",
    ): "any number but zero does: the result is 0 where nothing drifts",
    (
        "segments.py",
        "start = jax.lax.cummax(jnp.where(first, position, -1), axis=1)",
        "2",
    ): "any number below 0 says that no response has begun",
    (
        "bounds.py",
        "log_w = jnp.where(w > 0, jnp.log(jnp.where(w > 0, w, 1.0)), -jnp.inf)",
        "2.0",
    ): "any number above 0 does: its logarithm is not taken",
    (
        "gates.py",
        "return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)",
        "2.0",
    ): "any number above 0 does: its root is not taken",
    ("arithmetic.py", "return jnp.where(some, total / jnp.where(some, count, 1), 0.0)", "2"): (
        "any number but zero does: what it divides is not taken"
    ),
    (
        "losses.py",
        "SMALLEST_LOGPROB = -1e5",
        "100001.0",
    ): "exp of either is 0, and what it multiplies is 0 too",
    (
        "losses.py",
        "return jnp.where(some, jnp.log(-jnp.expm1(jnp.where(some, inside, -1.0))), jnp.log(SMALLEST_TAIL))",
        "2.0",
    ): "any number below 0 does: what is made of it is not taken",
    (
        "weights.py",
        "same = jnp.any(student_ids[..., :, None] == teacher_ids[..., None, :], axis=-1)",
        "2",
    ): "ids of a set are distinct, so those in common are as many from either side",
    (
        "diagnostics.py",
        "WEIGHT_EDGES = (*(1 - x for x in reversed(_STEPS) if x < 1), *(1 + x for x in _STEPS))",
        "x <= 1",
    ): "no step is 1",
}

SWAPPED_CALLS = {
    "minimum": "maximum",
    "maximum": "minimum",
    "min": "max",
    "max": "min",
    "psum": "pmax",
    "pmin": "pmax",
    "segment_sum": "segment_max",
    "segment_max": "segment_sum",
    "log1p": "log",
    "expm1": "exp",
    "abs": "square",
    "cummax": "cumsum",
}
SWAPPED_OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One small change of one file."""

    file: str
    line: int
    text: str  # of that line
    kind: str
    before: str
    after: str
    source: str  # of the whole file after the change


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every (kind, replacement) of one node."""
    if isinstance(node, ast.BinOp | ast.Compare):
        operator = node.op if isinstance(node, ast.BinOp) else node.ops[0]
        if type(operator) in SWAPPED_OPERATORS:
            new = copy.deepcopy(node)
            other = SWAPPED_OPERATORS[type(operator)]()
            if isinstance(new, ast.BinOp):
                new.op = other
            else:
                new.ops = [other]
            yield "sign or operator", new
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert):
        yield "sign or operator", node.operand
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "index or constant", ast.Constant(node.value + 1)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "index or constant", ast.Constant(not node.value)
    if isinstance(node, ast.Call):
        name = name_of(node)
        if name in ("stop_gradient",):
            yield "missing detach", node.args[0]
        if name == "masked" or (name == "where" and len(node.args) == 3):
            if name == "where":
                yield "missing mask", node.args[1]
            elif name == "masked":
                yield "missing mask", node.args[0]
        if name in ("psum", "pmin", "pmax", "all_gather"):
            yield "wrong denominator or axis", node.args[0]
        if name in SWAPPED_CALLS:
            new = copy.deepcopy(node)
            if isinstance(new.func, ast.Attribute):
                new.func.attr = SWAPPED_CALLS[name]
            else:
                new.func = ast.Name(SWAPPED_CALLS[name])
            yield "other function", new
        for index, keyword in enumerate(node.keywords):
            if keyword.arg == "axis" and isinstance(keyword.value, ast.Constant | ast.UnaryOp):
                new = copy.deepcopy(node)
                here = ast.literal_eval(keyword.value)
                new.keywords[index].value = ast.Constant(0 if here in (1, -1) else 1)
                yield "wrong denominator or axis", new


class Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, new: ast.AST) -> None:
        self.target, self.new = target, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.target else super().generic_visit(node)


def mutants(file: Path) -> Iterator[Mutant]:
    """Every mutant of one file; signatures, messages of errors and names of modules are left alone."""
    source = file.read_text()
    tree, lines = ast.parse(source), source.splitlines()
    for function in [
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.Assign | ast.AnnAssign)
    ]:
        if not isinstance(function, ast.FunctionDef) and function not in tree.body:
            continue
        body = function.body if isinstance(function, ast.FunctionDef) else [function]
        for statement in body:
            yield from _of_statement(statement, tree, file, lines)


def _of_statement(statement: ast.stmt, tree: ast.Module, file: Path, lines: list[str]) -> Iterator[Mutant]:
    skipped: set[ast.AST] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Raise | ast.FunctionDef) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            skipped |= set(ast.walk(node))
        if isinstance(node, ast.AnnAssign):
            skipped |= set(ast.walk(node.annotation))
        if isinstance(node, ast.If) and any(isinstance(n, ast.Raise) for n in node.body):
            skipped |= set(ast.walk(node.test))
    for node in ast.walk(statement):
        if node in skipped or not hasattr(node, "lineno"):
            continue
        for kind, new in changes(node):
            changed = Replace(node, ast.copy_location(new, node)).visit(copy_tree(tree, node))
            yield Mutant(
                file=file.name,
                line=node.lineno,
                text=lines[node.lineno - 1].strip(),
                kind=kind,
                before=ast.unparse(node),
                after=ast.unparse(new),
                source=ast.unparse(ast.fix_missing_locations(changed)),
            )


def copy_tree(tree: ast.Module, keep: ast.AST) -> ast.Module:
    """A deep copy in which one node stays itself, to be found."""
    return copy.deepcopy(tree, {id(keep): keep})


def drawn(count: int, seed: int) -> list[Mutant]:
    """Mutants, the kinds in turn; none that reads like another."""
    by_kind: dict[str, list[Mutant]] = defaultdict(list)
    for file in sorted((ROOT / METHOD).glob("*.py")):
        seen = set()
        for mutant in mutants(file):
            if mutant.source not in seen:
                seen.add(mutant.source)
                by_kind[mutant.kind].append(mutant)
    rng = random.Random(seed)
    for found in by_kind.values():
        rng.shuffle(found)
    chosen: list[Mutant] = []
    while len(chosen) < count and any(by_kind.values()):
        for found in by_kind.values():
            if found and len(chosen) < count:
                chosen.append(found.pop())
    return chosen


def caught_by(mutant: Mutant, copies: Path) -> str | None:
    """Which test run noticed a mutant; None if none did."""
    folder = copies / f"worker-{os.getpid()}"
    if not folder.exists():
        ignored = shutil.ignore_patterns(".git", ".venv*", "runs", ".jax_cache", "__pycache__", "models")
        shutil.copytree(ROOT, folder, ignore=ignored)
        shutil.copytree(ROOT / "opd_jax/lab/models", folder / "opd_jax/lab/models")
    target = folder / METHOD / mutant.file
    honest = target.read_text()
    target.write_text(mutant.source)
    env = {**os.environ, "PYTHONPATH": str(folder), "JAX_COMPILATION_CACHE_DIR": str(copies / "cache")}
    module = mutant.file.removesuffix(".py")
    own = [
        p for p in (f"tests/method/test_{module}.py", f"opd_jax/method/{module}.py") if (folder / p).exists()
    ]
    try:
        for paths in (own, ["tests/method", "opd_jax/method"]):
            options = ["-n0", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "not oracle"]
            command = [sys.executable, "-m", "pytest", *options, *paths]
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return (failed or ["FAILED"])[0].split(" - ")[0].removeprefix("FAILED ")
    finally:
        target.write_text(honest)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    chosen = drawn(arguments.count, arguments.seed)
    with tempfile.TemporaryDirectory() as copies:
        jobs = [(mutant, Path(copies)) for mutant in chosen]
        with concurrent.futures.ProcessPoolExecutor(arguments.workers) as pool:
            results = []
            for mutant, found in zip(chosen, pool.map(caught_by, *zip(*jobs, strict=True)), strict=True):
                results.append((mutant, found))
                print(f"{'caught  ' if found else 'SURVIVED'} {mutant.file}:{mutant.line} {mutant.kind}: "
                      f"{mutant.before}  ->  {mutant.after}", flush=True)  # fmt: skip
    write(results, arguments.seed)


def write(results: list[tuple[Mutant, str | None]], seed: int) -> None:
    """Write docs/mutations.md."""
    caught = [mutant for mutant, found in results if found]
    same = [m for m, found in results if not found and (m.file, m.text, m.after) in REASONS]
    telling = [mutant for mutant, _ in results if mutant not in same]
    kinds = sorted({mutant.kind for mutant, _ in results})
    lines = [
        "# Mutations of the method",
        "",
        f"`scripts/mutate_method.py --count {len(results)} --seed {seed}`: {len(caught)} of {len(results)} "
        f"caught ({100 * len(caught) / len(results):.1f} %); of the {len(telling)} that change a result, "
        f"{100 * len(caught) / len(telling):.1f} %.",
        "",
        "| kind | mutants | caught |",
        "|---|---|---|",
    ]
    for kind in kinds:
        of_kind = [found for mutant, found in results if mutant.kind == kind]
        lines.append(f"| {kind} | {len(of_kind)} | {sum(bool(found) for found in of_kind)} |")
    lines += ["", "Survivors:", "", "| where | before | after | why |", "|---|---|---|---|"]
    for mutant, found in results:
        if not found:
            why = REASONS.get((mutant.file, mutant.text, mutant.after), "unexplained")
            cells = (f"`{mutant.file}:{mutant.line}`", f"`{mutant.before}`", f"`{mutant.after}`", why)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "mutations.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
