"""Measure the accuracy, loss and memory of every mode of tuning a quantised model.

    python -m benchmarks.quantized run --data-dir DATA            the missing cells of MiniLM on TREC (minutes each)
    python -m benchmarks.quantized run --data-dir DATA --lm DIR   language modelling of SST-2's sentences by a model
    python -m benchmarks.quantized memory                         the peak memory of a step (a minute per form)
    python -m benchmarks.quantized noise --data-dir DATA          the rounding of 8-bit activations at several ε
    python -m benchmarks.quantized floor                          the noise of rounded codes on a quadratic (a minute)
    python -m benchmarks.quantized sixteen                        16-bit weights on a quadratic (minutes)
    python -m benchmarks.quantized docs                           docs/quantized.md from the committed figures

``forms``       lists the rows of the tables: how the weights are held and how they move
``cells``       runs a form on a task
``memory``      measures the peak memory of a step
``code_noise``  measures the noise of rounded codes on a quadratic
``sixteen_bit`` compares ways to round 16-bit weights on a quadratic
``results``     reads and writes the figures in ``benchmarks/results``
``report``      writes docs/quantized.md

A cell is a run of 2,400 forward passes on TREC, or 600 of language modelling. Its learning rate is the one of the grid
with the best dev accuracy (loss) of seed 0; nothing was chosen on the test rows.
"""
