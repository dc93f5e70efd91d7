"""How long a fuzz looks: at new random examples for the minutes of `make fuzz`, else at a few that are always the same.

    make fuzz MINUTES=30            # all surfaces, each its share of the time
    python -m pytest tests/fuzz/test_attention.py --fuzz-minutes 5 -k varlen

A failing example is printed with the arguments that repeat it, made as small as can be, and kept in .hypothesis/ to be tried
first the next time.
"""

from __future__ import annotations

import pathlib
import time

import hypothesis
import pytest
from hypothesis.database import DirectoryBasedExampleDatabase

HERE = pathlib.Path(__file__).parent
DATABASE = HERE.parents[1] / ".hypothesis" / "examples"
ALWAYS = dict(deadline=None, print_blob=True, suppress_health_check=list(hypothesis.HealthCheck))

hypothesis.settings.register_profile("few", max_examples=5, derandomize=True, database=None, **ALWAYS)
hypothesis.settings.register_profile("ci", max_examples=12, database=DirectoryBasedExampleDatabase(DATABASE), **ALWAYS)


def pytest_addoption(parser):
    parser.addoption("--fuzz-minutes", type=float, default=0.0, help="look for new examples for so long, in all tests together")


def pytest_configure(config):
    hypothesis.settings.load_profile("ci" if config.getoption("--fuzz-minutes", 0.0) else "few")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Each test's share of the time: those that only try odd values for one argument need less."""
    mine = [item for item in items if HERE in pathlib.Path(item.path).parents]
    weights = [1 if "odd" in item.name else 5 for item in mine]
    for item, weight in zip(mine, weights):
        item.fuzz_seconds = config.getoption("--fuzz-minutes", 0.0) * 60 * weight / sum(weights)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Runs a test again, which draws new examples, until its share of the time is over."""
    end = time.monotonic() + getattr(pyfuncitem, "fuzz_seconds", 0.0)
    result = yield
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    while time.monotonic() < end:
        pyfuncitem.obj(**arguments)
    return result
