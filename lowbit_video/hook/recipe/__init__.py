"""Recipes: bit widths chosen by layer, head and step of the denoising, as a file that a person can read."""
