"""The fused prologue on a GPU: codes beside the steps apart, replayed calls, a hooked model that does not wait."""
import numpy as np
import pytest

from lowbit_video.engine import replay as plans
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.engine.run import run
from lowbit_video.eval.speed.experiments import prologue
from lowbit_video.kernels.prologue.steps import mapped
from lowbit_video.runtime import cuda_driver

pytestmark = pytest.mark.gpu

CASES = [prologue.Case(2, 1000, 5, 64, "float16", "layer", (226, 774)),
         prologue.Case(1, 777, 8, 128, "bfloat16", "rms", (0, 700)),
         prologue.Case(1, 300, 3, 64, "bfloat16", "layer", None, "int4+fp8", True),
         prologue.Case(1, 129, 2, 64, "float16", "layer", (1, 128), "int8+fp16")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes(gpu, case):
    found = prologue.check(prologue.Made(case, gpu.like))
    assert found["good"], found


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_a_repeated_call_reads_its_own_tensors(gpu, case):
    made, options = prologue.Made(case, gpu.like), AttentionOptions(case.spec, return_lse=True)
    other = made.q + 1, made.k * 2, made.v * 3
    steps = mapped(made.steps, lambda name, tensor: tensor * 2 if name.endswith("weight") else tensor + 0)
    plans.clear()
    run(made.q, made.k, made.v, options, steps=made.steps)
    by_plan = run(*other, options, steps=steps)
    plans.clear()
    fresh = run(*other, options, steps=steps)
    for one, two in zip(by_plan[:2], fresh[:2]):
        np.testing.assert_array_equal(gpu.numpy(one), gpu.numpy(two))


def test_a_call_does_not_wait_for_the_device(gpu):
    made, options = prologue.Made(CASES[0], gpu.like), AttentionOptions("int8+fp8")
    run(made.q, made.k, made.v, options, steps=made.steps)
    stream = gpu.runtime.stream(made.q)
    ballast = gpu.runtime.empty((2**31,), "uint8", gpu.like)
    cuda_driver.synchronize(stream)
    for _ in range(200):
        cuda_driver.fill_bytes(ballast.data_ptr(), 1, 2**31, stream)
    ahead = cuda_driver.Event()
    ahead.record(stream)
    run(made.q, made.k, made.v, options, steps=made.steps)
    assert not gpu.happened(ahead), "the call returned after the device had caught up"
    ahead.synchronize()
