"""The exchange's kernels in Triton's CPU interpreter against NumPy, on plain NumPy memory.

Not collected by itself: `test_exchange.py` runs it in a process with TRITON_INTERPRET=1, which Triton reads when a kernel is
defined.
"""
from __future__ import annotations

import os

import numpy as np
import pytest

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_exchange.py"

from lowbit_video.kernels.buffers import Buffer  # noqa: E402
from lowbit_video.kernels.exchange import copy_parts as module  # noqa: E402
from lowbit_video.kernels.exchange import reference  # noqa: E402
from lowbit_video.kernels.exchange.combine_stats import launch_combine_stats  # noqa: E402
from lowbit_video.kernels.exchange.copy_parts import TILE, WORD, launch_copy_parts, table_of  # noqa: E402
from lowbit_video.kernels.exchange.dequant_rows import launch_dequant_rows  # noqa: E402
from lowbit_video.kernels.exchange.layout import Copy  # noqa: E402
from lowbit_video.kernels.exchange.merge import launch_merge  # noqa: E402
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE  # noqa: E402
from lowbit_video.kernels.operands import Operand, codes_of  # noqa: E402
from lowbit_video.kernels.quant import reference as quant  # noqa: E402
from lowbit_video.kernels.quant.quant_qk import launch_quant_qk  # noqa: E402

import quick_interpreter  # noqa: E402, F401


def buffer(array, dtype=None):
    return Buffer(array.ctypes.data, dtype or array.dtype.name)


def copied(copies, sizes, batch, heads, monkeypatch):
    """(what the kernel makes of random memories, what NumPy makes, VECTOR that it was launched with)."""
    rng = np.random.default_rng(0)
    first, second, start = (rng.integers(0, 256, size, dtype=np.uint8) for size in sizes)
    wanted, got, vectors = start.copy(), start.copy(), []
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda *given, **more: (vectors.append(more["VECTOR"]), launch(*given, **more)))
    reference.copy_parts((first, second), wanted, copies, batch, heads)
    rows = table_of(copies)
    table = np.array(rows, np.int64)
    launch_copy_parts(*[buffer(x, "int32") for x in (first, second, got)], buffer(table), rows, batch=batch, heads=heads)
    assert (wanted != start).any()
    return got, wanted, vectors[0]


@pytest.mark.parametrize("words", [64, 100, 250, 300, 520, 3], ids=str)
def test_copies_of_rows(words, monkeypatch):
    """Two sources, two heads, rows of any width, some more of them than a tile has."""
    count, rows = WORD * words, TILE // 512 + 3 if words > 3 else 70
    row = count + 16
    one = Copy(16, 2 * rows * row, rows * row, row, 32, 2 * rows * count, rows * count, count, rows, count)
    other = one._replace(second=True, source=0, target=one.target + 4 * rows * count, source_row=count, rows=rows - 2)
    size = 4 * rows * row + 64
    got, wanted, vector = copied([one, other], (size, size, 8 * rows * count + 64), 2, 2, monkeypatch)
    np.testing.assert_array_equal(got, wanted)
    assert vector == (1 if words % 4 else 4)


@pytest.mark.parametrize("words", [1, 4, 512, TILE, TILE + 1, 2 * TILE + 520, 2 * TILE + 1022], ids=str)
def test_copies_in_one_piece(words, monkeypatch):
    """Counts that are not a multiple of a tile, of its rows or of a vector; a short piece beside a long one."""
    count = WORD * words
    long = Copy(0, 0, count, 0, 0, 0, count, 0, 1, count)
    short = Copy(4, 0, 8, 0, 2 * count, 0, 4, 0, 1, 4, second=True)
    got, wanted, vector = copied([long, short], (2 * count, 64, 2 * count + 64), 1, 2, monkeypatch)
    np.testing.assert_array_equal(got, wanted)
    assert vector == 1
    got, wanted, vector = copied([long], (2 * count, 64, 2 * count + 64), 1, 2, monkeypatch)
    np.testing.assert_array_equal(got, wanted)
    assert vector == (1 if words % 4 else 4)


@pytest.mark.parametrize("words, rows", [(6, 5), (6, 1), (510, 3)], ids=str)
def test_a_vector_never_reaches_past_the_end_of_a_row(words, rows, monkeypatch):
    """Where everything begins at a vector, and only the count is none."""
    row = 16 * -(-words // 4)
    one = Copy(16, 0, rows * row, row, 32, 0, rows * row, row, rows, 4 * words)
    got, wanted, vector = copied([one], (3 * rows * row, 64, 3 * rows * row), 1, 2, monkeypatch)
    np.testing.assert_array_equal(got, wanted)
    assert vector == 1


def test_copies_of_rows_beside_one_piece(monkeypatch):
    rows = Copy(0, 0, 40 * 48, 48, 0, 0, 40 * 64, 64, 40, 48)
    piece = Copy(0, 0, 3200, 0, 5120, 0, 3200, 0, 1, 3200, second=True)
    got, wanted, _ = copied([rows, piece], (3840, 6400, 12800), 1, 2, monkeypatch)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("rows, wide", [(1, 512), (2, 2500)])
def test_one_long_piece_is_cut_into_rows_of_the_most_columns(rows, wide):
    (row,) = table_of([Copy(16, 32, 48, 64, 80, 96, 112, 128, rows, 10000, True)])
    stride = [512, 512] if rows == 1 else [16, 32]
    assert row == [4, 8, 12, stride[0], 20, 24, 28, stride[1], rows, wide, 2500 * rows, 1]


def test_a_copy_that_does_not_go_by_words_is_our_mistake():
    for change in (dict(source=2), dict(target_row=6), dict(count=7), dict(source_head=1)):
        with pytest.raises(AssertionError):
            table_of([Copy(0, 0, 0, 8, 0, 0, 0, 8, 2, 8)._replace(**change)])


@pytest.mark.parametrize("means, statistics, n", [(2, 3, 1500), (1, 1, 64), (0, 1, 1024), (1, 2, 7)], ids=str)
def test_combine_stats(means, statistics, n):
    rng = np.random.default_rng(0)
    gathered = rng.standard_normal((3, statistics, n), dtype=np.float32)
    gathered[:, means:] = abs(gathered[:, means:])
    weights = rng.random((max(means, 1), 3), dtype=np.float32)
    out = np.full((statistics, n), np.nan, np.float32)
    launch_combine_stats(buffer(gathered), buffer(weights), buffer(out), n=n, shares=3, means=means, statistics=statistics)
    wanted = reference.combine_stats(gathered, weights[:means], means)
    np.testing.assert_allclose(out[:means], wanted[:means], atol=1e-6)
    np.testing.assert_array_equal(out[means:], wanted[means:])


@pytest.mark.parametrize("tokens_first", [True, False], ids=["tokens", "batch"])
@pytest.mark.parametrize("result", [None, np.float16], ids=["in_place", "float16"])
def test_merge(tokens_first, result):
    rng = np.random.default_rng(0)
    batch, heads, tokens, dim = 2, 3, 37, 24
    shape = (tokens, batch, heads, dim) if tokens_first else (batch, tokens, heads, dim)
    out, part = rng.standard_normal(shape, dtype=np.float32), rng.standard_normal(shape).astype(np.float16)
    lse, part_lse = (4 * rng.standard_normal((batch, heads, tokens)).astype(np.float32) for _ in range(2))
    lse[0, 1, 3:9] = part_lse[1, 2, 30:] = lse[1, 2, 33:] = -np.inf
    order = (1, 2, 0, 3) if tokens_first else (0, 2, 1, 3)
    wanted, wanted_lse = reference.merge([x.transpose(order).astype(np.float32) for x in (out, part)], [lse, part_lse])
    into = out if result is None else np.full(shape, np.nan, result)
    launch_merge(*map(buffer, (out, lse, part, part_lse, into)), shape=(batch, heads, tokens, dim), tokens_first=tokens_first)
    np.testing.assert_allclose(into.transpose(order), wanted, atol=1e-6 if result is None else 2e-3)
    assert (np.isneginf(lse) == np.isneginf(wanted_lse)).all() and np.isneginf(lse[1, 2, 33:]).all()
    seen = np.isfinite(wanted_lse)
    np.testing.assert_allclose(lse[seen], wanted_lse[seen], atol=2e-6)


def scattered(batch, heads, tokens, dim):
    """Memory for codes [B, heads, N, D] and scales of which neither are whole: (codes, scales, their operand)."""
    codes = np.full((batch, heads, tokens + 2, dim), 0x7F, np.int8)
    scale = np.full((batch, heads, tokens + 3), np.nan, np.float32)
    one = (tokens + 2) * dim
    return codes, scale, Operand(buffer(codes), (batch, heads, tokens, dim), (heads * one, one, dim), "int8", buffer(scale),
                                 None, (heads * (tokens + 3), tokens + 3))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tokens, dim", [(1, 24), (63, 64), (130, 32)], ids=str)
def test_dequant_rows(tokens, dim, dtype):
    rng = np.random.default_rng(0)
    codes, scale, operand = scattered(2, 3, tokens, dim)
    codes[:, :, :tokens] = rng.integers(-127, 128, (2, 3, tokens, dim))
    scale[:, :, :tokens] = rng.random((2, 3, tokens))
    out = np.full((2, tokens, 5, dim), np.nan, dtype)
    target = Operand(Buffer(out.ctypes.data + 2 * dim * out.itemsize, out.dtype.name), (2, 3, tokens, dim),
                     (tokens * 5 * dim, dim, 5 * dim), FORMAT_OF_DTYPE[out.dtype.name])
    launch_dequant_rows(operand, target)
    wanted = codes[:, :, :tokens].astype(np.float32) * scale[:, :, :tokens, None]
    np.testing.assert_array_equal(out[:, :, 2:].transpose(0, 2, 1, 3), wanted.astype(dtype))
    assert np.isnan(out[:, :, :2]).all()


@pytest.mark.parametrize("block", [None, 128], ids=str)
def test_quantisers_write_by_strides(block):
    """Codes, scales and what smoothing takes, each with strides of batch and head of its own."""
    rng, (batch, heads, tokens, dim) = np.random.default_rng(0), (2, 3, 150, 32)
    x = rng.standard_normal((batch, heads, tokens, dim), dtype=np.float32)
    mean, other = rng.standard_normal((2, batch, heads, dim), dtype=np.float32)
    codes, scale, into = scattered(batch, heads, tokens, dim)
    rows = np.full((2, batch, heads, tokens + 5), np.nan, np.float32)
    operand = Operand(buffer(x), x.shape, (heads * tokens * dim, tokens * dim, dim), "fp32")
    made = codes_of(operand, "int8", into.buffer, into.scale, block)._replace(
        strides=into.strides, scale_strides=into.scale_strides)
    strides = heads * (tokens + 5), tokens + 5
    launch_quant_qk(operand, made, mean=buffer(mean), bias=buffer(rows[0]), q_mean=buffer(other), token_strides=strides)
    wanted, wanted_scale = quant.quantize_rows(x, "int8", block, mean)
    assert (codes[:, :, :tokens] != wanted).mean() < 1e-3 and (codes[:, :, tokens:] == 0x7F).all()
    count = wanted_scale.shape[2]
    np.testing.assert_allclose(scale[:, :, :count], wanted_scale, rtol=1e-6)
    assert np.isnan(scale[:, :, count:]).all()
    launch_quant_qk(operand, made, lse_shift=buffer(rows[1]), k_mean=buffer(other), sm_scale=0.5, token_strides=strides)
    np.testing.assert_allclose(rows[0, :, :, :tokens], quant.score_bias(other, x, mean), atol=1e-5)
    np.testing.assert_allclose(rows[1, :, :, :tokens], 0.5 * np.einsum("bhnd,bhd->bhn", x, other), atol=1e-5)
    assert np.isnan(rows[:, :, :, tokens:]).all()
