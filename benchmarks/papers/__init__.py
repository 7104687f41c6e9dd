"""Repeat the papers' experiments, with one module and one command each: ``python -m benchmarks.papers E1``.

A module ``e1.py`` is an experiment when it has

    NAME, TITLE                      "E1" and one line
    add_arguments(parser)            its own options; ``--quick`` and ``--out`` are common to all
    run(options) -> dict             settings, results and what to expect: ready for JSON
    plot(result, path)               one figure, SVG
    report(result) -> str            its section of docs/papers.md, from the result only

Results that the documentation shows are kept in ``benchmarks/results/papers``; ``python -m benchmarks.papers docs``
makes ``docs/papers.md`` and its figures from them.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from types import ModuleType

_EXPERIMENT = re.compile(r"e\d+|llm")


def list_experiments() -> dict[str, str]:
    """Map the names on the command line (``E1``, ``llm``) to module names, in order."""
    found = sorted(m.name for m in pkgutil.iter_modules(__path__) if _EXPERIMENT.fullmatch(m.name))
    return {name if name == "llm" else name.upper(): name for name in found}


def load_experiment(name: str) -> ModuleType:
    """Import the module of an experiment."""
    return importlib.import_module(f"{__name__}.{list_experiments()[name]}")
