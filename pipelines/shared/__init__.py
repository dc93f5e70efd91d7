"""What every pipeline shares: configs, weights, T5, video files."""
