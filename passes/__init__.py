"""Passes: each turns one program into another, and is one small file.

The order (``zowrap.passes.build`` runs them):

1. ``strip_training``   drop dropout, run-time assertions and aliases
2. ``select_tunable``   each tunable weight → ``perturb(weight, key, coefficients)``
3. ``split_streams``    one evaluation → one stream per point; what no perturbation reaches stays single
4. ``perturb``          matrices, embeddings: the perturbed weight is never formed
5. ``epilogue``         the update rule, the only place that writes weights

After each the manager verifies the program and keeps its text, so ``inspect`` can show what every pass did.
"""

from zowrap.passes.build import build
from zowrap.passes.manager import Pass, run

__all__ = ["Pass", "build", "run"]
