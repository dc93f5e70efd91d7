"""quantize(), dequantize(), Precision, prequantize() and the processors: every code of random tensors, every odd choice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowbit_video as lv
from lowbit_video import compat
from lowbit_video.kernels.variants import BACKENDS
from lowbit_video.precision import precision_specs

from helpers import qkv
from odd_values import is_flag, is_number, is_whole, odd_tensors, odd_values
from own_errors import result_of, result_or_refusal, taken_if

FORMATS = ("int8", "int4", "int2", "fp8")
KINDS = ("normal", "offset", "outlier", "huge", "tiny", "zeros", "constant", "steep")
MAX_CODE = {"int8": 127, "int4": 16, "fp8": 448}


def tensor_values(kind, seed, shape):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    x = {
        "offset": lambda: x + rng.uniform(-9, 9, shape[-1]),
        "outlier": lambda: x * np.where(np.arange(shape[-1]) == 3, 100, 1),
        "huge": lambda: x * 10 ** rng.uniform(5, 17),
        "tiny": lambda: x * 10 ** rng.uniform(-25, -5),
        "zeros": lambda: x * (x > 1.5),
        "constant": lambda: x * 0 + rng.uniform(-3, 3),
        "steep": lambda: x * np.exp(rng.uniform(-30, 3, shape)),
        "normal": lambda: x,
    }[kind]()
    return x.astype(np.float32)


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
    format=st.sampled_from(FORMATS),
    granularity=st.sampled_from(("block", "token")),
    operand=st.sampled_from("qkv"),
    smooth=st.sampled_from((None, True, False)),
    layout=st.sampled_from(("NHD", "HND")),
    size=st.tuples(
        st.integers(1, 2),
        st.sampled_from((1, 2, 15, 63, 127, 128, 129, 300)),
        st.integers(1, 2),
        st.integers(1, 33).map(lambda n: 4 * n),
    ),
    dtype=st.sampled_from(("float32", "bfloat16")),
)
def test_every_code_is_the_nearest_of_its_scale(
    framework, kind, seed, format, granularity, operand, smooth, layout, size, dtype
):
    tensor = framework.tensor(tensor_values(kind, seed, size), dtype)
    x = framework.numpy(tensor).astype(np.float64).transpose(0, 2, 1, 3)  # [B, H, N, D] as the dtype holds it
    given = (
        tensor if layout == "NHD" else (tensor.transpose(1, 2) if framework.name == "torch" else tensor.transpose([0, 2, 1, 3]))
    )
    call = lambda: lv.quantize(given, format, granularity, operand, smooth, layout)
    if operand == "v" and (format != "fp8" or smooth):
        assert result_or_refusal(call)[0] is None
        return
    made = result_of(call)
    batch, heads, tokens, dim = x.shape
    back = result_of(lambda: lv.dequantize(made))
    assert back.shape == x.shape and back.dtype == np.float32
    scale = framework.numpy(made.scale).astype(np.float64)
    if smooth or (smooth is None and operand == "k"):
        mean = framework.numpy(made.mean).astype(np.float64)
        np.testing.assert_allclose(mean, x.mean(2), rtol=1e-6, atol=1e-7 * abs(x).max())
        x = (np.float32(x) - np.float32(mean)[:, :, None]).astype(np.float64)
        back = back - mean[:, :, None]
        slack = 2.0**-22 * (abs(mean).max(initial=0) + abs(x).max())
    else:
        assert made.mean is None
        slack = 2.0**-22 * abs(x).max()
    if operand == "v":
        groups = scale[:, :, None]
        absmax = abs(x).max(2)
    elif granularity == "block" and operand == "k":
        groups = scale.repeat(128, 2)[:, :, :tokens, None]
        absmax = np.stack([abs(x[:, :, i : i + 128]).max((2, 3)) for i in range(0, tokens, 128)], 2)
    else:
        groups, absmax = scale[..., None], abs(x).max(3)
    assert scale.shape == absmax.shape
    if format != "int2":
        np.testing.assert_allclose(scale, np.maximum(absmax, 1e-30) / MAX_CODE[format], rtol=1e-5)
    error = abs(back - x) - slack
    if format == "int8":
        assert (error <= groups * 0.501).all()
    elif format == "fp8":
        assert (error <= np.maximum(abs(x) * 2.0**-4, groups * 2.0**-10) * 1.001).all()
    elif format == "int4":
        assert (error <= groups * 1.001).all()
    else:
        inside = abs(x) <= 4 * groups
        assert (error <= np.where(inside, groups * 1.001, abs(x) - 3 * groups + groups * 0.001)).all()


PRECISION = {
    "spec": lambda value: isinstance(value, str) and value in precision_specs(),
    "granularity": lambda value: value is None or isinstance(value, str) and value in ("block", "token"),
    "smooth_k": lambda value: value is None or is_flag(value),
    "smooth_q": lambda value: value is None or is_flag(value),
}
QUANTIZE = {
    "format": lambda value: isinstance(value, str) and value in FORMATS,
    "granularity": lambda value: isinstance(value, str) and value in ("block", "token"),
    "operand": lambda value: False,
    "smooth": lambda value: value is None or is_flag(value),
    "tensor_layout": lambda value: isinstance(value, str) and value in ("NHD", "HND"),
    "check_finite": lambda value: value is None or is_flag(value),
}
choices = odd_values | st.sampled_from(FORMATS + ("block", "token", "NHD", "int8+fp8", "exact"))


@pytest.mark.parametrize("name", PRECISION)
@given(value=choices)
def test_an_odd_part_of_a_precision_is_refused_by_name(name, value):
    named = {"spec": "precision"}.get(name, name)
    taken_if(PRECISION[name](value), lambda: lv.Precision(**{"spec": "int8+fp16", name: value}), named)


@pytest.mark.parametrize("name", QUANTIZE)
@given(value=choices)
def test_an_odd_choice_of_quantize_is_refused_by_name(framework, name, value):
    taken_if(QUANTIZE[name](value), lambda: lv.quantize(framework.tensor(qkv(q_len=5, dim=32)[0]), **{name: value}), name)


@given(data=st.data(), format=st.sampled_from(FORMATS), operand=st.sampled_from("qkv"))
def test_odd_tensors_are_quantised_or_refused(framework, data, format, operand):
    x = data.draw(odd_tensors(framework, qkv(q_len=5, dim=32)[0]) | odd_values)
    made, error = result_or_refusal(lambda: lv.quantize(x, "fp8" if operand == "v" else format, operand=operand))
    if error is None:
        assert np.isfinite(result_of(lambda: lv.dequantize(made))).all()
    back, error = result_or_refusal(lambda: lv.dequantize(x))
    assert error is not None


CODES = {
    "precision": lambda value: isinstance(value, str) and "+" in value,
    "tensor_layout": lambda value: isinstance(value, str) and value in ("NHD",),
    "scale": lambda value: value is None or is_number(value) and np.all(abs(np.asarray(value, np.float64)) < 1e23),
    "return_lse": is_flag,
    "check_finite": lambda value: value is None or is_flag(value),
}
OF_CODES = {
    "tensor_layout": CODES["tensor_layout"],
    "is_causal": is_flag,
    "return_lse": lambda value: is_flag(value) and not value,
    "backend": lambda value: isinstance(value, str) and value in ("auto", "reference"),
    "codes": lambda value: False,
}


@pytest.mark.parametrize("name", CODES)
@given(value=choices)
def test_an_odd_choice_of_prequantize_is_refused_by_name(framework, name, value):
    tensors = [framework.tensor(x) for x in qkv(q_len=5, dim=32)]
    taken_if(CODES[name](value), lambda: lv.prequantize(*tensors, **{name: value}), {"precision": ""}.get(name, name))


@pytest.mark.parametrize("name", OF_CODES)
@given(value=choices | st.sampled_from(BACKENDS))
def test_an_odd_choice_of_attention_of_codes_is_refused_by_name(framework, name, value):
    codes = lv.prequantize(*(framework.tensor(x) for x in qkv(q_len=5, dim=32)))
    taken_if(OF_CODES[name](value), lambda: lv.attention_of_codes(**{"codes": codes, name: value}), name)


@given(
    data=st.data(),
    dim=st.sampled_from((32, 64, 80)),
    q_len=st.integers(1, 150),
    kv_len=st.integers(1, 150),
    precision=st.sampled_from([spec for spec in precision_specs() if "+" in spec]),
    causal=st.booleans(),
    lse=st.booleans(),
    layout=st.sampled_from(("NHD", "HND")),
)
def test_codes_give_what_attention_gives(framework, data, dim, q_len, kv_len, precision, causal, lse, layout):
    arrays = qkv(batch=2, q_len=q_len, kv_len=kv_len, dim=dim, seed=data.draw(st.integers(0, 2**20)))
    tensors = [framework.tensor(x if layout == "NHD" else x.transpose(0, 2, 1, 3)) for x in arrays]
    codes = result_of(lambda: lv.prequantize(*tensors, precision, layout, return_lse=lse))
    got = result_of(lambda: lv.attention_of_codes(codes, layout, causal, lse))
    wanted = lv.attention(*tensors, precision, layout, causal, None, lse)
    for one, other in zip(*((x if lse else (x,)) for x in (got, wanted))):
        np.testing.assert_allclose(framework.numpy(one), framework.numpy(other), rtol=1e-5, atol=1e-5)


SAGE = {
    "tensor_layout": CODES["tensor_layout"],
    "is_causal": is_flag,
    "sm_scale": CODES["scale"],
    "smooth_k": is_flag,
    "return_lse": is_flag,
    "qk_quant_gran": lambda value: value is None or isinstance(value, str) and value in compat.GRANULARITY_OF,
    "pv_accum_dtype": lambda value: False,
    "smooth_v": lambda value: value is False,
}


@pytest.mark.parametrize("name", SAGE)
@given(value=choices)
def test_an_odd_choice_of_the_sage_names_is_refused_by_name(framework, name, value):
    tensors = [framework.tensor(x) for x in qkv(q_len=5, dim=32)]
    named = {"sm_scale": "scale"}.get(name, name)
    taken_if(
        SAGE[name](value), lambda: compat.sageattn_qk_int8_pv_fp8_cuda(*tensors, **{"tensor_layout": "NHD", name: value}), named
    )


@pytest.mark.parametrize("name", ["q_format", "k_format", "pv_format"])
@given(value=choices)
def test_an_odd_format_of_the_sage_names_is_refused(framework, name, value):
    tensors = [framework.tensor(x) for x in qkv(q_len=5, dim=32)]
    _, error = result_or_refusal(lambda: compat.sageattn_multi_precision(*tensors, tensor_layout="NHD", **{name: value}))
    assert error is not None or isinstance(value, str) and value in (*FORMATS, "fp16")


HOOK = {
    "precision": lambda value: isinstance(value, str) and value in precision_specs(),
    "fallback": lambda value: value is None or isinstance(value, str) and value == "exact",
    "backend": lambda value: isinstance(value, str) and value in BACKENDS,
    "check_finite": lambda value: value is None or is_flag(value),
}


@pytest.mark.parametrize("name", HOOK)
@given(value=choices | st.sampled_from(BACKENDS))
def test_an_odd_choice_of_a_processor_is_refused_when_it_is_made(name, value):
    taken_if(HOOK[name](value), lambda: lv.LowBitAttnProcessor(**{name: value}), name)


@given(data=st.data())
def test_odd_models_and_patterns_are_refused_and_leave_no_trace(data):
    import toy_model

    model = toy_model.model()
    before = [block.processor for block in model.blocks]
    name = data.draw(st.sampled_from(("model_or_pipe", "precision", "modules", "pattern", "chosen")))
    value = data.draw(odd_values)
    arguments = {"model_or_pipe": model, "precision": "int8+fp16", "modules": None}
    arguments |= (
        {name: value}
        if name in arguments
        else {"modules": {value: "fp16"} if name == "pattern" else {"blocks.0": value}}
        if (name == "chosen" or value.__hash__ is not None and _hashes(value))
        else {}
    )
    handle, error = result_or_refusal(lambda: lv.apply(**arguments))
    if error is not None:
        assert [block.processor for block in model.blocks] == before
        return
    fits = name == "precision" and (value is None or callable(value)) or name == "modules" and (value is None or value == {})
    assert fits or name == "chosen" and (value is None or callable(value)) or name == "pattern" and arguments["modules"] is None
    handle.remove()
    assert [block.processor for block in model.blocks] == before


def _hashes(value):
    try:
        return isinstance(hash(value), int)
    except TypeError:
        return False


@pytest.mark.parametrize(
    "name", ["shapes", "precision", "dtype", "framework", "device", "is_causal", "return_lse", "kv_heads", "backend"]
)
@given(value=choices)
def test_an_odd_choice_of_warmup_is_refused_also_on_a_cpu(name, value):
    fits = {
        "precision": HOOK["precision"],
        "is_causal": is_flag,
        "return_lse": is_flag,
        "kv_heads": lambda x: x is None or is_whole(x) and 2 % int(x) == 0,
        "dtype": lambda x: isinstance(x, str) and x in ("float16", "bfloat16", "float32"),
        "framework": lambda x: x is None,
        "backend": HOOK["backend"],
        "shapes": lambda x: (
            isinstance(x, (list, tuple, set, dict, range, str, bytes, bytearray))
            and not len(x)
            or isinstance(x, np.ndarray)
            and x.size == 0
        ),
    }.get(name, lambda x: False)
    named = {"shapes": "shape", "precision": ""}.get(name, name)
    taken_if(
        fits(value),
        lambda: lv.warmup(**{"shapes": [(1, 8, 2, 64)], "device": "cpu", "framework": "paddle", name: value}),
        named,
    )
