"""What is measured by forward passes before a run.

``learning_rate`` ``lr='auto'``
``simulation``    a rule rehearsed on a quadratic
``noise_floor``   how small ε may be on 8-bit activations
"""
