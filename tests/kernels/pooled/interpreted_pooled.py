"""The kernels of pooled attention in Triton's CPU interpreter against the NumPy oracle, on plain NumPy memory.

Not collected by itself: `test_pooled_interpreted.py` runs it in a process with TRITON_INTERPRET=1.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_pooled_interpreted.py"
sys.path.append(str(Path(__file__).parents[1]))

from interpreted_portable import buffer, operand, poisoned  # noqa: E402

from lowbit_video.kernels.attention.portable import launch_attn_fwd  # noqa: E402
from lowbit_video.kernels.attention.reference import lowbit_attention  # noqa: E402
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE, scale_block  # noqa: E402
from lowbit_video.kernels.operands import Listed, codes_of, v_codes_of  # noqa: E402
from lowbit_video.kernels.pooled import reference  # noqa: E402
from lowbit_video.kernels.pooled.choose import launch_lists, launch_scores  # noqa: E402
from lowbit_video.kernels.pooled.part import launch_pooled_part  # noqa: E402
from lowbit_video.kernels.pooled.tile_stats import launch_key_tiles, launch_query_tiles  # noqa: E402
from lowbit_video.kernels.pooled.tiles import query_tile  # noqa: E402
from lowbit_video.kernels.quant import reference as quant  # noqa: E402
from lowbit_video.kernels.quant.quant_qk import launch_quant_qk  # noqa: E402
from lowbit_video.kernels.quant.quant_v import launch_quant_v  # noqa: E402
from lowbit_video.kernels.quant.shapes import code_shape, scale_shape  # noqa: E402
from lowbit_video.kernels.tuning import TileConfig  # noqa: E402
from pooled_inputs import smooth_qkv  # noqa: E402

TILE = TileConfig(64, 128, 4, 2)
SHAPES = [((1, 2, 200, 64), 1, 400, 0, np.float16), ((2, 1, 140, 128), 1, 300, 3, np.float32),
          ((1, 1, 130, 72), 1, 270, 0, np.float16), ((1, 1, 100, 64), 1, 256, 0, np.float32)]
"""[B, Hq, N, D], heads of keys, their number, `always` and dtype: ragged ends, several query tiles, groups, an odd head dim."""


def of_tiles(q, k, *more, dtype=np.float32):
    rows, tiles = -(-q.shape[2] // query_tile(q.shape[3])), -(-k.shape[2] // 128)
    shape = {"q": (*q.shape[:2], rows), "k": (*k.shape[:2], tiles), "qk": (*q.shape[:2], rows, tiles)}
    return [poisoned((*shape[what], *([q.shape[3]] if channels else [])), dtype) for what, channels in more]


class Run:
    """All of pooled attention by the launchers; what each leaves is kept under its name. how: the build of the pooled part."""

    def __init__(self, q, k, v, keep, always=0, smooth=True, fp8=True, how=None):
        self.q, self.k, self.v, self.scale = q, k, v, q.shape[-1] ** -0.5
        self.means, self.k_var, self.v_absmax = of_tiles(q, k, ("k", True), ("k", True), ("k", True))
        self.keys, self.values = of_tiles(q, k, ("k", True), ("k", True), dtype=q.dtype)
        self.v_spread, self.count, self.scores, self.listed_scale = of_tiles(q, k, ("k", False), ("q", False), ("qk", False),
                                                                             ("qk", False))
        self.count, self.tiles = np.full(self.count.shape, -7, np.int32), np.full(self.scores.shape, -7, np.int32)
        self.q_means, self.q_squares = of_tiles(q, k, ("q", True), ("q", True))
        self.k_mean, self.v_scale = (poisoned((*k.shape[:2], k.shape[3])) for _ in "kv")
        launch_key_tiles(operand(k), operand(v), means=buffer(self.means), keys=buffer(self.keys), k_var=buffer(self.k_var),
                         values=buffer(self.values), v_spread=buffer(self.v_spread),
                         k_mean=buffer(self.k_mean) if smooth else None, v_absmax=buffer(self.v_absmax) if fp8 else None,
                         v_scale=buffer(self.v_scale) if fp8 else None)
        launch_query_tiles(operand(q), means=buffer(self.q_means), squares=buffer(self.q_squares))
        shapes = dict(q_shape=q.shape, kv_shape=k.shape)
        launch_scores(q_means=buffer(self.q_means), q_squares=buffer(self.q_squares), keys=buffer(self.keys),
                      k_var=buffer(self.k_var), v_spread=buffer(self.v_spread), scores=buffer(self.scores), **shapes,
                      sm_scale=self.scale)
        self.k_scale = np.arange(1, 1 + self.v_spread.size, dtype=np.float32).reshape(self.v_spread.shape)
        self.error_scores = self.scores.copy()
        launch_lists(scores=buffer(self.scores), k_scale=buffer(self.k_scale), tiles=buffer(self.tiles),
                     scale=buffer(self.listed_scale), count=buffer(self.count), **shapes, keep=keep, always=always)
        self.out, self.part_lse = poisoned(q.shape), poisoned(q.shape[:3])
        launch_pooled_part(operand(q), operand(self.out), keys=buffer(self.keys), values=buffer(self.values),
                           bias=buffer(self.scores), part_lse=buffer(self.part_lse), kv_shape=k.shape, sm_scale=self.scale,
                           how=how)

    def listed(self):
        self.out[np.isneginf(self.part_lse)] = np.nan  # not to be read
        return Listed(buffer(self.tiles), buffer(self.count), None, buffer(self.part_lse), query_tile(self.q.shape[-1]))


def float32(*arrays):
    return [x.astype(np.float32) for x in arrays]


@pytest.mark.parametrize("shape, kv_heads, kv_len, always, dtype", SHAPES, ids=str)
def test_every_part(shape, kv_heads, kv_len, always, dtype):
    q, k, v = smooth_qkv(shape, kv_heads, kv_len, dtype=dtype, layout="NHD")
    keep = [0.25] * (shape[1] - 1) + [0.5]
    run = Run(q, k, v, keep, always=always, how=(128, 64, 8, 2) if dtype == np.float16 else None)
    q32, k32, v32 = float32(q, k, v)
    np.testing.assert_allclose(run.k_mean, quant.token_mean(k32), atol=2e-6)
    np.testing.assert_array_equal(run.v_scale, quant.v_scale(v32))
    stats = reference.tile_stats(k32, v32, quant.token_mean(k32), FORMAT_OF_DTYPE[np.dtype(dtype).name])
    eps = 1e-3 if dtype == np.float16 else 1e-5
    np.testing.assert_allclose(run.keys.astype(np.float32), stats.keys, atol=eps, rtol=eps)
    np.testing.assert_allclose(run.values.astype(np.float32), stats.values, atol=eps, rtol=eps)
    np.testing.assert_allclose(run.k_var, stats.k_var, rtol=1e-4)
    np.testing.assert_allclose(run.v_spread, stats.v_spread, rtol=1e-4)
    scores = reference.error_scores(q32, stats, run.scale)
    np.testing.assert_allclose(run.error_scores, scores, atol=5e-3)
    chosen = reference.choose(run.error_scores, keep, always, shape[-1])
    assert_lists(run, chosen, shape[1] // kv_heads)
    part, lse = reference.pooled_part(q32, stats, chosen, run.scale)
    np.testing.assert_array_equal(np.isneginf(run.part_lse), np.isneginf(lse))
    seen = np.isfinite(lse)
    np.testing.assert_allclose(run.part_lse[seen] * np.log(2), lse[seen], atol=5e-3)
    np.testing.assert_allclose(run.out[seen], part[seen], atol=4e-3, rtol=4e-3)


def test_more_tiles_than_are_folded_at_once():
    """Of 65 tiles the last one has the largest values, and fewer of them."""
    q, k, v = smooth_qkv((1, 1, 1, 32), kv_len=64 * 128 + 9)
    k[:, :, -9:] += 50
    v[:, :, -1] *= 20
    means, k_var, absmax, keys, values = of_tiles(q, k, *[("k", True)] * 5)
    (spread,), mean, scale = of_tiles(q, k, ("k", False)), poisoned((1, 1, 32)), poisoned((1, 1, 32))
    launch_key_tiles(operand(k), operand(v), means=buffer(means), keys=buffer(keys), k_var=buffer(k_var), values=buffer(values),
                     v_spread=buffer(spread), k_mean=buffer(mean), v_absmax=buffer(absmax), v_scale=buffer(scale))
    np.testing.assert_allclose(mean, quant.token_mean(k), atol=1e-5)
    np.testing.assert_array_equal(scale, quant.v_scale(v))
    np.testing.assert_allclose(keys, reference.tile_stats(k, v, quant.token_mean(k)).keys, atol=1e-4)


def assert_lists(run, chosen, group):
    """The lists are the chosen tiles in ascending order, their scales beside them; nothing else is written."""
    bias = np.log2(np.minimum(128, run.k.shape[2] - 128 * np.arange(chosen.shape[-1])))
    for place in np.ndindex(chosen.shape[:3]):
        wanted, count = np.flatnonzero(chosen[place]), run.count[place]
        assert count == len(wanted) >= 1
        np.testing.assert_array_equal(run.tiles[place][:count], wanted)
        assert (run.tiles[place][count:] == -7).all() and np.isnan(run.listed_scale[place][count:]).all()
        np.testing.assert_array_equal(run.listed_scale[place][:count], run.k_scale[place[0], place[1] // group, wanted])
        np.testing.assert_allclose(run.scores[place], np.where(chosen[place], -np.inf, bias), atol=1e-6)


def attend(q, k, v, formats, keep, always=0, granularity="block", smooth_q=False, arch=(9, 0), tile=TILE):
    """(out, lse, run) by the launchers, from quantising to the end."""
    q_format, k_format, pv = formats
    run = Run(q, k, v, keep, always)
    group, block = q.shape[1] // k.shape[1], scale_block("k", granularity)
    kept = []

    def coded(x, format, block, **more):
        codes, scale = poisoned(code_shape(x.shape, format), np.uint8), poisoned(scale_shape(x.shape, block))
        made = codes_of(operand(x), format, buffer(codes), buffer(scale), block)
        launch_quant_qk(operand(x), made, group=group, **more)
        kept.extend([codes, scale])
        return made

    q_mean, bias, shift = quant.token_mean(q.astype(np.float32)), poisoned((*q.shape[:2], k.shape[2])), poisoned(q.shape[:3])
    k_codes = coded(k, k_format, block, mean=buffer(run.k_mean), bias=buffer(bias) if smooth_q else None,
                    q_mean=buffer(q_mean) if smooth_q else None)
    q_codes = coded(q, q_format, None, mean=buffer(q_mean) if smooth_q else None, lse_shift=buffer(shift),
                    k_mean=buffer(run.k_mean), sm_scale=run.scale)
    values = operand(v)
    if pv == "fp8":
        padded = poisoned((*v.shape[:2], v.shape[3], -(-v.shape[2] // 128) * 128), np.uint8)
        values = v_codes_of(operand(v), buffer(padded), buffer(run.v_scale))
        launch_quant_v(operand(v), values)
        kept.append(padded)
    lse = poisoned(q.shape[:3])
    launch_attn_fwd(q_codes, k_codes, values, operand(run.out), sm_scale=run.scale, arch=arch, config=tile, lse=buffer(lse),
                    lse_shift=buffer(shift), bias=buffer(bias) if smooth_q else None, listed=run.listed(), pv_dtype=half_of(v))
    return run.out, lse, run


def half_of(v):
    return "float16" if v.dtype == np.float16 else "bfloat16"


def oracle(q, k, v, formats, keep, always=0, granularity="block", smooth_q=False, block_n=128):
    q_format, k_format, pv = formats
    return lowbit_attention(*float32(q, k, v), q_format=q_format, k_format=k_format, pv_format=pv, granularity=granularity,
                            smooth_q=smooth_q, scale=q.shape[-1] ** -0.5, block_n=block_n, keep=keep, always=always,
                            pool_format=FORMAT_OF_DTYPE[q.dtype.name], half="fp16" if q.dtype == np.float16 else "bf16")


def assert_close(got, wanted, limit=3e-3, row_limit=0.05, lse_limit=1e-2):
    out, lse = got[:2]
    error, size = np.abs(out - wanted[0]).sum(-1), np.abs(wanted[0]).sum(-1)
    assert error.sum() <= limit * size.sum(), error.sum() / size.sum()
    assert (error <= row_limit * size).all(), (error / size).max()
    assert np.abs(lse - wanted[1]).max() <= lse_limit


TMA, POINTERS = (9, 0), (8, 9)
EVERY = [("int8", "int8", "fp16", TMA), ("fp8", "fp8", "fp8", POINTERS), ("int4", "int4", "fp16", POINTERS),
         ("int8", "int2", "fp8", TMA)]
"""Of what each format brings to the kernel's code every piece, once."""


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_every_precision_walks_lists(case):
    """Two heads of queries to one of keys, of 300 keys three tiles, of which one or two are listed."""
    *formats, arch = case
    coarse = formats[1] in ("int4", "int2")
    options = dict(keep=[0.3, 0.6], granularity="token" if coarse else "block", smooth_q=formats[0] in ("int4", "int2"))
    q, k, v = smooth_qkv((1, 2, 70, 64), 1, kv_len=300, dtype=np.float16)
    assert_close(attend(q, k, v, formats, arch=arch, **options), oracle(q, k, v, formats, **options))


@pytest.mark.parametrize("head_dim, kv_len, tile", [
    (64, 320, TileConfig(128, 64, 4, 2)), (64, 65, TileConfig(64, 32, 4, 1)),
    (128, 300, TileConfig(64, 128, 4, 2, sum_mma=True))], ids=str)
def test_tiles_and_ends_of_the_sequence(head_dim, kv_len, tile):
    """A listed tile is walked in parts; of a ragged last one the whole, or a part, may lie behind the end."""
    q, k, v = smooth_qkv((1, 1, 140, head_dim), kv_len=kv_len, dtype=np.float16)
    formats, keep = ("int8", "int8", "fp8"), [0.5]
    assert_close(attend(q, k, v, formats, keep, tile=tile), oracle(q, k, v, formats, keep, block_n=tile.block_n))


@pytest.mark.parametrize("keep, always", [(0.0, 0), (0.0, 150), (1.0, 0)], ids=str)
def test_nothing_kept_everything_kept_and_what_is_kept_in_any_case(keep, always):
    q, k, v = smooth_qkv((1, 1, 260, 64), kv_len=400, dtype=np.float16)
    formats = ("int8", "int8", "fp16")
    out, lse, run = attend(q, k, v, formats, [keep], always)
    assert_close((out, lse), oracle(q, k, v, formats, [keep], always))
    rows = np.arange(run.count.shape[-1]) * 192 < always
    assert (run.count[..., rows] == 4).all()
    assert (run.count[..., ~rows] == max(4 * int(keep), 1 + -(-always // 128))).all()
    assert (np.isneginf(run.part_lse) == (run.count.repeat(192, -1)[..., :260] == 4)).all()


def test_bfloat16():
    """Of which the interpreter cuts bits off where a GPU rounds."""
    q, k, v = smooth_qkv((1, 1, 60, 64), kv_len=200, dtype=ml_dtypes.bfloat16)
    formats = ("int8", "int8", "fp16")
    assert_close(attend(q, k, v, formats, [0.5]), oracle(q, k, v, formats, [0.5]), limit=2e-2, row_limit=0.1)


def test_ties_go_to_the_first_tiles():
    """Equal tiles have equal scores: exactly as many are listed as were asked for."""
    q, k, v = smooth_qkv((1, 1, 192, 64), kv_len=128, dtype=np.float32)
    k, v = (np.ascontiguousarray(np.tile(x, (1, 1, 9, 1))) for x in (k, v))
    run = Run(q, k, v, [0.5])
    assert run.count.tolist() == [[[5]]] and run.tiles[0, 0, 0, :5].tolist() == [0, 1, 2, 3, 8]


def test_scores_of_any_sign_and_size_are_ordered():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((1, 1, 1, 37), np.float32) * 10.0 ** rng.integers(-30, 30, 37)
    scores[..., :4] = -0.0, 0.0, -np.inf, 3e38
    for kept in (1, 20, 36):
        tiles, count, given = np.full(scores.shape, -7, np.int32), np.full((1, 1, 1), -7, np.int32), scores.astype(np.float32)
        launch_lists(scores=buffer(given), k_scale=buffer(given), tiles=buffer(tiles), scale=None, count=buffer(count),
                     q_shape=(1, 1, 100, 64), kv_shape=(1, 1, 37 * 128, 64), keep=[kept / 37], always=0)
        order = np.argsort(-(scores[0, 0, 0, :36] + 0.0), kind="stable")  # -0.0 and 0.0 in their order too
        wanted = sorted([*order[:max(kept, 1) - 1].tolist(), 36])
        if {0, 1} & set(wanted) in ({0}, {1}):
            continue  # either zero may be the one
        assert count.item() == len(wanted) and tiles[0, 0, 0, :len(wanted)].tolist() == wanted
