"""A wrapped model and everything that it keeps from step to step.

``zo_model``    ``ZOModel``: step, accumulate, update, replay, state
``wrapped``     its parts, as the neighbours below use them
``inputs``      a step's batch and losses, checked
``accumulator`` sums over micro-batches
``result``      what a step returns, and its line of the journal
``schedule``    the points that are evaluated together
``state``       its state, collected, checked and applied
``choice``      the engine for a run of few steps
``cuda_graphs`` steps captured once and replayed
``inspect``     a report of the parameters that move and of the costs
"""
