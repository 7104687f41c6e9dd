"""A step: its options, the parameters that move, their directions, and the arithmetic around a rule.

``parameters``      which parameters move, and their names
``blocks``          which of them move together
``pretrained``      the part of a model that is saved
``directions``      laws of directions
``lowrank``         directions that are products of thin factors
``arithmetic``      conclusion, update and rounding, run by both engines
``job``             all that an engine needs to know, and what an engine does
``step_directions`` the directions of one step
"""
