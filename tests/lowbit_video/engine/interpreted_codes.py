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
from lowbit_video.engine.codes_target import Target
from lowbit_video.engine.options import options_of
from lowbit_video.kernels.exchange import reference
from lowbit_video.kernels.exchange.layout import joins, layout_of
from lowbit_video.precision import Precision
from lowbit_video.runtime import detect

import quick_interpreter  # noqa: F401
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
@pytest.mark.parametrize("heads_first", [False, True], ids=["batch_first", "heads_first"])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_codes(framework, precision, heads_first, dtype):
    """As an exchange makes them: Q's parts and K's and V's one after the other, among other tokens, in the middle of a memory,
    with statistics of more heads."""
    q, k, v, runtime = given(framework, dtype)
    choices = options(precision)
    more = [runtime.concat([x[:, :, 1:], x, x[:, :, :1]], 2) for x in (q, k, v)]
    found = engine.statistics(*more, choices, runtime)  # heads 2, 3 and 4 of them are these
    layout = layout_of(engine.kind_of(q, choices, runtime), 2, 3, 250, 300, heads_first)
    memories = []
    for one in (codes_cpu, codes_gpu):  # the engine chooses by device
        memory = runtime.from_numpy(np.full(384 + layout.size, 0x55, np.uint8), q, "uint8")
        for of in ("q", "kv"):
            parts = tuple(name for name, part in layout.parts.items() if part.of == of)
            one.encode((q, k, v), found, 2, layout, parts, (100, 128), choices, runtime, memory, 256)
        memories.append(runtime.to_numpy(memory))
    wanted, got = memories
    untouched = np.ones(wanted.shape, bool)
    for name, part in layout.parts.items():
        first, tokens = (100, 150) if part.of == "q" else (128, 70)
        written = slice(part.row_bytes(first), part.row_bytes(first) + part.row_bytes(tokens))
        reference.part_of(untouched[256:].view(np.uint8), layout, name)[..., written] = 0
        one, other = (np.ascontiguousarray(reference.part_of(x[256:], layout, name)[..., written]) for x in (got, wanted))
        if part.dtype == "float32":
            np.testing.assert_allclose(one.view(np.float32), other.view(np.float32), rtol=1e-5, atol=1e-5, err_msg=name)
        elif name == "v" and precision.pv == "fp16":
            np.testing.assert_array_equal(one, other)
        else:
            assert (one != other).mean() < 2e-3, name
    assert all((memory[untouched] == 0x55).all() for memory in memories)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_codes_of_these_heads_are_those_of_their_own_statistics(framework, precision):
    q, k, v, runtime = given(framework)
    choices = options(precision)
    layout = layout_of(engine.kind_of(q, choices, runtime), 2, 2, 150, 70)
    cut = [x[:, :, 1:] for x in (q, k, v)]
    found = engine.statistics(q, k, v, choices, runtime)
    own = engine.statistics(*cut, choices, runtime)
    for one in (codes_cpu, codes_gpu):
        memories = [runtime.from_numpy(np.zeros(layout.size, np.uint8), q, "uint8") for _ in range(2)]
        one.encode(cut, own, 0, layout, tuple(layout.parts), (0, 0), choices, runtime, memories[0], 0)
        one.encode(cut, found, 1, layout, tuple(layout.parts), (0, 0), choices, runtime, memories[1], 0)
        np.testing.assert_array_equal(*map(runtime.to_numpy, memories))


@pytest.mark.parametrize("cut", [slice(None), slice(1, 4)], ids=["contiguous", "cut"])
def test_values_of_one_copy(framework, cut):
    """V in 16 bits by any strides: of all heads and of some."""
    q, k, v, runtime = given(framework, "float16", cut=cut)
    choices = options(Precision("int8+fp16", smooth_k=False))
    layout = layout_of(engine.kind_of(q, choices, runtime), 2, 3, 0, 70)
    memory = runtime.empty((layout.size,), "uint8", q)
    codes_gpu.encode((q, k, v), None, 0, layout, ("k_codes", "k_scale", "v"), (0, 0), choices, runtime, memory, 0)
    values = np.ascontiguousarray(reference.part_of(runtime.to_numpy(memory), layout, "v")).view(np.float16)
    np.testing.assert_array_equal(values.reshape(2, 3, 70, 32), framework.numpy(v).transpose(0, 2, 1, 3))


def test_copies(framework):
    """Shares in two memories joined into one, as a CPU does it; twice, for the tables are kept."""
    q, _, _, runtime = given(framework)
    kind = engine.kind_of(q, options(EVERYTHING), runtime)
    shares = [layout_of(kind, 2, 3, 128, 128, heads_first=True), layout_of(kind, 2, 3, 40, 72)]
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


@pytest.mark.parametrize("precision, dtype", [*zip(PRECISIONS, ["float16", "float32", "bfloat16", "float16"])], ids=str)
def test_attention_of_codes(framework, precision, dtype):
    """Codes in the middle of a memory; every choice of the order, of the LSE, and of where the output goes."""
    q, k, v, runtime = given(framework, dtype, q_len=50, kv_len=140)
    if dtype == "float32":
        v = v * 1e5  # beyond float16's range
    for lse, smoothed, causal, heads_first, given_target in ((True, False, False, True, True), (True, True, True, False, False),
                                                             (False, False, True, True, False)):
        choices = options(precision, lse and not smoothed)
        found = engine.statistics(q, k, v, choices, runtime)
        kind = engine.kind_of(q, choices, runtime)
        layouts = [layout_of(kind, 2, 3, *lengths, heads_first) for lengths in ((50, 0), (0, 140))]
        begins = 256, 256 + layouts[0].size
        memory = runtime.from_numpy(np.full(begins[1] + layouts[1].size, 0x55, np.uint8), q, "uint8")
        for layout, begin in zip(layouts, begins):
            assert engine.encode((q, k, v), found, layout, choices, runtime, memory=memory, begin=begin) is memory
        scale = engine.v_scale_of(found, choices)
        if scale is not None and heads_first:
            scale = runtime.permute(scale, (1, 0, 2))
        held = [Codes(memory, layout, begin) for layout, begin in zip(layouts, begins)]
        codes, (outer, inner) = AttentionCodes(*held, scale, choices, dtype), layouts[0].order
        row, size = (inner + 1) * 32, 4 if dtype == "float32" else 2
        targets = [Target(framework.tensor(np.full((outer, 60, inner + 1, 32), 7.0), dtype), (9 * row + 32) * size,
                          (60 * row, 32, row)) if given_target else None for _ in range(2)]
        results = []
        for backend, target in zip(("triton", "reference"), targets):
            out, out_lse, variant = engine.attend(codes, runtime, backend=backend, is_causal=causal, return_lse=lse,
                                                  smoothed_lse=smoothed, tokens_first=smoothed, target=target)
            assert variant.backend == backend and runtime.dtype_name(out) == dtype
            out = framework.numpy(out)
            if given_target:
                assert (out[:, :9] == 7).all() and (out[:, 59:] == 7).all() and (out[:, :, 0] == 7).all()
                out = out[:, 9:59, 1:]
            assert out.shape == ((50, outer, inner, 32) if smoothed else (outer, 50, inner, 32))
            results.append((out, framework.numpy(out_lse) if lse else None))
        (got, got_lse), (wanted, wanted_lse) = results
        assert np.array_equal(got, wanted) or sqnr_db(got, wanted) > 40  # a P on another code moves single elements
        if lse:
            np.testing.assert_allclose(got_lse, wanted_lse, atol=5e-3)


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
