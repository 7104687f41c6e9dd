"""What a row of data becomes, and what is computed from it.

``rows``           reading data files
``resolve``        the task that options and data describe
``classification`` classes: by a head, label words or label names
``lm``             language modelling
``forms``          how a classification becomes a loss
``templates``      rows as text
``batches``        token lists as batches
``loading``        models, from a folder or the hub
``adapted``        adapters on the base that they were tuned on
``shapes``         a batch's shapes, without weights
"""
