"""Compile the loss of a model to machine code.

``capture``     captures the loss as a program for every batch size and length
``recurrent``   captures recurrent layers as a single operator
``scans``       captures loops over positions as a single operator
``experts``     captures experts that are modules of their own
``conversions`` captures forwards that convert a module to another dtype
``masks``       captures attention masks that models make themselves
``pictures``    captures the features of any number of pictures
``lengths``     captures ``len(tensor)`` as a size
``program``     defines programs, and the invariants they keep
``guards``      decides which batches a captured program is valid for
``regions``     compiles repeated layers once
``inductor``    calls torch's Inductor
``cache``       keeps compiled code between processes
"""
