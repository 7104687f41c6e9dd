"""Compute the loss of a model, for steps and for evaluations.

``module``          wraps a model and its loss into one module that returns sums and weights per row
``captured``        defines the operator that represents the loss of label tokens in a captured program
``evaluation_mode`` keeps a model unchanged between two evaluations
``evaluation``      averages loss and metrics over a set, batch by batch
"""
