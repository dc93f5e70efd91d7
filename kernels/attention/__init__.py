"""Attention forward passes: NumPy reference and GPU kernels."""
