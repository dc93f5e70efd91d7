"""What several metrics use: context, optical flow, CLIP, checked arrays."""
