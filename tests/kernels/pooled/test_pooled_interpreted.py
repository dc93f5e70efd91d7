"""Runs interpreted_pooled.py in a process of its own: Triton decides when a kernel is defined whether it interprets."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_pooled_kernels_in_the_interpreter():
    file = Path(__file__).with_name("interpreted_pooled.py")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)], capture_output=True,
                          text=True, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
