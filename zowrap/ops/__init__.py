"""The operators of a step, registered as ``torch.ops.zowrap`` when their files are imported (``all`` imports them all).

Operators:

``perturb``         perturbed weights and products
``lookups``         embeddings and other look-ups
``head``            a vocabulary head with its cross-entropy
``update``          the epilogue's writes of weights
``vmap_forms``      torch operators with a rule for ``vmap``
``int8``            products with quantised weights
``codes``           products with tunable integer codes, and their update

Building blocks:

``arguments``       groups of operator arguments
``points``          arguments that may differ from point to point
``kernels``         the kernels of a run, looked up by key
``perturb_kernels`` noise, direction and perturbation in one loop
``update_kernels``  the rule's update in one loop
``loops``           elementwise functions, compiled once for all lengths
``scratch``         buffers that are reused from step to step
``triton``          kernels for NVIDIA GPUs
"""
