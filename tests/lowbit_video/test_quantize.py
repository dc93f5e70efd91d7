"""quantize() and dequantize() on Paddle and torch tensors."""
import numpy as np
import pytest

import lowbit_video as lv

from helpers import qkv


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("granularity", ["block", "token"])
@pytest.mark.parametrize("format, bound", [("int8", 0.012), ("int4", 0.16), ("int2", 0.36), ("fp8", 0.03)])
def test_round_trip(framework, format, bound, granularity, layout):
    _, k, _ = qkv(q_len=150)
    hnd = k.transpose(0, 2, 1, 3)
    z = lv.quantize(framework.tensor(k if layout == "NHD" else hnd), format, granularity, "k", tensor_layout=layout)
    assert z.length == 150 and list(z.scale.shape) == [1, 2, 2 if granularity == "block" else 150]
    assert list(z.mean.shape) == [1, 2, 64]
    assert np.sqrt(np.mean((lv.dequantize(z) - hnd) ** 2)) < bound


def test_v(framework):
    _, _, v = qkv(q_len=150)
    z = lv.quantize(framework.tensor(v), "fp8", operand="v")
    assert list(z.codes.shape) == [1, 2, 64, 256] and z.mean is None
    np.testing.assert_allclose(lv.dequantize(z), v.transpose(0, 2, 1, 3), rtol=2**-4, atol=0.01)


def test_q_is_not_smoothed_by_default(framework):
    q, _, _ = qkv(q_len=70)
    assert lv.quantize(framework.tensor(q), operand="q").mean is None
    assert list(lv.quantize(framework.tensor(q), operand="q").scale.shape) == [1, 2, 70]  # per row at any granularity
    assert lv.quantize(framework.tensor(q), operand="q", smooth=True).mean is not None


@pytest.mark.parametrize("change, message", [
    (dict(format="int3"), "int8, int4"), (dict(granularity="row"), "block, token"), (dict(operand="x"), "q, k, v"),
    (dict(operand="v"), "fp8"), (dict(tensor_layout="N"), "NHD, HND")])
def test_bad_choices_list_the_good_ones(framework, change, message):
    with pytest.raises(ValueError, match=message):
        lv.quantize(framework.tensor(qkv(q_len=8)[0]), **change)


def test_nan_is_refused(framework):
    q, _, _ = qkv(q_len=8)
    q[0, 0, 0, 0] = np.nan
    with pytest.raises(lv.NonFiniteError, match="1 NaN"):
        lv.quantize(framework.tensor(q))


@pytest.mark.parametrize("dtype", ["int32", "float64", "int8", "bool", "complex64", "float8_e4m3fn"])
def test_other_dtypes_are_refused(framework, dtype):
    with pytest.raises(TypeError, match=f"float16, bfloat16, float32; given: {dtype}"):
        lv.quantize(framework.tensor(np.ones((1, 4, 1, 32)), dtype))


@pytest.mark.parametrize("given", [None, 3, np.zeros(3)], ids=repr)
def test_only_what_was_quantised_is_dequantised(given):
    with pytest.raises(TypeError, match=r"what quantize\(\) returned; given: "):
        lv.dequantize(given)
