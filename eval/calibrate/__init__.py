"""Calibration: which bit width each layer, head and step of a model needs, measured on a few prompts."""
