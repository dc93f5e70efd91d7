"""A model's forward as CUDA graphs: `forward` says when one is recorded anew, `torch_capture` records and replays, `counted` is
what a replay counts."""
