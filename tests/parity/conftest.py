"""Live comparisons with diffusers and transformers; skipped by name where these are not installed."""
import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def goldens():
    """make_goldens.py as a module, for its configurations and runners (its name is not unique in the tests)."""
    spec = importlib.util.spec_from_file_location("parity_make_goldens", HERE / "make_goldens.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
