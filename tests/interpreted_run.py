"""Tests of kernels run in a process of their own, where Triton interprets: it decides that when it is imported."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def pass_in_the_interpreter(*files: Path) -> None:
    """Fails, with the end of what was said, unless every test of the files passes."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
                          capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
