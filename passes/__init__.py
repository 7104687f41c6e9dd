"""Passes. Each rewrites the program in one way and has one small file.

``zowrap.passes.build`` runs them in this order:

1. ``strip_training``   remove dropout, run-time assertions and aliases
2. ``check_lookups``    make look-ups on a CPU report an index out of range instead of ending the process
3. ``fuse_head``        fuse a vocabulary head and its cross-entropy into one operator that never holds the logits
4. ``select_tunable``   replace each tunable weight by ``perturb(weight, key, coefficients)``
5. ``split_streams``    copy the evaluation for each point; the points share every node no perturbation reaches
6. ``perturb``          fuse the perturbation into matrix products and embeddings, without forming the perturbed weight
   ``perturb_lowrank``  used instead for low-rank directions: add thin products to the plain ones
7. ``lower_quantized``  quantised models only: compute each quantised product once for all points
8. ``population``       populations only: give every example its own direction
9. ``epilogue``         attach the update rule, the only place that writes weights

   ``residual``         residual credit only, after the first three: what the matrices that write to the stream need

The plain loss at θ needs only the first three. After each pass the manager verifies the program and keeps its text, so
``inspect`` can show the effect of every pass.
"""

from zowrap.passes.build import build
from zowrap.passes.manager import Pass, run

__all__ = ["Pass", "build", "run"]
