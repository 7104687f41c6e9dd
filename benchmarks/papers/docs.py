"""``docs/papers.md``: a section per experiment, made of the committed JSON alone: no number is typed by hand."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

from benchmarks.papers import experiments, load

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "papers"
PAGE = ROOT / "docs" / "papers.md"
FIGURES = ROOT / "docs" / "papers"

HEAD = """# The papers' experiments

Each section is one command, `python -m benchmarks.papers E1`, and is generated from the JSON that it wrote
(`benchmarks/results/papers`); `python -m benchmarks.papers docs` makes this page of them. "Expected" is what an
independent implementation or the paper gave, "obtained" is ours. ± is the standard deviation over seeds; a grid's best
cell is chosen by the mean over them. E1 to E5 advance many runs at once with the library's own rules and noise
(`benchmarks/papers/cells.py`; each run is held to `zo_wrap` by a test).
"""


def versions() -> dict[str, str]:
    """What a result was computed with."""
    import torch

    import zowrap

    return {"zowrap": zowrap.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def write_json(result: dict[str, Any], path: Path) -> None:
    """Indented, a list of numbers on one line; finite numbers only: a diverged run is ``null``."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[\n([^\[\]{}]*)\n\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")


def committed() -> dict[str, dict[str, Any]]:
    """The kept results by experiment name, in order."""
    paths = {name: RESULTS / f"{module}.json" for name, module in experiments().items()}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def page(results: dict[str, dict[str, Any]]) -> str:
    """The whole page; each section's figure is ``papers/<module>.svg``."""
    sections = [HEAD]
    for name, result in results.items():
        stem = experiments()[name]
        sections.append(f"{load(name).report(result).rstrip()}\n\n![{name}](papers/{stem}.svg)\n")
    return "\n".join(sections)


def write() -> None:
    """The page and its figures from the kept results."""
    results = committed()
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        load(name).plot(result, FIGURES / f"{experiments()[name]}.svg")
    PAGE.write_text(page(results), encoding="utf-8")
