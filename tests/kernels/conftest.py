"""Ahead-of-time builds, in two processes; a driver that launches nothing."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


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


@pytest.fixture(scope="session")
def over_fake_cuda(tmp_path_factory) -> Callable[..., Any]:
    """`run(script, *words, **environment)` runs Python over fake_cuda.c, a libcuda.so.1 that launches nothing and writes down
    everything, and gives the JSON of the last line that it prints."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    triton = pytest.importorskip("triton", reason="needs cuda.h, which Triton brings")
    folder = tmp_path_factory.mktemp("cuda")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", f"-I{include}",
                    Path(__file__).with_name("fake_cuda.c"), "-o", folder / "libcuda.so.1"], check=True)

    def run(*command: Any, **more: str) -> Any:
        paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
        env = dict(os.environ, LD_LIBRARY_PATH=str(folder), TRITON_LIBCUDA_PATH=str(folder), PYTHONPATH=paths, **more)
        done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
