"""Measure, with forward passes before a run, how to set its options.

``learning_rate`` chooses the learning rate for ``lr='auto'``
``simulation``    simulates a rule on a quadratic
``noise_floor``   measures how small ε may be with 8-bit activations
"""
