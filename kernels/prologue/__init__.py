"""The fused prologue: QK norm, rotary positions and quantisation in two readings of what the projections left."""
