"""All planted faults, by room."""
from . import eval, kernels, lowbit_video, pipelines

MUTANTS = [*kernels.MUTANTS, *lowbit_video.MUTANTS, *pipelines.MUTANTS, *eval.MUTANTS]
