"""All planted faults, by room."""
from . import kernels

MUTANTS = [*kernels.MUTANTS]
