"""Numbers: pure functions that give the same bits on every device.

``noise``    the counter-based generator of all directions
``rounding`` 16-bit numbers from float32 ones, stochastically or to the nearest
``codes``    integer codes: how a weight is read from them, and how a change of it is written
``dtypes``   floating-point types by name, and how the 16-bit ones are treated
"""
