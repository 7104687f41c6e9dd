"""Measuring a training step: ``zowrap bench step``.

``architectures``  models by name, with random weights
``contenders``     what is compared: plain forwards, the classic MeZO step, this library's
``measure``        times interleaved in one process, peak memory, machine
"""
