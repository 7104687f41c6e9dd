"""Measure steps on one NVIDIA GPU against plain forwards and first-order training, in one process.

    python -m benchmarks.gpu run [--tiny] [--case NAME …]   results/gpu/<gpu>.json (`make bench-gpu`)
    python -m benchmarks.gpu docs                           docs/gpu.md from those files

``--tiny`` takes an architecture of a few thousand weights instead, on whatever there is: it exercises every row.
"""
