"""Passes: each turns one program into another, and is one small file.

The order (``zowrap.passes.build`` runs them):

1. ``strip_training``   drop dropout, run-time assertions and aliases
2. ``check_lookups``    look-ups on a CPU report an index out of range instead of ending the process
3. ``fuse_head``        a vocabulary head and its cross-entropy → one operator that never holds the logits
4. ``select_tunable``   each tunable weight → ``perturb(weight, key, coefficients)``
5. ``split_streams``    one evaluation → one stream per point; what no perturbation reaches stays single
6. ``perturb``          matrices, embeddings: the perturbed weight is never formed
   ``perturb_lowrank``  in its place along low-rank directions: thin products beside the plain ones
7. ``lower_quantized``  of quantised models: the points of a step share one product of each quantised weight
8. ``population``       of populations: every example along a direction of its own
9. ``epilogue``         the update rule, the only place that writes weights

The plain loss at θ takes the first three alone. After each the manager verifies the program and keeps its text, so
``inspect`` can show what every pass did.
"""

from zowrap.passes.build import build
from zowrap.passes.manager import Pass, run

__all__ = ["Pass", "build", "run"]
