"""How codes lie in memory, and NumPy beside the exchange's kernels; the kernels themselves run in Triton's interpreter."""
from pathlib import Path

import numpy as np
import pytest

from interpreted_run import pass_in_the_interpreter
from lowbit_video.kernels.exchange import reference
from lowbit_video.kernels.exchange.layout import ALIGNMENT, Copy, Kind, joins, layout_of
from lowbit_video.kernels.quant import reference as quant

from helpers import naive_attention, qkv

KINDS = [Kind(32, "int8", "int8", "fp8", "block", "float16", shift=True),
         Kind(48, "int4", "int4", "fp16", "token", "float32", bias=True),
         Kind(64, "int8", "int2", "fp16", "token", "bfloat16"),
         Kind(32, "int4", "int4", "fp8", "token", "float16", bias=True, shift=True)]
LENGTHS = [(1, 1), (130, 257), (128, 0), (0, 300)]


@pytest.mark.parametrize("heads_first", [False, True], ids=["batch_first", "heads_first"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_byte_of_every_part_is_its_own(kind, heads_first):
    for q_len, kv_len in LENGTHS:
        layout = layout_of(kind, 2, 3, q_len, kv_len, heads_first)
        assert layout.size % ALIGNMENT == 0 and all(part.offset % ALIGNMENT == 0 for part in layout.parts.values())
        owners = np.zeros(layout.size, np.int32)
        for name, part in layout.parts.items():
            shape = (2, 3, part.rows, part.row_bytes(layout.tokens(part)))
            strides = [4 * stride for stride in layout.strides(name)]
            view = np.lib.stride_tricks.as_strided(owners[part.offset:], shape, (*strides, 4))
            view += 1
        assert owners.max() == 1 and layout.size - owners.sum() < ALIGNMENT * len(layout.parts)
        rng, memory, written = np.random.default_rng(0), np.zeros(layout.size, np.uint8), {}
        for name in layout.parts:
            view = reference.part_of(memory, layout, name)
            written[name] = rng.integers(1, 256, view.shape, dtype=np.uint8)
            view[...] = written[name]
        for name, values in written.items():
            np.testing.assert_array_equal(reference.part_of(memory, layout, name), values, err_msg=name)
        assert np.count_nonzero(memory) == owners.sum()


def test_which_parts_there_are():
    layout = lambda kind, *lengths: set(layout_of(kind, 1, 1, *lengths).parts)
    assert layout(KINDS[0], 5, 5) == {"q_codes", "q_scale", "lse_shift", "k_codes", "k_scale", "v"}
    assert layout(KINDS[1], 5, 5) == {"q_codes", "q_scale", "k_codes", "k_scale", "v", "bias"}
    assert layout(KINDS[3], 5, 0) == {"q_codes", "q_scale", "lse_shift"}
    assert layout(KINDS[3], 0, 5) == {"k_codes", "k_scale", "v", "bias"}
    assert [kind.joins_blocks for kind in KINDS] == [True, False, False, True]
    assert layout_of(KINDS[0], 1, 1, 5, 5) is layout_of(KINDS[0], 1, 1, 5, 5), "a layout is a key of plans"


def test_where_parts_lie_by_hand():
    layout = layout_of(KINDS[0], 2, 3, 130, 257)
    offsets = {name: part.offset for name, part in layout.parts.items()}
    assert offsets == {"q_codes": 0, "q_scale": 24960, "lse_shift": 28160, "k_codes": 31360, "k_scale": 80768, "v": 80896}
    assert layout.strides("q_codes") == (3 * 4160, 4160, 4160) and layout.strides("k_scale") == (3 * 12, 12, 12)
    assert layout.strides("v") == (3 * 32 * 384, 32 * 384, 384) and layout.size == 80896 + 2 * 3 * 32 * 384
    assert layout.order == (2, 3)
    turned = layout_of(KINDS[0], 2, 3, 130, 257, heads_first=True)
    assert turned.parts == layout.parts and turned.size == layout.size and turned.order == (3, 2)
    assert turned.strides("q_codes") == (4160, 2 * 4160, 4160) and turned.strides("k_scale") == (12, 2 * 12, 12)
    assert turned.strides("v") == (32 * 384, 2 * 32 * 384, 384)


def fill(memory, layout, k, v, q, begin=0):
    """The codes of q, k, v [B, H, N, D] in a layout of kind KINDS[0]."""
    made = {}
    if layout.q_len:
        made["q_codes"], made["q_scale"] = quant.quantize_rows(q, "int8", None)
        made["lse_shift"] = q.sum(3)
    if layout.kv_len:
        made["k_codes"], made["k_scale"] = quant.quantize_rows(k, "int8", 128)
        made["v"] = quant.quantize_v(v, np.full(v.shape[:2] + v.shape[3:], 0.01, np.float32))[0]
    for name, values in made.items():
        view = reference.part_of(memory[begin:], layout, name)
        view[...] = np.ascontiguousarray(values).view(np.uint8).reshape(view.shape)


def test_shares_joined_are_the_codes_of_the_whole():
    """Codes of three ranks, one of them in a second memory, joined into Q's and K's codes that follow each other."""
    kind, q_shares, kv_shares = KINDS[0], (50, 7, 100), (128, 256, 1)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in qkv(batch=2, heads=3, q_len=157, kv_len=385, dim=32))
    targets = layout_of(kind, 2, 3, 157, 0), layout_of(kind, 2, 3, 0, 385)
    begins = 0, targets[0].size
    wanted = np.zeros(sum(target.size for target in targets), np.uint8)
    for begin, target in zip(begins, targets):
        fill(wanted, target, k, v, q, begin)
    layouts = [layout_of(kind, 2, 3, *lengths, heads_first=True) for lengths in zip(q_shares, kv_shares)]
    sources, copies = [np.zeros(256 + layouts[0].size + layouts[2].size, np.uint8), np.zeros(layouts[1].size, np.uint8)], []
    places = [(0, 256), (1, 0), (0, 256 + layouts[0].size)]
    for rank, (layout, (source, begin)) in enumerate(zip(layouts, places)):
        firsts = sum(q_shares[:rank]), sum(kv_shares[:rank])
        parts = [x[:, :, first:first + share] for x, first, share in
                 ((k, firsts[1], kv_shares[rank]), (v, firsts[1], kv_shares[rank]), (q, firsts[0], q_shares[rank]))]
        fill(sources[source], layout, *parts, begin)
        for target, target_begin, first in zip(targets, begins, firsts):
            copies += joins(layout, begin, target, target_begin, first, second=source == 1)
    joined = np.zeros_like(wanted)
    reference.copy_parts(sources, joined, copies, 2, 3)
    np.testing.assert_array_equal(joined, wanted)


def test_a_share_that_is_not_whole_blocks_cannot_follow():
    share, whole = layout_of(KINDS[0], 1, 1, 60, 60, heads_first=True), layout_of(KINDS[0], 1, 1, 0, 160)
    joins(share, 0, whole, 0, 0)
    with pytest.raises(AssertionError, match="not a whole block"):
        joins(share, 0, whole, 0, 64)
    with pytest.raises(AssertionError, match="k_scale of a share that begins at token 100 cannot be joined: not a whole block"):
        joins(share, 0, whole, 0, 100)
    assert len(joins(share, 0, layout_of(KINDS[0], 1, 1, 160, 0), 0, 100)) == 3  # Q's parts go by token
    by_token = layout_of(KINDS[2], 1, 1, 60, 60, heads_first=True)
    assert len(joins(by_token, 0, layout_of(KINDS[2], 1, 1, 0, 160), 0, 100)) == 3


def test_copies_do_what_they_say():
    first, second = np.arange(100, dtype=np.uint8), np.arange(100, 200, dtype=np.uint8)
    target = np.zeros(60, np.uint8)
    copies = [Copy(3, 20, 10, 5, 1, 30, 15, 4, 2, 3), Copy(50, 1, 2, 7, 10, 30, 15, 1, 1, 2, second=True)]
    reference.copy_parts((first, second), target, copies, 2, 2)
    wanted = np.zeros(60, np.uint8)
    for b in range(2):
        for h in range(2):
            for r in range(2):
                wanted[1 + 30 * b + 15 * h + 4 * r:][:3] = first[3 + 20 * b + 10 * h + 5 * r:][:3]
            wanted[10 + 30 * b + 15 * h:][:2] = second[50 + b + 2 * h:][:2]
    np.testing.assert_array_equal(target, wanted)


def test_means_are_weighed_and_maxima_are_not():
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((170, 2, 11)) + np.arange(170)[:, None, None]
    shares = np.split(tokens, [20, 150])
    gathered = np.stack([[*share.mean(0), np.abs(share[:, 0]).max(0)] for share in shares]).astype(np.float32)
    weights = np.array([[len(share) / 170 for share in shares]] * 2)
    weights[1] = 0.5, 0.25, 0.25
    out = reference.combine_stats(gathered, weights, 2)
    np.testing.assert_allclose(out[0], tokens[:, 0].mean(0), rtol=1e-6)
    np.testing.assert_allclose(out[1], np.einsum("rn,r->n", gathered[:, 1], weights[1]), rtol=1e-6)
    np.testing.assert_array_equal(out[2], np.abs(tokens[:, 0]).max(0).astype(np.float32))
    np.testing.assert_array_equal(reference.combine_stats(gathered, np.zeros((0, 3)), 0), gathered.max(0))


def test_parts_merged_are_softmax_over_all_keys():
    q, k, v = qkv(heads=3, q_len=20, kv_len=90, k_offset=0)
    cuts = [slice(0, 10), slice(10, 80), slice(80, 90)]
    k[:, cuts[1]] *= 4
    outs, lses = zip(*[naive_attention(q, k[:, cut], v[:, cut]) for cut in cuts])
    out, lse = reference.merge([x.transpose(0, 2, 1, 3) for x in outs], lses)
    wanted, wanted_lse = naive_attention(q, k, v)
    np.testing.assert_allclose(out.transpose(0, 2, 1, 3), wanted, atol=1e-6)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-6)


def test_a_row_that_saw_no_key_stays_so():
    rng = np.random.default_rng(0)
    outs, lses = rng.standard_normal((2, 1, 1, 3, 4)), rng.standard_normal((2, 1, 1, 3))
    lses[0, 0, 0, :2] = lses[1, 0, 0, 1:] = -np.inf
    outs[np.isneginf(lses)] = 0
    out, lse = reference.merge(list(outs), list(lses))
    np.testing.assert_allclose(out[0, 0], [outs[1, 0, 0, 0], np.zeros(4), outs[0, 0, 0, 2]], rtol=1e-6)
    np.testing.assert_allclose(lse[0, 0], [lses[1, 0, 0, 0], -np.inf, lses[0, 0, 0, 2]], rtol=1e-6)


def test_a_part_that_outweighs_the_other_by_more_than_float32_holds():
    outs, lses = np.float32([1, 2]).reshape(2, 1, 1, 1, 1), np.float32([0, 200]).reshape(2, 1, 1, 1)
    out, lse = reference.merge(list(outs), list(lses))
    assert out == 2 and lse == 200


def test_kernels_in_the_interpreter():
    """The kernels, and what the engine launches of them, in a process where Triton interprets."""
    pytest.importorskip("triton")
    tests = Path(__file__).parents[1]
    pass_in_the_interpreter(tests / "kernels" / "interpreted_exchange.py",
                            tests / "lowbit_video" / "engine" / "interpreted_codes.py")
