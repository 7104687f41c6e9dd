"""The papers' experiments, one module and one command each: ``python -m benchmarks.papers E1``.

A module ``e1.py`` is an experiment when it has

    NAME, TITLE                      "E1" and one line
    add_arguments(parser)            its own options; ``--quick`` and ``--out`` are everybody's
    run(options) -> dict             settings, results and what to expect: ready for JSON
    plot(result, path)               one figure, SVG
    report(result) -> str            its section of docs/papers.md, made of the result alone

Results that the documentation shows are kept in ``benchmarks/results/papers``; ``python -m benchmarks.papers docs``
makes ``docs/papers.md`` and its figures of them.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from types import ModuleType

_EXPERIMENT = re.compile(r"e\d+|llm")


def experiments() -> dict[str, str]:
    """Names as the command line knows them (``E1``, ``llm``) → module names, in order."""
    found = sorted(m.name for m in pkgutil.iter_modules(__path__) if _EXPERIMENT.fullmatch(m.name))
    return {name if name == "llm" else name.upper(): name for name in found}


def load(name: str) -> ModuleType:
    """The module of the experiment ``name``."""
    return importlib.import_module(f"{__name__}.{experiments()[name]}")
