"""What every operator means: short eager PyTorch, differentiable, exact in float64.

Each module here holds the meaning of the op of the same name and its ``sample_inputs()``, which the test battery walks.
"""
