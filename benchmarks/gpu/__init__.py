"""Measure steps on one NVIDIA GPU against plain forwards and first-order training, in one process.

    python -m benchmarks.gpu run [--tiny] [--case NAME …]   results/gpu/<gpu>.json (`make bench-gpu`)
    python -m benchmarks.gpu docs                           docs/gpu.md from those files

``--tiny`` uses an architecture of a few thousand weights, on any device, to exercise every row.
"""
