"""Low-bit attention as backends of diffusers' attention dispatcher: for models that hand q, k and v over by themselves."""
