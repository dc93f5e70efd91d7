"""The Hopper kernel walking lists of key tiles: its source on NumPy arrays against the oracle, its builds, its refusals."""
from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton, which exists for Linux only")

from lowbit_video.kernels.attention import reference  # noqa: E402
from lowbit_video.kernels.attention.hopper import launch  # noqa: E402
from lowbit_video.kernels.attention.hopper.build import CONFIGS  # noqa: E402
from lowbit_video.kernels.buffers import Buffer  # noqa: E402
from lowbit_video.kernels.exchange.reference import merge  # noqa: E402
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE  # noqa: E402
from lowbit_video.kernels.operands import Listed, Operand, codes_of, v_codes_of  # noqa: E402
from lowbit_video.kernels.pooled import reference as pooled  # noqa: E402
from lowbit_video.kernels.pooled.tiles import query_tile  # noqa: E402
from lowbit_video.kernels.quant import reference as quant  # noqa: E402
from pooled_inputs import smooth_qkv  # noqa: E402

from gluon_in_numpy import Memory  # noqa: E402

BUILDS = [(64, "fp8"), (128, "float16")]


def attend(monkeypatch, q, k, v, chosen, pv="fp8", shifted=True, lse_wanted=True, lists=True, heavy=0):
    """(out, lse) by the simulated kernel, and by the oracle, for tiles that are chosen; the part of the others is NumPy's.

    lists: False launches the kernel as it is without any. heavy: so many query tiles of each head come first.
    """
    memory, kept = Memory(), []

    def buffer(array):
        kept.append(np.ascontiguousarray(array))
        return memory.buffer(kept[-1])

    monkeypatch.setattr(launch, "attn_fwd_kernel", memory.kernel())
    mean, scale, config = quant.token_mean(k), q.shape[-1] ** -0.5, CONFIGS[q.shape[-1], pv == "fp8"]
    shape = lambda x: Operand(None, x.shape, (0, 0, 0), "fp16")
    stats = pooled.tile_stats(k, v, mean, "fp16")
    part, part_lse = pooled.pooled_part(q, stats, chosen, scale)
    q_codes, q_scale = quant.quantize_rows(q, "int8", None)
    k_codes, k_scale = quant.quantize_rows(k, "int8", 128, mean)
    group = q.shape[1] // k.shape[1]
    tiles, scales = np.full(chosen.shape, 10**6, np.int32), np.full(chosen.shape, np.nan, np.float32)
    for i_b, i_h, i_m in np.ndindex(chosen.shape[:3]):
        listed = np.flatnonzero(chosen[i_b, i_h, i_m])
        tiles[i_b, i_h, i_m, :len(listed)] = listed
        scales[i_b, i_h, i_m, :len(listed)] = k_scale[i_b, i_h // group, listed]
    listed = Listed(buffer(tiles), buffer(chosen.sum(-1).astype(np.int32)), buffer(scales),
                    buffer(part_lse / np.float32(np.log(2))), query_tile(q.shape[-1]), heavy)
    if pv == "fp8":
        v_codes, v_scale = quant.quantize_v(v)
        v_operand, values = v_codes_of(shape(v), buffer(v_codes), buffer(v_scale)), v_codes
    else:
        values, v_scale = v.astype(pv), None
        v_operand = Operand(buffer(values), v.shape, tuple(s // 2 for s in values.strides[:3]), FORMAT_OF_DTYPE[pv])
    out = np.where(np.isneginf(part_lse)[..., None], np.float32(np.nan), part)  # where nobody wrote it
    lse = np.full(q.shape[:3], np.nan, np.float32)
    shift = reference.lse_correction(q, mean, scale)
    launch.launch_attn_fwd(
        codes_of(shape(q), "int8", buffer(q_codes), buffer(q_scale), None),
        codes_of(shape(k), "int8", buffer(k_codes), buffer(k_scale), 128), v_operand,
        Operand(memory.buffer(out), q.shape, tuple(s // 4 for s in out.strides[:3]), "fp32"), sm_scale=scale,
        lse=memory.buffer(lse) if lse_wanted else None, lse_shift=buffer(shift) if shifted else None,
        listed=listed if lists else None)
    wanted = reference.attend_codes(
        q_codes, q_scale, k_codes, k_scale, values.astype(np.float32) if pv != "fp8" else values, v_scale, q_format="int8",
        k_format="int8", pv_format="fp8" if pv == "fp8" else "fp16", block_k=128, bias=None, half="fp16", scale=scale,
        sum_rounded=config.sum_mma, backwards=True, line=config.line, chosen=chosen)
    wanted = merge((wanted[0], part), (wanted[1], part_lse))
    return (out, lse), (wanted[0], wanted[1] + shift if shifted else wanted[1])


def chosen_of(q, k, keep, seed=0):
    """Tiles by lot, another number for each head and query tile; the last one always."""
    rows, tiles = -(-q.shape[2] // query_tile(q.shape[3])), -(-k.shape[2] // 128)
    chosen = np.random.default_rng(seed).uniform(size=(*q.shape[:2], rows, tiles)) < keep
    chosen[..., -1] = True
    return chosen


def assert_close(got, wanted, limit=2e-3):
    (out, lse), (ref, ref_lse) = got, wanted
    error, size = np.abs(out - ref).sum(-1), np.abs(ref).sum(-1)
    assert error.sum() <= limit * size.sum() and (error <= 2e-2 * size).all(), error.sum() / size.sum()
    assert np.abs(lse - ref_lse).max() <= 2e-3


@pytest.mark.parametrize("head_dim, pv", BUILDS, ids=str)
def test_every_build(head_dim, pv, monkeypatch):
    """Two batches, grouped queries, a ragged end, several query tiles and lists of every length from 1 to all."""
    q, k, v = smooth_qkv((2, 2, 200, head_dim), 1, kv_len=430)
    chosen = chosen_of(q, k, 0.4)
    chosen[0, 0, 0], chosen[1, 1, 1], chosen[1, 0, 0, :-1] = True, True, False
    assert_close(*attend(monkeypatch, q, k, v, chosen, pv))


@pytest.mark.parametrize("kv_len", [256, 385, 5], ids=str)
def test_ends_of_the_sequence(kv_len, monkeypatch):
    q, k, v = smooth_qkv((1, 1, 193, 64), kv_len=kv_len)
    assert_close(*attend(monkeypatch, q, k, v, chosen_of(q, k, 0.5), shifted=False))


def test_all_tiles_listed_are_the_kernel_without_lists(monkeypatch):
    """To the bit: the same tiles in the same order."""
    q, k, v = smooth_qkv((1, 1, 70, 64), kv_len=300)
    listed, all_keys = (attend(monkeypatch, q, k, v, chosen_of(q, k, 2.0), lists=lists)[0] for lists in (True, False))
    for one, other in zip(listed, all_keys):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("heavy", [1, 2], ids=str)
def test_heavy_tiles_of_all_heads_come_first(heavy, monkeypatch):
    """Every query tile is done once, whichever comes first."""
    q, k, v = smooth_qkv((2, 1, 193, 64), kv_len=200)
    assert_close(*attend(monkeypatch, q, k, v, chosen_of(q, k, 0.5), heavy=heavy))


def test_without_an_lse(monkeypatch):
    q, k, v = smooth_qkv((1, 1, 70, 64), kv_len=500)
    (out, lse), wanted = attend(monkeypatch, q, k, v, chosen_of(q, k, 0.4), lse_wanted=False)
    assert np.isnan(lse).all()
    assert_close((out, wanted[1]), wanted)


@pytest.mark.parametrize("changes, word", [
    (dict(is_causal=True), "is_causal"), (dict(query_tile=128), "built for 192 and 128"), (dict(scale=None), "without scales")])
def test_refuses_by_name(changes, word):
    float32 = Buffer(1 << 20, "float32")
    x = Operand(Buffer(1 << 20, "float16"), (1, 2, 100, 64), (12800, 64, 128), "fp16")
    listed = Listed(Buffer(1 << 20, "int32"), Buffer(1 << 20, "int32"), float32, float32, 192)
    causal = changes.pop("is_causal", False)
    q, k = (codes_of(x, "int8", Buffer(1 << 20, "int8"), float32, block) for block in (None, 128))
    with pytest.raises(ValueError, match=word):
        launch.launch_attn_fwd(q, k, x, x, sm_scale=0.1, is_causal=causal, listed=listed._replace(**changes))
