"""All planted faults, by room; apart those that only tests beside PyTorch notice."""
from . import beside_torch, eval, kernels, lowbit_video, pipelines

MUTANTS = [*kernels.MUTANTS, *lowbit_video.MUTANTS, *pipelines.MUTANTS, *eval.MUTANTS]
BESIDE_TORCH = beside_torch.MUTANTS
