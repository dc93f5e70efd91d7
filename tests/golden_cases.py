"""tests/parity/make_goldens.py as a module: the inputs and configurations behind the goldens (it needs no torch for these)."""
import importlib.util
from pathlib import Path

TESTS = Path(__file__).resolve().parent

_spec = importlib.util.spec_from_file_location("make_goldens_for_tests", TESTS / "parity" / "make_goldens.py")
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
GOLDENS = cases.GOLDENS
