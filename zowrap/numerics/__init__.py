"""Pure functions over numbers. Those of tensors give the same bits on every device.

``noise``     generates the noise of all directions from counters
``rounding``  rounds float32 to 16-bit floats, stochastically or to nearest
``codes``     reads weights from integer codes and adds changes to them
``dtypes``    names the floating-point dtypes
``intervals`` computes confidence intervals and significance
"""
