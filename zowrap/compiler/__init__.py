"""From a model to machine code.

``capture``   a model's loss as a graph, for every batch and length
``recurrent`` recurrent layers as one operator of it
``program``   the graph with its inputs, and what must hold of it
``guards``    which batches it is good for
``regions``   repeated layers, compiled once
``inductor``  a thin layer over torch's Inductor
``cache``     compiled code kept between processes
"""
