"""Rooms import downwards only, and files do not import in circles.

Deferred imports and those for type checkers count: an arrow is an arrow.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up. A room may import the rooms before it, and itself.
ROOMS = (
    *("errors", "version", "names", "telling", "checks", "machine", "custom_op"),
    *("numerics", "rules", "loss", "step", "compiler", "ops", "passes", "quant", "storage"),
    *("engines", "analysis", "model", "wrap", "calibration", "tasks", "training", "testing", "bench", "cli"),
)
FACADE = "zowrap"  # zowrap/__init__.py: lazy names of everything, imported by bench and cli alone
ALLOWED = {
    ("quant", "calibration"),  # zowrap.quant.noise_floor, a documented name, is forwarded when asked for
    ("quant", "storage"),  # zowrap.quant.load_options likewise
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for folder, package in (("zowrap", "zowrap"), ("passes", "zowrap.passes"), ("cli", "zowrap.cli")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def arrows(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The modules of ours that a file imports, wherever in it, and the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in inner]
        for name in names:
            if name in known:
                yield name, node.lineno


def room_of(module: str) -> str:
    return [*module.split("."), FACADE][1]


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components of more than one node (Tarjan)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            component = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(component)

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found


def test_every_file_has_a_room() -> None:
    assert {room_of(module) for module in modules()} - {FACADE} <= set(ROOMS)


def test_rooms_import_downwards() -> None:
    known, wrong = modules(), []
    for module, path in known.items():
        room = room_of(module)
        if room == FACADE:
            continue
        for other, line in arrows(path, known):
            where = f"{path.relative_to(ROOT)}:{line}"
            above = room_of(other)
            if above == FACADE:
                if room not in ("bench", "cli"):
                    wrong.append(f"{where} {room} imports the facade")
            elif ROOMS.index(above) > ROOMS.index(room) and (room, above) not in ALLOWED:
                wrong.append(f"{where} {room} -> {above}")
    assert not wrong, "\n".join(wrong)


def test_one_file_knows_the_trainer() -> None:
    """The files of a run, its start and its learning rate are given values: they can be used without a Trainer."""
    for module, path in modules().items():
        if module.startswith("zowrap.training.") and module != "zowrap.training.trainer":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
            assert not names & {"Trainer", "ZOTrainer"}, module


def test_files_do_not_import_in_circles() -> None:
    known = modules()
    graph = {module: {other for other, _ in arrows(path, known)} - {module} for module, path in known.items()}
    del graph[FACADE]  # imports everything, by its nature
    graph = {module: others - {FACADE} for module, others in graph.items()}
    assert circles(graph) == []


def test_the_private_members_of_a_wrapped_model_are_read_in_its_room_only() -> None:
    """By any name that ends in ``zm``; tests read the public facts as well."""
    folders = [ROOT / name for name in ("zowrap", "passes", "cli", "benchmarks", "tests", "examples")]
    wrong = []
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        if path.is_relative_to(ROOT / "zowrap" / "model"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
                if owner.endswith("zm"):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {owner}.{node.attr}")
    assert not wrong, "\n".join(wrong)
