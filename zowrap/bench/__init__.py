"""Measure training steps, for ``zowrap bench step``.

``architectures``  builds models by name, with random weights
``contenders``     builds the steps to compare: plain forwards, the classic MeZO step and zowrap's
``measure``        measures times and peak memory
``rule_memory``    measures the memory that rules hold between steps
"""
