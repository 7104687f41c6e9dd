"""Turn rows of data into examples, batches, losses and metrics.

``rows``           reads data files
``tables``         reads CSV and TSV text
``labels``         reads labels, and collects the classes of a column
``resolve``        determines the task from options and data
``classification`` defines classification by a head, label words or label names
``heads``          finds out which head a checkpoint has, and which class a label means
``lm``             defines language modelling
``chat``           finds the assistant's turns in a rendered chat
``encoding``       turns text into tokens that the model knows
``forms``          turns a classification into a loss
``templates``      renders rows as text
``batches``        pads token lists into batches
``loading``        loads models from a folder or the hub
``adapted``        loads adapters on the base that they were tuned on
``shapes``         builds a model and a batch without values
"""
