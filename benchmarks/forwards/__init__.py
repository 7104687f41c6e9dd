"""How many forward passes each method needs, on the same tasks, batches and weights.

    python -m benchmarks.forwards run minilm-trec stories-sst2     # the runs that are missing, one after another
    python -m benchmarks.forwards docs                             # docs/forwards.md and its figures

Finished runs are lines of ``benchmarks/results/forwards/runs.jsonl``. Every method has a grid of half decades of η, and
MeZO two batch sizes; the lowest dev loss of seed 0 chooses, and the other seeds run at that setting. Test rows choose
nothing.
"""
