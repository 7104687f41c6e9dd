"""Passes: each turns one program into another, and is one small file.

The order (``zowrap.passes.build`` runs them):

1. ``strip_training``   drop dropout, run-time assertions and aliases
2. ``check_lookups``    look-ups on a CPU report an index out of range instead of ending the process
3. ``select_tunable``   each tunable weight → ``perturb(weight, key, coefficients)``
4. ``split_streams``    one evaluation → one stream per point; what no perturbation reaches stays single
5. ``perturb``          matrices, embeddings: the perturbed weight is never formed
6. ``lower_quantized``  the points of a step share one product of each quantised weight
7. ``epilogue``         the update rule, the only place that writes weights

After each the manager verifies the program and keeps its text, so ``inspect`` can show what every pass did.
"""

from zowrap.passes.build import build
from zowrap.passes.manager import Pass, run

__all__ = ["Pass", "build", "run"]
