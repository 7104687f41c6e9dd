"""Measure a training step against two plain forwards, for the tables of ``docs/performance.md``.

    python -m benchmarks.performance step         all rows of `zowrap bench step` at 8 × 64 tokens
    python -m benchmarks.performance long         the main row at 8 × 256 tokens
    python -m benchmarks.performance starts       first and second start and peak of each row, in processes of their own
    python -m benchmarks.performance profile      seconds by kind of work, two forwards and a step
    python -m benchmarks.performance growth       parameters, tokens, queries and blocks, each by itself
    python -m benchmarks.performance operators    what the noise and the chunked products cost, and what else was tried
    python -m benchmarks.performance docs         the page, from the JSON of the others

Each writes its file anew, with the rows that it was asked for (``--rows``); the page names the rows of ``zowrap bench
step`` that a file lacks. ``starts`` gives every row all three figures: a row of its file that holds a peak alone was
put there by hand, and ``zowrap bench step --only ROW --json`` measures such a peak again, in one process. Nothing else
may run on the machine's cores meanwhile.
"""
