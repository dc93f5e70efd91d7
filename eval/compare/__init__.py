"""Paired runs: candidates, the noise floor, settings, the result store, errors by layer."""
