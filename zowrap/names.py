"""The names that options take. Torch is not imported here, so that a wrong name is told at once.

What a name stands for is built from its line here where it lives (:mod:`zowrap.rules`, :mod:`zowrap.rules.estimators`
…).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from zowrap.errors import ZOError, nearest

ENGINES = ("compiled", "eager")
MEMORY = ("auto", "paired", "sequential")
ESTIMATORS = ("central", "forward", "population", "grzo", "residual", "forward_gradient")
BLOCK_ORDERS = ("ascending", "descending", "flip_flop", "random_permutation", "random")
ALONG = ("drawn", "evaluated")
QUANT_MODES = ("scales", "codes", "adapters")
DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("same", "bf16", "fp32", "adapters", "merged")
TASKS = ("classification", "lm")
# Named selections of ``trainable``, and what each stands for.
SELECTIONS = {
    "values": "the value projections of attention, with queries and keys where one matrix makes them all",
    "late-values": "the value projections in the upper half of the layers",
    "norms": "the gains and biases of the norms",
    "biases": "every bias",
    "last:N": "the last N layers and what follows them, but no embeddings",
}
FORMS = ("sequence", "words", "sentence", "vectors")


class RuleLine(NamedTuple):
    """One line of the table of rules: what :class:`zowrap.rules.Entry` says of it."""

    paper: str
    memory: str
    forwards: str
    scale_free: bool


RULES: dict[str, RuleLine] = {
    "zo_sgd": RuleLine("2305.17333", "0 (momentum: 1)", "2q", False),
    "zo_rmsprop": RuleLine("1910.06513", "1", "2q", True),
    "zo_adam": RuleLine("1910.06513", "2", "2q", True),
    "zo_adamm": RuleLine("1910.06513", "3 (amsgrad=False: 2)", "2q", True),
    "radazo": RuleLine("2502.01014", "2", "2q", True),
    "meazo": RuleLine("2605.03869", "0", "2q", True),
    "conmezo": RuleLine("2511.02757", "1", "2q", False),
    "lozo": RuleLine("2410.07698", "0", "2q", False),
    "lozo_m": RuleLine("2410.07698", "0 (r columns per matrix)", "2q", False),
    "sparse_mezo": RuleLine("2402.15751", "0", "2q", False),
    "fzoo": RuleLine("2506.09034", "0", "q + 1", True),
    "hizoo": RuleLine("2402.15173", "1", "2q + 1", False),
}
RULE_ALIASES = {"mezo": "zo_sgd"}
RULES_OF_PACKAGES = "zowrap.rules"  # the group of entry points by which installed packages add theirs


def unknown_rule(name: str, known: Iterable[str]) -> ZOError:
    """What to raise for a rule that is none of ``known``."""
    hint = nearest(name, known)
    own = "" if "mean" in hint else "; a rule of your own must be registered first, on the command line by --plugin"
    return ZOError(f"unknown rule {name!r}{hint}{own}")


def python_file(plugin: str) -> Path | None:
    """The file that ``--plugin`` names; None where it names a module.

    Raises:
        ZOError: there is no such file.
    """
    path = Path(plugin)
    if path.is_file():
        return path
    if path.suffix == ".py":
        raise ZOError(f"--plugin {plugin}: there is no such file")
    return None
