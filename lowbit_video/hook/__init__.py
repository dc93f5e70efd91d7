"""Attention processors: how a model's attention comes to run at low bit, and what is reported of it."""
