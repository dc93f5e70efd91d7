"""Low-bit attention for video diffusion transformers."""
