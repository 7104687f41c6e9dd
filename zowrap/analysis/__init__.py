"""Compute the costs of a step without running it.

``operators`` the work, random numbers and memory of single operators
``region``    the memory and work of one region
``program``   the memory and work of a whole program at the sizes of a batch
``costs``     the costs of a step, compared with two plain forwards
``html``      draws a program as a web page
"""
