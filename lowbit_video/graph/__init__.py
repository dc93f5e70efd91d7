"""Attention inside compiled graphs: tracing, the operators of torch.compile and to_static, module slots."""
