"""The loss of a model, as it is captured, evaluated and averaged.

``module``          a model and its loss as one module; rows, weights and heads
``captured``        the operator that stands for it while a model is captured
``evaluation_mode`` nothing changes between two evaluations
``evaluation``      loss and metrics over a set, batch by batch
"""
