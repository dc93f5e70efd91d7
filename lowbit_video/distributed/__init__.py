"""Several GPUs: one video on N of them, its tokens, its guidance and its decoding shared out.

From below: a `Wire` carries bytes between processes (Paddle's, PyTorch's); a `Group` is some of them; a `Mesh` says which
group shares what. `ulysses` and `ring` wrap an `Attend`; `parallelize` puts all of it into a pipeline.
"""
