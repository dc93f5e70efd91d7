"""Whole calls with fused norms and positions as a GPU runs them, in Triton's CPU interpreter on CPU tensors.

Not collected by itself: `test_prologue.py` runs it in a process with TRITON_INTERPRET=1.
"""
import os

import numpy as np
import pytest

import lowbit_video as lv
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.engine.prologue_apart import write_behind_steps
from lowbit_video.engine.run import run
from lowbit_video.runtime.detect import runtime_of
from prologue_inputs import by_hand, in_two, made_steps, projected

import quick_interpreter  # noqa: F401

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_prologue.py"


@pytest.mark.parametrize("precision, layout, kind, rotary", [
    ("int8+fp8", "NHD", "layer", (10, 120)), ("int4+fp8", "HND", "rms", (0, 130)), ("int8+fp16", "NHD", "layer", None)],
                         ids=str)
def test_a_call_is_that_of_what_had_them(framework, precision, layout, kind, rotary):
    """INT4 with means of Q, and all corrections of the LSE."""
    (q, k, v), steps = projected(framework, tokens=130, heads=1), made_steps(framework, kind=kind, rotary=rotary)
    order = (lambda x: x) if layout == "NHD" else (lambda x: x.transpose([0, 2, 1, 3]) if framework.name == "paddle" else
                                                   x.transpose(1, 2))
    options = AttentionOptions(precision, layout, return_lse=True, backend="triton")
    out, lse, variant = run(*map(order, (q, k, v)), options, steps=steps)
    wanted, wanted_lse, _ = run(*map(order, (*by_hand(framework, q, k, steps), v)), options)
    assert variant.backend == "triton"
    np.testing.assert_allclose(framework.numpy(out), framework.numpy(wanted), atol=4e-3)
    np.testing.assert_allclose(framework.numpy(lse), framework.numpy(wanted_lse), atol=2e-3)


def test_a_call_of_two_pieces_is_that_of_one(framework):
    qkv, steps = projected(framework, tokens=130, heads=1), made_steps(framework, rotary=(20, 110))
    options = AttentionOptions("int8+fp8", return_lse=True, backend="triton")
    first, rest = in_two(framework, qkv, 20)
    one, two = run(*qkv, options, steps=steps), run(*first, options, steps=steps._replace(rest=rest))
    for wanted, found in zip(one[:2], two[:2]):
        np.testing.assert_array_equal(framework.numpy(found), framework.numpy(wanted))
    with pytest.raises(lv.NonFiniteError, match="k has"):
        run(*first, options, steps=steps._replace(rest=rest._replace(k=rest.k * float("nan"))))


@pytest.mark.parametrize("kind, rotary", [("layer", (10, 120)), ("rms", None), (None, (0, 130))], ids=str)
def test_steps_by_a_kernel_of_their_own(framework, kind, rotary):
    """Of tensors cut out of one projection, whose heads are every other one, and of other tensors by the same plan."""
    for seed in (0, 1):
        (q, k, _), steps = projected(framework, batch=2, tokens=130, heads=2, seed=seed), made_steps(
            framework, kind=kind, rotary=rotary, seed=seed)
        for found, wanted in zip(write_behind_steps(q, k, steps, runtime_of(q)), by_hand(framework, q, k, steps)):
            assert list(found.shape) == [2, 130, 2, 32]
            np.testing.assert_allclose(framework.numpy(found), framework.numpy(wanted), atol=2e-5)
