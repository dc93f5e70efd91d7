"""Video pipelines in PaddlePaddle."""
