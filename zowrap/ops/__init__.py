"""The operators of a step, registered as ``torch.ops.zowrap`` when their files are imported (``all`` imports all).

``kernels``    the compiled loops behind them
``scratch``    the buffers that they keep
``perturb``    perturbed weights and products
``lookups``    embeddings and other look-ups
``head``       a vocabulary head with its cross-entropy
``update``     the write of the epilogue
``vmap_forms`` forms for one example at a time
``int8``       products of quantised weights
``codes``      integer codes that move
``triton``     their counterparts on an NVIDIA GPU
"""
