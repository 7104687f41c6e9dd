"""Measure a training step against two plain forwards, for the tables of ``docs/performance.md``.

    python -m benchmarks.performance step         all rows of `zowrap bench step` at 8 × 64 tokens
    python -m benchmarks.performance long         the main row at 8 × 256 tokens
    python -m benchmarks.performance starts       first and second start and peak of each row, in separate processes
    python -m benchmarks.performance profile      seconds by kind of work, two forwards and a step
    python -m benchmarks.performance growth       growth with parameters, tokens, queries and blocks
    python -m benchmarks.performance operators    the noise, the chunked products, and alternatives
    python -m benchmarks.performance docs         the page, from the JSON of the others

Each command replaces its file, with the rows given by ``--rows``; the page names the rows of ``zowrap bench step`` that
the file of ``step`` lacks. ``starts`` measures all three figures of every row; a row of its file with only a peak was
added by hand, from ``zowrap bench step --only ROW --json``. Nothing else may run on the machine meanwhile.
"""
