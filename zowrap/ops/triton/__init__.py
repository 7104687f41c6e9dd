"""Triton kernels for NVIDIA GPUs, used by the same operators in place of the C++ loops.

``emit``           translates a traced elementwise function to Triton
``loops``          kernels over the elements of a parameter: perturbation, looked-up rows, and every rule's update
``product``        products at all points from one read of the weight, for batches of few tokens
``cross_entropy``  adds one chunk of logits to the running logsumexp
``sources``        loads and launches generated Triton

The loops are generated from the functions that the eager engine runs and round after every operation as a CPU does, so
noise, perturbed weights and updates have the same bits on both. This package is imported only on a GPU, or in tests
under Triton's interpreter (``TRITON_INTERPRET=1``).
"""
