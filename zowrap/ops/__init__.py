"""The operators of a step, registered as ``torch.ops.zowrap`` when their files are imported (``all`` imports all).

Operators:

``perturb``         perturbed weights and products
``lookups``         embeddings and other look-ups
``head``            a vocabulary head with its cross-entropy
``update``          the write of the epilogue
``vmap_forms``      forms for one example at a time
``int8``            products of quantised weights
``codes``           integer codes that move

What they are made of:

``arguments``       arguments that belong together
``points``          arguments that differ from point to point
``kernels``         the kernels of a run, by the key that programs name them by
``perturb_kernels`` noise, direction and perturbation in one loop
``update_kernels``  the rule's update in one loop
``loops``           functions over elements, compiled once for all lengths
``scratch``         the buffers that they keep
``triton``          their counterparts on an NVIDIA GPU
"""
