"""What every pipeline shares: the pipeline's frame, the denoising loop, inputs, configs, weights, T5, video files."""
