"""Imports run one way, and the method knows arrays alone."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "opd_jax"
ORDER = ["method", "model", "tasks", "rollout", "evaluate", "train", "plan", "study"]
# Single files that any folder may use.
SHARED = set("types errors files keys named config consistency settings backend interrupt processes".split())


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_run_one_way():
    for file in PACKAGE.rglob("*.py"):
        folder = file.relative_to(PACKAGE).parts[0]
        if folder not in ORDER:
            continue
        allowed = set(ORDER[: ORDER.index(folder) + 1]) | SHARED
        used = {n.split(".")[1] for n in imported(file) if n.startswith("opd_jax.")}
        assert used <= allowed, f"{file} imports {used - allowed}"


def test_the_method_imports_jax_alone():
    for file in (PACKAGE / "method").glob("*.py"):
        outside = {n.split(".")[0] for n in imported(file)} - {
            "opd_jax",
            "__future__",
            "collections",
            "inspect",
            "typing",
        }
        assert outside <= {"jax"}, f"{file} imports {outside}"
        inside = {n.split(".")[1] for n in imported(file) if n.startswith("opd_jax.")}
        assert inside <= {"method", "types"}, f"{file} imports {inside}"


def test_shared_files_are_leaves():
    for name in SHARED:
        used = {n.split(".")[1] for n in imported(PACKAGE / f"{name}.py") if n.startswith("opd_jax.")}
        assert used <= SHARED
