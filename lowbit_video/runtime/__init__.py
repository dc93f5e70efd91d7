"""Where tensors live: one small runtime per framework, found from the tensor itself."""
