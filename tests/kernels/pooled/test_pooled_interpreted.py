"""Runs interpreted_pooled.py in a process of its own: Triton decides when a kernel is defined whether it interprets."""
from pathlib import Path

import pytest

from interpreted_run import pass_in_the_interpreter

pytest.importorskip("triton")


def test_pooled_kernels_in_the_interpreter():
    pass_in_the_interpreter(Path(__file__).with_name("interpreted_pooled.py"))
