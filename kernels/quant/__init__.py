"""Quantisers: NumPy reference and GPU kernels."""
