"""CogVideoX in PaddlePaddle."""
