"""Tests of kernels run in a process of their own, where Triton interprets: it decides that when it is imported."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout"]


def pass_in_the_interpreter(*files: Path) -> None:
    """Fails, with the end of what was said, unless every test of the files passes."""
    variables = os.environ | ENVIRONMENT | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # hypothesis' and anyio's take half a second
    done = subprocess.run([sys.executable, *PYTEST, *map(str, files)], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
