"""What several GPUs send each other of an attention call: how codes lie in memory, and the kernels that cut and join them."""
