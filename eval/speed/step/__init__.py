"""How fast a model's whole denoising step is by each attention; `bench step` starts it."""
