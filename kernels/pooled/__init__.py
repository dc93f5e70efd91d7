"""Pooled attention: some key tiles of a query tile run exactly, and each other one is one key, with the weight of all."""
