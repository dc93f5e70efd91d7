"""How long a fuzz looks: at new random examples for the minutes of `make fuzz`, else at a few that are always the same.

    make fuzz MINUTES=30            # all surfaces, each its share of the time
    python -m pytest tests/fuzz/test_attention.py --fuzz-minutes 5 -k varlen

A failing example is printed with the arguments that repeat it, made as small as can be, and the `@reproduce_failure(...)` that
repeats it anywhere; it is kept in .hypothesis/ to be tried first the next time. The seed that the first line names draws the
same examples again in the same order, which tells of a test that hung or crashed what it had in hand:

    make fuzz ARGS="--fuzz-seed 1234 -k cli"
"""

from __future__ import annotations

import itertools
import os
import pathlib
import secrets
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
    parser.addoption("--fuzz-seed", type=int, help="draw the examples of an earlier look, whose first line named it")


def pytest_configure(config):
    hypothesis.settings.load_profile("ci" if config.getoption("--fuzz-minutes", 0.0) else "few")
    if config.getoption("--fuzz-seed", None) is None:
        config.option.fuzz_seed = secrets.randbelow(10**6)


def pytest_report_header(config):
    if config.getoption("--fuzz-minutes", 0.0):
        return f"random examples of seed {config.option.fuzz_seed}: --fuzz-seed {config.option.fuzz_seed} draws them again"
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Each test's share of all processes' time: those that only try odd values for one argument need less."""
    minutes = config.getoption("--fuzz-minutes", 0.0) * int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    mine = [item for item in items if HERE in pathlib.Path(item.path).parents]
    weights = [1 if "odd" in item.name else 5 for item in mine]
    for item, weight in zip(mine, weights):
        item.fuzz_seconds = minutes * 60 * weight / sum(weights)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Runs a test again, with a seed that draws other examples, until its share of the time is over."""
    seconds = getattr(pyfuncitem, "fuzz_seconds", 0.0)
    seeds, end = itertools.count(pyfuncitem.config.option.fuzz_seed), time.monotonic() + seconds
    again = lambda: hypothesis.seed(next(seeds))(pyfuncitem.obj) if seconds else pyfuncitem.obj
    again()
    result = yield
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    while time.monotonic() < end:
        again()(**arguments)
    return result
