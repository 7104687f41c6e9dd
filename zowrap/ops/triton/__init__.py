"""What runs on an NVIDIA GPU in place of the C++ loops: Triton kernels behind the same operators.

``emit``           an elementwise function, traced as for a CPU, written as Triton
``loops``          kernels over the elements of a parameter: perturbation, touched rows, and every rule's update
``product``        one read of a weight feeds the products of all points, for batches of few tokens
``cross_entropy``  one chunk of logits into the running logsumexp

The loops are written from the very functions that the eager engine runs, rounding after every operation as a CPU does,
so noise, perturbed weights and updates have the same bits on both. Nothing here is imported without a GPU, or Triton's
interpreter (``TRITON_INTERPRET=1``) in the tests.
"""
