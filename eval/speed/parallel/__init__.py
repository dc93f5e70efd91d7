"""How fast several GPUs are: attention of a layer with its exchange, a whole step, decoding; `bench parallel` starts it."""
