"""Kernels shipped compiled: `cases` says which, `build` compiles, `store` finds, and `launch` launches them."""
