"""Ahead-of-time builds, in two processes."""
from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest


@pytest.fixture(scope="module")
def built(request):
    """What `offline.build` returns for a case; the cases of the module's collected tests compile in two processes."""
    from offline import build

    items = [item for item in request.session.items if item.path == request.path]
    cases = [item.callspec.params["case"] for item in items if hasattr(item, "callspec")]
    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    futures = {case: pool.submit(build, case) for case in cases}
    yield lambda case: futures[case].result()
    pool.shutdown(cancel_futures=True)
