"""Turn rows of data into examples, batches, losses and metrics.

``rows``           reads data files
``resolve``        determines the task from options and data
``classification`` defines classification by a head, label words or label names
``lm``             defines language modelling
``forms``          turns a classification into a loss
``templates``      renders rows as text
``batches``        pads token lists into batches
``loading``        loads models from a folder or the hub
``adapted``        loads adapters on the base that they were tuned on
``shapes``         builds a model and a batch without values
"""
