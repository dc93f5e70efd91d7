"""The Hopper kernel's source on NumPy arrays against the oracle: masks, tiles, heads, scales, barriers, without a GPU."""
import dataclasses

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton, which exists for Linux only")

from lowbit_video.kernels.attention import reference  # noqa: E402
from lowbit_video.kernels.attention.hopper import launch  # noqa: E402
from lowbit_video.kernels.attention.hopper.build import CONFIGS, EXACT_CONFIGS, config_of  # noqa: E402
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE  # noqa: E402
from lowbit_video.kernels.operands import Operand, codes_of, v_codes_of  # noqa: E402
from lowbit_video.kernels.quant import reference as quant  # noqa: E402

from gluon_in_numpy import Memory  # noqa: E402
from helpers import EDGES_OF_TILES, drawn_to_the_diagonal  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # of rows that see no key


def attend(monkeypatch, q, k, v, *, qk="int8", pv="fp8", causal=False, shifted=True, config=None, out_dtype=np.float32):
    """(out, lse) by the launcher and the simulated kernel: q [B, Hq, N, D], k, v [B, Hkv, N, D] float32, quantised by NumPy.

    qk "exact": in pv's 16 bits as they are.
    """
    memory, kept = Memory(), []

    def buffer(array, dtype=None):
        kept.append(np.ascontiguousarray(array))
        return memory.buffer(kept[-1], dtype)

    monkeypatch.setattr(launch, "attn_fwd_kernel", memory.kernel())
    batch, heads, tokens, head_dim = q.shape
    mean = quant.token_mean(k)
    scale = head_dim**-0.5
    shape = lambda x: Operand(None, x.shape, (0, 0, 0), "fp16")

    def halves(x):  # [B, N, H, D] memory, as a model leaves it
        half = np.ascontiguousarray(x.transpose(0, 2, 1, 3)).astype(pv)
        n, h, d = half.shape[1:]
        return Operand(buffer(half), x.shape, (n * h * d, d, h * d), FORMAT_OF_DTYPE[half.dtype.name])

    coded = [halves(q), halves(k)] if qk == "exact" else []
    for x, block, less in () if coded else ((q, None, None), (k, 128, mean)):
        codes, scales = quant.quantize_rows(x, qk, block, less)
        coded.append(codes_of(shape(x), qk, buffer(codes), buffer(scales), block))
    if pv == "fp8":
        v_operand = v_codes_of(shape(v), *map(buffer, quant.quantize_v(v)))
    else:
        v_operand = halves(v)
    out = np.full((batch, tokens, heads, head_dim), np.nan, out_dtype)
    lse = np.full((batch, heads, tokens), np.nan, np.float32)
    shift = reference.lse_correction(q, mean, scale) if qk != "exact" else np.zeros_like(lse)
    out_operand = Operand(memory.buffer(out), q.shape, (tokens * heads * head_dim, head_dim, heads * head_dim), "fp32")
    launch.launch_attn_fwd(*coded, v_operand, out_operand, sm_scale=scale, is_causal=causal, config=config,
                           lse=memory.buffer(lse), lse_shift=buffer(shift) if shifted else None)
    return out.transpose(0, 2, 1, 3).astype(np.float32), lse if shifted else lse + shift


def oracle(q, k, v, *, qk="int8", pv="fp8", causal=False, config=None):
    half = "bf16" if pv == "bfloat16" else "fp16"
    config = config or config_of(q.shape[-1], half if qk == "exact" else qk, pv)
    values = v if pv == "fp8" else v.astype(pv).astype(np.float32)
    if qk == "exact":
        q, k = (x.astype(pv).astype(np.float32) for x in (q, k))
        return reference.attn_fwd(q, k, values, scale=q.shape[-1] ** -0.5, causal=causal, p_format=half, block_n=config.block_n,
                                  sum_rounded=config.sum_mma, backwards=True)
    return reference.lowbit_attention(
        q, k, values, q_format=qk, k_format=qk, pv_format="fp8" if pv == "fp8" else "fp16", scale=q.shape[-1] ** -0.5,
        causal=causal, half=half, block_n=config.block_n, sum_rounded=config.sum_mma, backwards=True, line=config.line)


def draw(batch, heads, kv_heads, q_len, kv_len, dim, seed=0):
    """Normal values; V's channels and heads of different size, so that a scale of another one shows."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, heads, q_len, dim), np.float32)
    k, v = rng.standard_normal((2, batch, kv_heads, kv_len, dim), np.float32)
    k += 2 * rng.standard_normal((1, kv_heads, 1, dim), np.float32)
    return q, k, v * np.exp(rng.standard_normal((batch, kv_heads, 1, dim), np.float32))


def assert_close(got, wanted, limit=2e-3, row_limit=2e-2, lse_limit=2e-3):
    """All rows together and each; P that the oracle rounds by another exponential falls to the other side here and there."""
    (out, lse), (ref, ref_lse) = got, wanted
    assert np.isfinite(out).all() and (np.isneginf(lse) == np.isneginf(ref_lse)).all()
    error, size = np.abs(out - ref).sum(-1), np.abs(ref).sum(-1)
    assert error.sum() <= limit * size.sum(), error.sum() / size.sum()
    assert (error <= row_limit * size).all(), (error / size).max()
    seen = np.isfinite(ref_lse)
    assert np.abs(lse - ref_lse)[seen].max(initial=0) <= lse_limit


EXACT_BUILDS = [(64, "float16"), (128, "float16"), (64, "bfloat16"), (128, "bfloat16")]
EXACT_LIMITS = {"float16": dict(limit=5e-4, row_limit=5e-3, lse_limit=1e-4),
                "bfloat16": dict(limit=2.5e-3, row_limit=1e-2, lse_limit=1e-4)}
"""P alone is rounded: where a maximum stays short of the oracle's (`lazy`), on another grid, and both roundings count."""
BUILDS = [(64, "fp8"), (128, "fp8"), (64, "float16"), (128, "float16"), (64, "bfloat16")]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim, pv", BUILDS, ids=str)
def test_every_build(head_dim, pv, causal, monkeypatch):
    """Two batches, grouped queries, ragged ends, several tiles and, of 384 rows, several programs."""
    given = draw(2, 4, 2, 200, 333, head_dim)
    options = dict(pv=pv, causal=causal)
    assert_close(attend(monkeypatch, *given, **options), oracle(*given, **options))


@pytest.mark.parametrize("lengths", [*EDGES_OF_TILES, (1, 1), (384, 150), (192, 318), (193, 256), (384, 257)], ids=str)
def test_causal_at_the_edges_of_tiles(lengths, monkeypatch):
    q, k, v = draw(1, 2, 1, *lengths, 64)
    given = q, drawn_to_the_diagonal(q, k), v
    assert_close(attend(monkeypatch, *given, causal=True), oracle(*given, causal=True))


@pytest.mark.parametrize("lengths", [(128, 128), (64, 129), (65, 127), (192, 256), (1, 1)], ids=str)
def test_ragged_ends(lengths, monkeypatch):
    given = draw(1, 1, 1, *lengths, 128)
    assert_close(attend(monkeypatch, *given, pv="float16"), oracle(*given, pv="float16"))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim, dtype", EXACT_BUILDS, ids=str)
def test_every_exact_build(head_dim, dtype, causal, monkeypatch):
    """Two batches, grouped queries, ragged ends, several tiles and, of 384 rows, several programs; scores nobody rounded."""
    given, options = draw(2, 4, 2, 200, 333, head_dim), dict(qk="exact", pv=dtype, causal=causal)
    got = attend(monkeypatch, *given, **options)
    assert_close(got, oracle(*given, **options), **EXACT_LIMITS[options["pv"]])


@pytest.mark.parametrize("lengths", [*EDGES_OF_TILES, (1, 1), (384, 150), (192, 318), (193, 256), (384, 257)], ids=str)
def test_exact_causal_at_the_edges_of_tiles(lengths, monkeypatch):
    q, k, v = draw(1, 2, 1, *lengths, 64)
    given, options = (q, drawn_to_the_diagonal(q, k), v), dict(qk="exact", pv="float16", causal=True)
    assert_close(attend(monkeypatch, *given, **options), oracle(*given, **options), **EXACT_LIMITS[options["pv"]])


@pytest.mark.parametrize("lengths", [(128, 128), (64, 129), (65, 127), (192, 256), (1, 1)], ids=str)
def test_exact_ragged_ends(lengths, monkeypatch):
    given, options = draw(1, 1, 1, *lengths, 128), dict(qk="exact", pv="bfloat16")
    assert_close(attend(monkeypatch, *given, **options), oracle(*given, **options), **EXACT_LIMITS[options["pv"]])


@pytest.mark.parametrize("change", [dict(lazy=False), dict(sum_mma=True), dict(stages=2), dict(consumers=2), dict(turns=True),
                                    dict(hold=8, turns=True), dict(block_n=64, stages=4), dict(pin=True)], ids=str)
def test_what_exact_configurations_choose_moves_no_value(change, monkeypatch):
    given, config = draw(1, 1, 1, 130, 520, 64), dataclasses.replace(EXACT_CONFIGS[64], **change)
    options = dict(qk="exact", pv="float16", config=config)
    assert_close(attend(monkeypatch, *given, **options), oracle(*given, **options), **EXACT_LIMITS[options["pv"]])


@pytest.mark.parametrize("shifted", [False, True])
def test_fp8_scores_and_an_lse_with_and_without_a_shift(shifted, monkeypatch):
    given = draw(1, 3, 1, 70, 140, 64)
    assert_close(attend(monkeypatch, *given, qk="fp8", shifted=shifted), oracle(*given, qk="fp8"))


@pytest.mark.parametrize("change", [dict(lazy=False), dict(sum_mma=True), dict(stages=2), dict(consumers=2), dict(turns=True)],
                         ids=str)
def test_what_configurations_choose_moves_no_value(change, monkeypatch):
    given, config = draw(1, 1, 1, 130, 520, 64), dataclasses.replace(CONFIGS[64, False], **change)
    assert_close(attend(monkeypatch, *given, pv="float16", config=config), oracle(*given, pv="float16", config=config))


@pytest.mark.parametrize("rises", [(0, 0), (7, 0), (12, 0), (30, 0), (5, 5), (7, 12), (100, 0)], ids=str)
@pytest.mark.parametrize("row", [0, 9, 63], ids=str)
def test_a_row_whose_maximum_rises_from_tile_to_tile(row, rises, monkeypatch):
    """By powers of two; of a warp's rows it is one alone, whose maximum may stay short by 2**8 and no more."""
    config = CONFIGS[64, False]
    assert config.lazy
    q, k, v = draw(1, 1, 1, 64, 3 * config.block_n, 64)
    q[..., 0], k[..., 0] = 0, 0
    q[:, :, row, 0] = 8
    for tile, rise in ((1, rises[0]), (0, sum(rises))):  # tiles are visited from the last to the first
        k[:, :, tile * config.block_n:(tile + 1) * config.block_n, 0] = rise / (8 * 64**-0.5 * np.log2(np.e))
    assert_close(attend(monkeypatch, q, k, v, pv="float16"), oracle(q, k, v, pv="float16"))


def test_output_in_16_bits(monkeypatch):
    given = draw(1, 1, 1, 70, 140, 64)
    out, lse = attend(monkeypatch, *given, out_dtype=ml_dtypes.bfloat16)
    assert_close((out, lse), oracle(*given), limit=4e-3)
