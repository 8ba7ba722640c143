"""Imports run one way only: a module may import from its own level and from those before it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = [
    "ops config flops batch json_form recipe allocator chips distributed hlo threads storage lease",
    "sharding run_directory data",
    "model metrics",
    "loss optim telemetry",
    "training",
    "checkpoint folder evaluation generate aot merge",
    "language_model branch __init__",
    "convert routing_drift",
    "train eval",
]
# These import from the first level only, and not one another.
LEAVES = ["run_directory", "data"]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
FILES = sorted(
    path
    for path in [*ROOT.glob("jmoe/**/*.py"), *ROOT.glob("*.py")]
    if ROOT / "jmoe" in path.parents or path.stem in LEVEL
)


def place(parts: tuple[str, ...]) -> str:
    """jmoe/model/moe.py, jmoe.model.moe and train.py → model, model, train: the name that stands in the table."""
    return (parts[1:] or ("__init__",))[0] if parts[0] == "jmoe" else parts[0]


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it; `from jmoe import x` counts as jmoe.x."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import; write it in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = place(path.relative_to(ROOT).with_suffix("").parts)
    assert own in LEVEL, f"{path.name} is in no level of tests/test_imports.py: put {own} where it belongs"
    for name in imported(path):
        top, *_ = parts = tuple(name.split("."))
        assert top not in ("configs", "tests", "benchmarks", "train", "eval"), f"{own} imports {name}"
        if top == "jmoe":
            other = place(parts)
            assert other in LEVEL, f"{own} imports {name}, which is in no level of tests/test_imports.py"
            limit = 0 if own in LEAVES else LEVEL[own]
            assert other == own or LEVEL[other] <= limit, f"{own} imports {name}, which stands after it"
