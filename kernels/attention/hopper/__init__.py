"""Attention for Hopper: `launch` is what the table of variants names, `kernel` what it launches, `build` how that is made."""
