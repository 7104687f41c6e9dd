"""Golden runs: short trainings of many kinds, and the digests of all that they compute.

A change that is to alter no number leaves every digest as it is. ``python -m tests.golden`` runs all of them and says
what differs; ``--write`` renews ``digests.json`` after a change that is meant to alter numbers.
"""
