"""Triton kernels, one file per operator; installed as ``segops.kernels``. Imports torch and triton only."""
