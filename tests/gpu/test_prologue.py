"""The fused prologue on a GPU: codes beside the steps apart, replayed calls, a hooked model that does not wait."""
import numpy as np
import pytest

from lowbit_video.engine import replay as plans
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.engine.prologue_apart import behind_steps
from lowbit_video.engine.run import run
from lowbit_video.eval.speed.experiments import prologue
from lowbit_video.eval.speed.experiments import prologue_pieces as pieces
from lowbit_video.kernels.prologue.steps import Rest, mapped
from lowbit_video.runtime import cuda_driver

pytestmark = pytest.mark.gpu

CASES = [prologue.Case(2, 1000, 5, 64, "float16", "layer", (226, 774)),
         prologue.Case(1, 777, 8, 128, "bfloat16", "rms", (0, 700)),
         prologue.Case(1, 300, 3, 64, "bfloat16", "layer", None, "int4+fp8", True),
         prologue.Case(1, 129, 2, 64, "float16", "layer", (1, 128), "int8+fp16")]

TEXT_TOKENS = (1, 226, 255, 256)
PIECES = [prologue.Case(2, 700, 5, 64, "float16", "layer", None),
          prologue.Case(1, 513, 7, 64, "bfloat16", "layer", (0, 0)),
          prologue.Case(1, 513, 2, 128, "bfloat16", "rms", (0, 0)),
          prologue.Case(2, 400, 3, 128, "float16", "layer", (0, 0), "int4+fp8", True),
          prologue.Case(1, 300, 3, 32, "float16", "rms", None, "int8+fp8", True)]
"""Of each the rotary tokens are those behind the text's."""


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


@pytest.mark.parametrize("case", [*CASES, prologue.Case(1, 65, 7, 32, "float16", "rms", (2, 63)),
                                  prologue.Case(1, 64, 2, 64, "bfloat16", "layer", None, projection=True)], ids=str)
def test_steps_by_a_kernel_of_their_own(gpu, case):
    """Each row beside the ideal one, of other tensors by a plan too."""
    made = prologue.Made(case, gpu.like)
    plans.clear()
    for factor in (1, 3):
        made.q, made.k = made.q * factor, made.k * factor
        for of, out, x in zip("qk", behind_steps(made.q, made.k, made.steps, made.runtime), (made.q, made.k)):
            assert made.runtime.dtype_name(out) == case.dtype and list(out.shape) == list(x.shape)
            for batch, head in ((0, 0), (case.batch - 1, case.heads - 1)):
                ideal = prologue.ideal_rows(made, of, made.one_head(x, batch, head))
                bound = prologue.ROUNDINGS * prologue.HALF_STEP[case.dtype] * np.abs(ideal).max(-1, keepdims=True) + 1e-4
                assert (np.abs(made.one_head(out, batch, head) - ideal) <= bound).all()


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


@pytest.mark.parametrize("case", PIECES, ids=str)
@pytest.mark.parametrize("text_tokens", TEXT_TOKENS)
def test_two_pieces_leave_what_one_does(gpu, case, text_tokens):
    """All that is written before attention, to the bit: as views of the whole, and as copies with other strides."""
    if case.rotary:
        case = case._replace(rotary=(text_tokens, case.tokens - text_tokens))
    found = pieces.check(pieces.Pieces(prologue.Made(case, gpu.like), text_tokens))
    assert found["good"], found


@pytest.mark.parametrize("case", PIECES[:3], ids=str)
def test_a_repeated_call_reads_its_own_pieces(gpu, case):
    """And the whole call is that of one piece, by a plan and by its launchers."""
    if case.rotary:
        case = case._replace(rotary=(226, case.tokens - 226))
    made, options = prologue.Made(case, gpu.like), AttentionOptions(case.spec, return_lse=True)
    found = []
    for factor in (1, 2):
        q, k, v = (x * factor for x in (made.q, made.k, made.v))
        rest = Rest(*(x[:, 226:].clone() for x in (q, k, v)))
        found.append((run(*(x[:, :226].clone() for x in (q, k, v)), options, steps=made.steps._replace(rest=rest)),
                      run(q, k, v, options, steps=made.steps)))
    for two, one in found:
        for part, wanted in zip(two[:2], one[:2]):
            np.testing.assert_array_equal(gpu.numpy(part), gpu.numpy(wanted))
