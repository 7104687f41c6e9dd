"""A wrapped model and everything that it keeps from step to step.

``zo_model``    ``ZOModel``: step, accumulate, update, replay, state
``accumulator`` sums over micro-batches
``schedule``    which points are evaluated together
``state``       whether a saved state belongs to this model
``choice``      which engine a run of few steps gets
``cuda_graphs`` steps recorded once and replayed
``inspect``     what moves, how, and at what cost
"""
