"""attention(), attention_varlen() and the codes between: every element of every random valid call, every random invalid one.

What is right is computed in float64 from what `quantize()` says the kernel sees (tests/fuzz/test_quantize.py holds it to the
originals), with a bound for each element of what rounding P, V and float32 scores may do; ordinary data is held to full
precision, row by row.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowbit_video as lv
from lowbit_video.kernels.variants import BACKENDS
from lowbit_video.precision import precision_specs

from helpers import naive_attention, qkv
from odd_values import NOTHING, is_flag, is_number, is_whole, odd_tensors, odd_values
from own_errors import result_of, result_or_refusal

DTYPES = {"float32": (2.0**-24, 2.0**-126), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-126)}
"""Of each dtype the relative error of rounding, and the absolute one near zero."""
LARGEST = {"float32": 1e12, "float16": 6e4, "bfloat16": 1e12}
LOWBIT = tuple(spec for spec in precision_specs() if "+" in spec)
KINDS = ("normal", "normal", "offset", "outlier", "huge", "tiny", "mixed", "zeros", "constant", "one token")
ROW_DB = {"int2": -3.0, "int4": 4.0, "fp8": 14.0, "+fp16": 24.0}
"""What every single row of normal data keeps at least, in dB; the first name that the precision holds counts."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One valid call; a failing one is printed, and is all that is needed to repeat it."""

    seed: int
    kind: str
    dtype: str
    layout: str
    strides: str
    batch: int
    q_len: int
    kv_len: int
    kv_heads: int
    group: int
    dim: int
    precision: lv.Precision
    causal: bool
    scale: float | None

    def arrays(self):
        """q, k, v [B, N, H, D] as float32 that the dtype holds to the bit."""
        rng = np.random.default_rng(self.seed)
        shape = lambda tokens, heads: (self.batch, tokens, heads, self.dim)
        return [
            rounded(values(rng, self.kind, LARGEST[self.dtype], shape(*size)), self.dtype)
            for size in ((self.q_len, self.kv_heads * self.group), (self.kv_len, self.kv_heads), (self.kv_len, self.kv_heads))
        ]

    @property
    def factor(self):
        return self.dim**-0.5 if self.scale is None else self.scale


def values(rng, kind, largest, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    channel = rng.integers(shape[-1])
    if kind == "offset":
        x += rng.uniform(-20, 20, shape[-1]).astype(np.float32)
    elif kind == "outlier":
        x[..., channel] *= 100
    elif kind == "huge":
        x *= np.float32(10 ** rng.uniform(1, np.log10(largest) - 0.7))
    elif kind == "tiny":
        x *= np.float32(10 ** rng.uniform(-42, -3))
    elif kind == "mixed":
        x *= np.exp(rng.uniform(-12, 3, shape)).astype(np.float32)
    elif kind == "zeros":
        x *= rng.random(shape) < 0.1
    elif kind == "constant":
        x[:] = x[0, 0, 0, 0]
    elif kind == "one token":
        x[:, rng.integers(shape[1])] *= 50
    return x


def rounded(x, dtype):
    import ml_dtypes

    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    return x.astype(kind).astype(np.float32)


@st.composite
def precisions(draw):
    spec = draw(st.sampled_from(precision_specs()))
    if "+" not in spec:
        return lv.Precision(spec)
    choice = st.sampled_from((None, True, False))
    return lv.Precision(spec, draw(st.sampled_from((None, "block", "token"))), draw(choice), draw(choice))


def lengths(most):
    return st.one_of(st.integers(1, 9), st.sampled_from((63, 64, 127, 128, 129, 130, 257)), st.integers(1, most))


scales = st.one_of(st.none(), st.floats(-4, 4), st.sampled_from((0.0, 1e-30, 1.0, 50.0)))

calls = st.builds(
    Call,
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(tuple(DTYPES)),
    layout=st.sampled_from(("NHD", "HND")),
    strides=st.sampled_from(("plain", "sliced", "skipping", "swapped")),
    batch=st.integers(1, 2),
    q_len=lengths(300),
    kv_len=lengths(300),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    dim=st.integers(4, 16).map(lambda eighths: 8 * eighths) | st.sampled_from((32, 64, 128, 256)),
    precision=precisions(),
    causal=st.booleans(),
    scale=scales,
)


def tensor_of(framework, x, call):
    """An array [B, N, H, D] as a tensor in the call's layout, with its kind of strides."""
    if call.layout == "HND":
        x = x.transpose(0, 2, 1, 3)
    if call.strides == "sliced":
        return framework.tensor(np.concatenate([x * 0 + 7, x, x * 0 - 7], axis=3), call.dtype)[..., call.dim : 2 * call.dim]
    if call.strides == "skipping":
        return framework.tensor(x.repeat(2, axis=1), call.dtype)[:, ::2]
    if call.strides == "swapped":
        swapped = framework.tensor(x.transpose(0, 2, 1, 3), call.dtype)
        return swapped.transpose(1, 2) if framework.name == "torch" else swapped.transpose([0, 2, 1, 3])
    return framework.tensor(x, call.dtype)


def seen(framework, x, operand, precision):
    """(values without the mean, mean) [B, H, N, D], [B, H, D], float64: what a kernel sees of [B, N, H, D]."""
    format, smooth = {"q": (precision.q, precision.smooth_q), "k": (precision.k, precision.smooth_k), "v": ("fp8", None)}[
        operand
    ]
    z = lv.quantize(framework.tensor(x), format, precision.granularity, operand, smooth)
    mean = np.zeros((x.shape[0], x.shape[2], x.shape[3])) if z.mean is None else framework.numpy(z.mean).astype(np.float64)
    return lv.dequantize(dataclasses.replace(z, mean=None)).astype(np.float64), mean


def expected(framework, call, arrays):
    """(out [B, N, H, D], its bound, lse [B, H, N], its bound) in float64 of the codes that a kernel sees."""
    precision, factor = call.precision, call.factor
    q, k, v = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in arrays)
    grouped = lambda x: np.repeat(x, call.group, 1)
    q_mean, k_mean = np.zeros(q[:, :, 0].shape), np.zeros(k[:, :, 0].shape)
    q_seen, k_seen, v_seen, k_plain = q, k, v, k
    v_error = np.zeros(v.shape)
    if not precision.exact:
        (q_seen, q_mean), (k_seen, k_mean) = (seen(framework, x, name, precision) for x, name in zip(arrays[:2], "qk"))
        k_plain = k - k_mean[:, :, None]
        if precision.pv == "fp8":
            v_seen, _ = seen(framework, arrays[2], "v", precision)
        else:
            v_error = half_error(v, call.dtype)
    k_seen, k_mean, k_plain, v_seen, v_error = map(grouped, (k_seen, k_mean, k_plain, v_seen, v_error))
    scores = factor * (q_seen @ k_seen.swapaxes(2, 3) + (q_mean[:, :, None] @ k_plain.swapaxes(2, 3)))
    size = abs(factor) * (abs(q_seen) @ abs(k_seen).swapaxes(2, 3) + abs(q_mean)[:, :, None] @ abs(k_plain).swapaxes(2, 3))
    if call.causal:
        hidden = np.arange(call.kv_len) > np.arange(call.q_len)[:, None] + call.kv_len - call.q_len
        scores, size = np.where(hidden, -np.inf, scores), np.where(hidden, 0.0, size)
    top = np.maximum(scores.max(-1, keepdims=True), -1e300)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    blind = total[..., 0] == 0.0
    total[blind] = 1.0
    p /= total
    shift = factor * np.einsum("bhnd,bhd->bhn", q, k_mean)
    with np.errstate(divide="ignore"):
        lse = np.where(blind, -np.inf, (top + np.log(total))[..., 0] + shift)
    slip = 2.0**-21 * (size.max(-1, keepdims=True) + 1)  # of a score in float32, LOG2_E and the sums included
    slip_p = np.expm1(np.minimum(2 * slip, 50.0))  # relative, of a probability
    round_p, least_p = {"fp8": (2.0**-4, 2.0**-17)}.get(
        precision.pv, (0.0, 2.0**-125) if precision.exact else (2.0**-8, 2.0**-24)
    )
    if precision.pv == "fp16" and not precision.exact and call.dtype != "bfloat16" and abs(v).max() <= 65504:
        round_p = 2.0**-11
    bound = p @ (v_error * 1.1) + (slip_p + 1.01 * round_p + 2.0**-18) * (p @ abs(v_seen))
    bound = bound + (p > 0).any() * (least_p / total) * abs(v_seen).sum(2, keepdims=True)
    out = p @ v_seen
    relative, absolute = DTYPES[call.dtype]
    bound = bound + relative * (abs(out) + bound) + absolute
    lse_bound = slip[..., 0] + 2.0**-19 * (
        1 + abs(np.where(blind, 0, lse)) + abs(shift) + abs(factor) * (np.einsum("bhnd,bhd->bhn", abs(q), abs(k_mean)))
    )
    return out.transpose(0, 2, 1, 3), bound.transpose(0, 2, 1, 3), lse, lse_bound


def half_error(v, dtype):
    """How far V's values may move when they become 16 bits wide: only float32's do."""
    if dtype != "float32":
        return np.zeros(v.shape)
    if abs(v).max() > 65504:
        return 2.0**-8 * abs(v)
    largest = abs(v).max(axis=2, keepdims=True)
    return np.maximum(2.0**-11 * abs(v), np.where(largest < 2.0**-14, 2.0**-11 * largest, 2.0**-25))


def worst(got, wanted, bound):
    """The largest error in units of its bound; NaN counts as infinite."""
    both = np.isneginf(got) & np.isneginf(wanted)
    with np.errstate(invalid="ignore"):
        error = np.where(both, 0.0, abs(got.astype(np.float64) - wanted) / bound)
    return float(np.nan_to_num(error, nan=np.inf).max())


@given(call=calls)
def test_every_element_is_that_of_the_codes(framework, call):
    arrays = call.arrays()
    tensors = [tensor_of(framework, x, call) for x in arrays]
    out, lse = result_of(lambda: lv.attention(*tensors, call.precision, call.layout, call.causal, call.scale, True))
    wanted, bound, wanted_lse, lse_bound = expected(framework, call, arrays)
    got = framework.numpy(out)
    got = got.transpose(0, 2, 1, 3) if call.layout == "HND" else got
    assert str(out.dtype).endswith(call.dtype) and got.shape == wanted.shape and tuple(lse.shape) == wanted_lse.shape
    assert worst(got, wanted, bound) <= 1
    assert worst(framework.numpy(lse), wanted_lse, lse_bound) <= 1
    alone = lv.attention(*tensors, call.precision, call.layout, call.causal, call.scale)
    np.testing.assert_array_equal(framework.numpy(alone), framework.numpy(out))
    for tensor, array in zip(tensors, arrays):  # the caller's tensors are as they were
        np.testing.assert_array_equal(framework.numpy(tensor), array.transpose(0, 2, 1, 3) if call.layout == "HND" else array)


@given(call=calls.filter(lambda call: call.kind in ("normal", "offset") and call.scale is None))
def test_every_row_of_ordinary_data_is_near_full_precision(framework, call):
    q, k, v = call.arrays()
    if call.kind == "offset" and not call.precision.smooth_k:
        k = k - k.mean(1, keepdims=True)
    q = q - q.mean(1, keepdims=True) if call.kind == "offset" else q
    tensors = [tensor_of(framework, x, call) for x in (q, k, v)]
    out, lse = result_of(lambda: lv.attention(*tensors, call.precision, call.layout, call.causal, call.scale, True))
    got = framework.numpy(out)
    got = got.transpose(0, 2, 1, 3) if call.layout == "HND" else got
    read = lambda t: framework.numpy(t).transpose(0, 2, 1, 3) if call.layout == "HND" else framework.numpy(t)
    wanted, wanted_lse = naive_attention(*map(read, tensors), call.scale, call.causal)
    noise, signal = ((got - wanted) ** 2).sum(-1), (wanted**2).sum(-1)
    floor = (read(tensors[2]).astype(np.float64) ** 2).sum(
        -1
    ).mean() / call.kv_len  # what the mean of so many rows of V amounts to
    least = next((db for name, db in ROW_DB.items() if name in call.precision.spec), 40.0)
    assert (noise <= (signal + floor) * 10 ** (-least / 10)).all(), float((noise / (signal + floor)).max())
    seen_keys = np.isfinite(wanted_lse)
    assert (np.isfinite(framework.numpy(lse)) == seen_keys).all()
    assert abs(framework.numpy(lse) - wanted_lse)[seen_keys].max(initial=0) <= LSE_ERROR[_coarsest(call.precision)]


LSE_ERROR = {"int2": 4.0, "int4": 1.0, "fp8": 0.5, "int8": 0.15, "exact": 1e-3}


def _coarsest(precision):
    return "exact" if precision.exact else next(name for name in LSE_ERROR if name in (precision.q, precision.k))


@given(
    data=st.data(),
    dim=st.sampled_from((32, 64, 72)),
    precision=precisions(),
    causal=st.booleans(),
    dtype=st.sampled_from(tuple(DTYPES)),
    seed=st.integers(0, 2**31),
)
def test_each_packed_sequence_is_attended_by_itself(framework, data, dim, precision, causal, dtype, seed):
    pairs = data.draw(
        st.lists(st.tuples(st.integers(0, 140), st.integers(0, 140)), min_size=1, max_size=4).filter(
            lambda pairs: all(map(sum, zip(*pairs)))
        )
    )
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    spare = data.draw(st.sampled_from((0, 1, 1000)))
    rng = np.random.default_rng(seed)
    q_len, kv_len = map(sum, zip(*pairs))
    q, k, v = (
        rounded(rng.standard_normal((n, h, dim)).astype(np.float32), dtype)
        for n, h in ((q_len, kv_heads * group), (kv_len, kv_heads), (kv_len, kv_heads))
    )
    begins = [np.cumsum([0, *lengths]) for lengths in zip(*pairs)]
    cu = [
        framework.tensor(one).astype("int32") if framework.name == "paddle" else framework.tensor(one).int() for one in begins
    ]
    longest = [max(1, max(lengths)) + spare for lengths in zip(*pairs)]
    tensors = [framework.tensor(x, dtype) for x in (q, k, v)]
    out, lse = result_of(lambda: lv.attention_varlen(*tensors, *cu, *longest, precision, causal, None, True))
    out, lse = framework.numpy(out), framework.numpy(lse)
    assert out.shape == q.shape and lse.shape == q.shape[1::-1]
    for (i_q, j_q), (i_k, j_k) in zip(*(zip(one, one[1:]) for one in begins)):
        if j_q == i_q:
            continue
        if j_k == i_k:
            assert (out[i_q:j_q] == 0).all() and np.isneginf(lse[:, i_q:j_q]).all()
            continue
        one, one_lse = lv.attention(
            *(framework.tensor(x[None], dtype) for x in (q[i_q:j_q], k[i_k:j_k], v[i_k:j_k])),
            precision,
            is_causal=causal,
            return_lse=True,
        )
        np.testing.assert_allclose(out[i_q:j_q], framework.numpy(one)[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[:, i_q:j_q], framework.numpy(one_lse)[0], rtol=1e-5, atol=1e-5)


@given(
    seed=st.integers(0, 2**31),
    tens=st.tuples(*[st.integers(-45, 38)] * 3),
    precision=precisions(),
    causal=st.booleans(),
    scale=scales,
    dtype=st.sampled_from(("float32", "bfloat16")),
)
def test_values_of_any_size_give_numbers_or_an_error(framework, seed, tens, precision, causal, scale, dtype):
    rng = np.random.default_rng(seed)
    arrays = [rounded((rng.uniform(-1, 1, (1, 33, 2, 32)) * np.float64(10) ** ten).astype(np.float32), dtype) for ten in tens]
    tensors = [framework.tensor(x, dtype) for x in arrays]
    result, error = result_or_refusal(lambda: lv.attention(*tensors, precision, is_causal=causal, scale=scale, return_lse=True))
    if error is not None:
        assert max(tens[:2]) > 16 or sum(tens[:2]) > 26 or tens[2] > 33 or (scale or 0) > 9, error
        return
    out, lse = map(framework.numpy, result)
    assert np.isfinite(lse).all() and np.isfinite(out).all()
    largest = abs(arrays[2]).max(axis=(1, 3), keepdims=True)
    assert (abs(out) <= largest * 1.15 + 1e-30).all()  # a weighted mean of V, as FP8 rounds it
    shifts = tens[0] + tens[1] + math.log10(max(1.0, abs(32**-0.5 if scale is None else scale)))
    if shifts < -6:  # all scores are alike
        wanted = np.stack([arrays[2][:, : row + 1 if causal else None].mean(1) for row in range(33)], 1)
        assert abs(out - wanted).max() <= largest.max() * 0.06 + 1e-30


MAY_BE = {
    "precision": lambda value: False,
    "tensor_layout": lambda value: False,
    "is_causal": is_flag,
    "return_lse": is_flag,
    "scale": lambda value: value is None or is_number(value) and np.all(abs(np.asarray(value, np.float64)) < 1e24),
    "backend": lambda value: isinstance(value, str) and value in ("auto", "reference"),
    "check_finite": lambda value: value is None or is_flag(value),
}
"""Whether an odd value is one to take for a choice of attention()."""


@pytest.mark.parametrize("name", MAY_BE)
@given(value=odd_values | st.sampled_from(BACKENDS), packed=st.booleans(), size=st.sampled_from((1, 5)))
def test_an_odd_choice_is_refused_by_name_or_was_none(framework, name, value, packed, size):
    arrays = qkv(q_len=size, dim=32)
    call = lambda **choices: lv.attention(*map(framework.tensor, arrays), **choices)
    if packed:
        cu = [integers(framework, [0, size])] * 2
        call = lambda **choices: lv.attention_varlen(*(framework.tensor(x[0]) for x in arrays), *cu, size, size, **choices)
        if name == "tensor_layout":
            return
    result, error = result_or_refusal(lambda: call(**{name: value}))
    assert (error is None) == MAY_BE[name](value), error
    assert error is None or name in str(error), error
    if error is None and name == "scale" and value is not None:
        wanted = call(scale=float(np.asarray(value).reshape(-1)[0]))
        np.testing.assert_array_equal(framework.numpy(result), framework.numpy(wanted))
    if error is None and name == "return_lse":
        assert isinstance(result, tuple) == bool(value)


def integers(framework, values, dtype="int32"):
    if framework.name == "paddle":
        import paddle

        return paddle.to_tensor(np.asarray(values)).astype(dtype)
    import torch

    return torch.from_numpy(np.asarray(values)).to(getattr(torch, dtype))


@given(data=st.data())
def test_odd_tensors_are_refused_whatever_they_are(framework, data):
    arrays = dict(zip("qkv", qkv(q_len=5, dim=32)))
    tensors = {name: framework.tensor(x) for name, x in arrays.items()}
    for name in data.draw(st.lists(st.sampled_from("qkv"), min_size=1, max_size=3, unique=True)):
        tensors[name] = data.draw(odd_tensors(framework, arrays[name]) | odd_values)
    if all(one is NOTHING or one is tensors[name] for name, one in tensors.items()):
        return
    choices = dict(tensor_layout=data.draw(st.sampled_from(("NHD", "HND"))), precision=data.draw(precisions()))
    fits = [
        tuple(getattr(t, "shape", ())) == arrays[name].shape and str(t.dtype).endswith("float32") for name, t in tensors.items()
    ]
    result, error = result_or_refusal(lambda: lv.attention(*tensors.values(), **choices))
    if error is None:
        assert len({str(t.dtype) for t in tensors.values()}) == 1
        wanted, _ = naive_attention(
            *(
                x if choices["tensor_layout"] == "NHD" else x.transpose(0, 2, 1, 3)
                for x in map(framework.numpy, tensors.values())
            )
        )
        got = framework.numpy(result)
        got = got if choices["tensor_layout"] == "NHD" else got.transpose(0, 2, 1, 3)
        assert got.shape == wanted.shape and np.isfinite(got).all()
        assert abs(got - wanted).max() < (3.0 if "int2" in choices["precision"].spec else 1.5)
    else:
        assert not all(fits) or "finite" in str(error) or "NaN" in str(error), error


@given(data=st.data())
def test_odd_beginnings_of_sequences_are_refused(framework, data):
    q, k, v = (framework.tensor(x[0]) for x in qkv(q_len=6, dim=32))
    begins = st.one_of(
        st.lists(st.integers(-2, 8), max_size=4).map(lambda x: (x, integers(framework, np.asarray(x, np.int64)))),
        st.lists(st.sampled_from((0, 6)), min_size=1, max_size=3).map(lambda x: (x, integers(framework, x))),
        st.sampled_from(("int64", "float32", "bool")).map(lambda dtype: (None, integers(framework, [0, 6], dtype))),
        st.just((None, integers(framework, [[0, 6]]))),
        odd_values.map(lambda x: (None, x)),
    )
    (cu_q, q_tensor), (cu_k, k_tensor) = data.draw(begins), data.draw(begins | st.just(([0, 6], integers(framework, [0, 6]))))
    longest = [data.draw(st.sampled_from((6, 8)) | odd_values) for _ in range(2)]
    good = all(cu is not None and len(cu) > 1 and cu[0] == 0 and cu[-1] == 6 and sorted(cu) == cu for cu in (cu_q, cu_k))
    good = (
        good
        and len(cu_q) == len(cu_k)
        and all(is_whole(one, max(np.diff(cu)), 2**31 - 1) for one, cu in zip(longest, (cu_q, cu_k)))
    )
    result, error = result_or_refusal(lambda: lv.attention_varlen(q, k, v, q_tensor, k_tensor, *longest))
    assert (error is None) == good, error
