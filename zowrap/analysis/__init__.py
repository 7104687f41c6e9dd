"""What a step costs, without running it.

``operators`` what single operators compute, draw and hold
``region``    memory and work of one region
``program``   of a whole program at the sizes of a batch
``costs``     of a step, beside two plain forwards
``html``      a program as a page
"""
