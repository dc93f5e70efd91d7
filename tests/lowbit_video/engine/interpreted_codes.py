"""What a GPU runs of codes and rows, in Triton's CPU interpreter on CPU tensors, against what a CPU runs.

Not collected by itself: `tests/kernels/test_exchange.py` runs it in a process with TRITON_INTERPRET=1, which Triton reads
when a kernel is defined.
"""
import os
import types

import numpy as np
import pytest

from lowbit_video.engine import codes as engine
from lowbit_video.engine import codes_cpu, codes_gpu, rows
from lowbit_video.engine.codes import AttentionCodes, Codes
from lowbit_video.engine.options import options_of
from lowbit_video.kernels.exchange import reference
from lowbit_video.kernels.exchange.layout import joins, layout_of
from lowbit_video.precision import Precision
from lowbit_video.runtime import detect

from helpers import qkv, sqnr_db

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_exchange.py"
EVERYTHING = Precision("int8+fp8", smooth_q=True)
"""All statistics and all parts at once."""
PRECISIONS = [EVERYTHING, Precision("int8+fp16"), Precision("int4+fp8"), Precision("int8/int2+fp16", smooth_k=False)]


def options(precision, lse=True):
    return options_of(precision, "NHD", False, None, lse, "auto", None).scaled(32)


def given(framework, dtype="float32", q_len=150, kv_len=70, cut=slice(1, 4)):
    """q, k, v [2, N, 3, 32], heads cut out of more of them."""
    arrays = qkv(batch=2, heads=3 if cut == slice(None) else 5, q_len=q_len, kv_len=kv_len, dim=32)
    tensors = [framework.tensor(x, dtype)[:, :, cut] for x in arrays]
    return *tensors, detect.runtime_of(tensors[0])


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_statistics(framework, precision):
    q, k, v, runtime = given(framework)
    if not sum(engine.statistics_of(options(precision))):
        return
    wanted, got = (one.statistics(q, k, v, options(precision), runtime) for one in (codes_cpu, codes_gpu))
    np.testing.assert_allclose(framework.numpy(got), framework.numpy(wanted), atol=1e-6)
    gathered = runtime.concat([x.reshape([1, *runtime.shape(x)]) for x in (wanted, wanted * 2, got * 3)], 0)
    means = engine.statistics_of(options(precision))[0]
    weights = [[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]][:means]
    for _ in range(2):  # the second time by a plan, where there are any
        wanted, got = (framework.numpy(one.combined(gathered, weights, means, runtime)) for one in (codes_cpu, codes_gpu))
        np.testing.assert_allclose(got, wanted, atol=2e-6)
    by_counts = engine.combined(gathered, [1, 6, 3], [5, 2, 3], options(precision), runtime)
    if means == 2:
        np.testing.assert_allclose(framework.numpy(by_counts), wanted, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("records", [False, True], ids=["whole", "records"])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_codes(framework, precision, records, dtype):
    q, k, v, runtime = given(framework, dtype)
    choices = options(precision)
    found = engine.statistics(q, k, v, choices, runtime)
    layout = layout_of(engine.kind_of(q, choices, runtime), 2, 3, 150, 70, records)
    wanted = runtime.to_numpy(codes_cpu.encode(q, k, v, found, layout, tuple(layout.parts), choices, runtime, None))
    memory = runtime.from_numpy(np.full(layout.size, 0x55, np.uint8), q, "uint8")
    # Q's parts and K's and V's one after the other, as an exchange makes them; the engine chooses by device, so by hand here
    for of in ("q", "kv"):
        parts = tuple(name for name, part in layout.parts.items() if part.of == of)
        assert codes_gpu.encode(q, k, v, found, layout, parts, choices, runtime, memory) is memory
    got = runtime.to_numpy(memory)
    for name, part in layout.parts.items():
        one, other = (np.ascontiguousarray(reference.part_of(x, layout, name)) for x in (got, wanted))
        if part.dtype == "float32":
            np.testing.assert_allclose(one.view(np.float32), other.view(np.float32), rtol=1e-5, atol=1e-5, err_msg=name)
        elif name == "v" and precision.pv == "fp16":
            np.testing.assert_array_equal(one, other)
        else:
            assert (one != other).mean() < 2e-3, name


@pytest.mark.parametrize("cut", [slice(None), slice(1, 4)], ids=["contiguous", "cut"])
def test_values_of_one_copy(framework, cut):
    """V in 16 bits by any strides: of all heads and of some."""
    q, k, v, runtime = given(framework, "float16", cut=cut)
    choices = options(Precision("int8+fp16", smooth_k=False))
    layout = layout_of(engine.kind_of(q, choices, runtime), 2, 3, 0, 70)
    memory = runtime.to_numpy(codes_gpu.encode(q, k, v, None, layout, ("k_codes", "k_scale", "v"), choices, runtime, None))
    values = np.ascontiguousarray(reference.part_of(memory, layout, "v")).view(np.float16).reshape(2, 3, 70, 32)
    np.testing.assert_array_equal(values, framework.numpy(v).transpose(0, 2, 1, 3))


def test_copies(framework):
    """Shares in two memories joined into one, as a CPU does it; twice, for the tables are kept."""
    q, _, _, runtime = given(framework)
    kind = engine.kind_of(q, options(EVERYTHING), runtime)
    shares = [layout_of(kind, 2, 3, 128, 128, records=True), layout_of(kind, 2, 3, 40, 72, records=True)]
    targets = layout_of(kind, 2, 3, 168, 0), layout_of(kind, 2, 3, 0, 200)
    copies = []
    for number, share in enumerate(shares):
        copies += joins(share, 0, targets[0], 0, 128 * number, second=number == 1)
        copies += joins(share, 0, targets[1], targets[0].size, 128 * number, second=number == 1)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        sources = [runtime.from_numpy(rng.integers(0, 256, share.size, dtype=np.uint8), q, "uint8") for share in shares]
        results = []
        for one in (codes_cpu, codes_gpu):
            target = runtime.from_numpy(np.zeros(sum(x.size for x in targets), np.uint8), q, "uint8")
            one.copy_parts(sources, target, copies, 2, 3, runtime)
            results.append(runtime.to_numpy(target))
        np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("precision, dtype", [*zip(PRECISIONS, ["float16", "float32", "float32", "float16"])], ids=str)
def test_attention_of_codes(framework, precision, dtype):
    """Codes in the middle of a memory; every choice of the output's order, dtype and LSE."""
    q, k, v, runtime = given(framework, dtype, q_len=50, kv_len=140)
    for lse, smoothed, causal in ((True, False, False), (True, True, True), (False, False, True)):
        choices = options(precision, lse and not smoothed)
        found = engine.statistics(q, k, v, choices, runtime)
        kind = engine.kind_of(q, choices, runtime)
        layouts = layout_of(kind, 2, 3, 50, 0), layout_of(kind, 2, 3, 0, 140)
        begins = 256, 256 + layouts[0].size
        parts = [runtime.to_numpy(engine.encode(q, k, v, found, layout, choices, runtime)) for layout in layouts]
        memory = runtime.from_numpy(np.concatenate([np.full(256, 0x55, np.uint8), *parts]), q, "uint8")
        held = [Codes(memory, layout, begin) for layout, begin in zip(layouts, begins)]
        codes = AttentionCodes(*held, engine.v_scale_of(found, choices), choices, dtype)
        more = dict(is_causal=causal, return_lse=lse, smoothed_lse=smoothed, tokens_first=smoothed)
        (got, got_lse, variant), (wanted, wanted_lse, _) = (engine.attend(codes, runtime, backend=backend, **more)
                                                            for backend in ("triton", "reference"))
        assert variant.backend == "triton" and runtime.dtype_name(got) == dtype
        assert runtime.shape(got) == ((50, 2, 3, 32) if smoothed else (2, 50, 3, 32))
        # a P that rounding puts on another code moves single elements, not the sum
        assert sqnr_db(framework.numpy(got), framework.numpy(wanted)) > 45
        if lse:
            np.testing.assert_allclose(framework.numpy(got_lse), framework.numpy(wanted_lse), atol=5e-3)


@pytest.mark.parametrize("tokens_first", [True, False], ids=["tokens", "batch"])
def test_merge(framework, tokens_first):
    rng, shape = np.random.default_rng(0), (50, 2, 3, 32) if tokens_first else (2, 50, 3, 32)
    arrays = [rng.standard_normal(shape), rng.standard_normal(shape), *rng.standard_normal((2, 2, 3, 50)) * 3]
    arrays[2][0, 0, 3] = arrays[2][1, 1, 4] = arrays[3][1, 1, 4] = -np.inf
    for dtype in ("float32", "float16"):
        results = []
        for one in (codes_cpu, codes_gpu):
            out, part, lse, part_lse = (framework.tensor(x, "float16" if number == 1 else "float32")
                                        for number, x in enumerate(arrays))
            merged, both = one.merge(out, lse, part, part_lse, detect.runtime_of(out), tokens_first, dtype)
            assert detect.runtime_of(out).dtype_name(merged) == dtype
            results.append((framework.numpy(merged), np.nan_to_num(framework.numpy(both), neginf=-99)))
        for got, wanted in zip(*results):
            np.testing.assert_allclose(got, wanted, atol=1e-6 if dtype == "float32" else 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows(framework, dtype):
    """INT8 rows of three shares, and back among more heads; `given`'s runtime, but one that says it is no CPU."""
    x = framework.tensor(qkv(batch=97, heads=3, q_len=2, dim=32)[1], dtype)
    runtime = detect.runtime_of(x)
    gpu = types.SimpleNamespace(**{name: getattr(runtime, name) for name in dir(runtime) if not name.startswith("__")})
    gpu.is_cpu = lambda x: False
    (wanted, sizes), (got, sizes_there) = (rows.encode_rows(x, [50, 40, 7], 1, one) for one in (runtime, gpu))
    assert sizes == sizes_there == [rows.rows_size(50, 2, 3, 32), 0, rows.rows_size(7, 2, 3, 32)]
    count = 7 * 2 * 3
    padded = -(-count * 32 // 128) * 128
    assert sizes[2] == padded + -(-count * 4 // 128) * 128
    for begin, tokens in ((0, 50), (sizes[0], 7)):
        codes = slice(begin, begin + tokens * 2 * 3 * 32)
        one, other = (runtime.to_numpy(memory)[codes].view(np.int8).astype(int) for memory in (got, wanted))
        assert abs(one - other).max() <= 1 and (one != other).mean() < 1e-3
        outs = []
        for coder in (runtime, gpu):
            out = framework.tensor(np.full((2, tokens, 6, 32), 9.0), dtype)
            rows.decode_rows(wanted, begin, out, 2, 3, coder)
            outs.append(framework.numpy(out))
        np.testing.assert_array_equal(*outs)
        first = 0 if tokens == 50 else 90
        original = framework.numpy(x)[first:first + tokens].transpose(1, 0, 2, 3)
        assert sqnr_db(outs[0][:, :, 2:5], original) > 40 and (outs[0][:, :, [0, 1, 5]] == 9).all()
