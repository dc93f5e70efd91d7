"""Pooled attention on a GPU: the checks of its experiment at small sizes, from plans and without them."""
from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from lowbit_video.eval.speed.experiments import pooled  # noqa: E402


@pytest.mark.parametrize("shape", [(2, 4, 3000, 64), (1, 3, 2500, 128)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("spec, backend", [("int8+fp8", "auto"), ("int8+fp16", "auto"), ("int8+fp8", "triton"),
                                           ("int8+fp16", "triton")])
def test_lists_and_rows(gpu, shape, dtype, spec, backend):
    found = pooled.check(pooled.Case(shape, gpu.like, dtype), spec, 0.3, 226, backend)
    assert found["good"], found


@pytest.mark.parametrize("shape", [(1, 2, 3000, 64), (1, 2, 2500, 128)], ids=str)
def test_plans_and_lists_of_everything(gpu, shape):
    case, other = pooled.Case(shape, gpu.like), pooled.Case(shape, gpu.like, seed=5)
    for found in (pooled.check_replay(case, other, "int8+fp8"), pooled.check_all_listed(case, "int8+fp8")):
        assert found["good"], found
