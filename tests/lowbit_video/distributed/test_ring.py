"""Attention of shared keys, gathered or sent round, alone and inside `ulysses`: what one rank computes, with every precision
and share."""
import math
from types import SimpleNamespace

import numpy as np
import pytest

from lowbit_video import LowBitAttnProcessor, NonFiniteError, Precision, UnsupportedError
from lowbit_video.distributed import keys_part
from lowbit_video.distributed import ring as ring_module
from lowbit_video.distributed import ulysses as heads_module
from lowbit_video.distributed.group import Group
from lowbit_video.distributed.keys_part import can_gather
from lowbit_video.distributed.pieces import Piece, gathered_waves
from lowbit_video.distributed.ring import ring
from lowbit_video.distributed.statistics import shared_statistics
from lowbit_video.engine import codes as engine
from lowbit_video.hook.attend import coded, exact_attend
from lowbit_video.kernels.exchange.layout import layout_of
from lowbit_video.runtime.detect import runtime_of
from parallel_attention import Case, arrays, assert_as_good, assert_exact, together
from ranks import run_threads

from helpers import sqnr_db

PRECISIONS = ["int8+fp8", "int8+fp16", "int4+fp16", "int8/int4+fp8", "int2+fp8", "fp8+fp8",
              Precision("int8+fp8", smooth_k=False), Precision("int8+fp16", granularity="token", smooth_q=True)]
DEGREES = [(1, 2), (1, 3), (1, 4), (2, 2)]
"""(shares of the heads, ring)."""


@pytest.fixture(params=["gathered", "round"])
def way(request, monkeypatch):
    """How the codes of all keys come to each rank, where no heads are shared around it."""
    if request.param == "round":
        monkeypatch.setattr(keys_part, "MOST_BYTES", 0)
    return request.param


def near_db(precision):
    """Codes are one rank's; but P is rounded beside the largest score of a part of the keys, not of all so far."""
    precision = Precision(precision) if isinstance(precision, str) else precision
    return 30 if precision.pv == "fp8" else 55


def check(framework, case: Case, got):
    if case.precision == "exact":
        assert_exact(got, case.exact(), case)
    else:
        assert_as_good(got, case.alone(framework), case.exact(), case, near_db(case.precision))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("degrees", [(1, 1), *DEGREES], ids=str)
def test_exact_attention(framework, degrees, causal):
    for lse in (True, False):
        case = Case(arrays(tokens=200), causal=causal, lse=lse, scale=None if lse else 0.3)
        check(framework, case, together(framework, case, *degrees))


def named(precision):
    return precision if isinstance(precision, str) else f"{precision.granularity}-{precision.smooth_k}"


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("precision", PRECISIONS, ids=named)
def test_low_bit(framework, precision, causal, monkeypatch):
    if not causal:  # of which none are gathered
        monkeypatch.setattr(keys_part, "MOST_BYTES", 0)
    case = Case(arrays(), precision, causal)
    alone, exact = case.alone(framework), case.exact()
    for degrees in DEGREES:
        got = together(framework, case, *degrees)
        assert_as_good(got, alone, exact, case, near_db(precision))
        assert not got.traffic[0]["notes"] and "ring" in got.traffic[0]["sent"]


@pytest.mark.parametrize("lse", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS, ids=named)
def test_gathered_keys_give_what_one_rank_gives(framework, precision, lse):
    """Over all keys at once, so that no P is rounded otherwise; the codes are its but for ties, as a mean of means rounds."""
    case = Case(arrays(), precision, lse=lse)
    alone, exact = case.alone(framework), case.exact()
    for size in (2, 3, 4):
        got = together(framework, case, 1, size)
        assert_as_good(got, alone, exact, case, 45, loss_db=1e-2, row_loss_db=1, lse_atol=2e-3)
        assert not got.traffic[0]["notes"]


@pytest.mark.parametrize("lse", [True, False])
@pytest.mark.parametrize("precision", ["int8+fp8", Precision("int8+fp16", granularity="token", smooth_q=True)], ids=named)
def test_pieces_of_heads_are_gathered_one_by_one(framework, precision, lse, monkeypatch):
    case = Case(arrays(heads=7), precision, lse=lse)
    whole, alone = together(framework, case, 1, 3), case.alone(framework)
    monkeypatch.setattr(ring_module, "head_pieces", lambda *given: (Piece(0, 3, (3,)), Piece(3, 4, (4,))))
    got = together(framework, case, 1, 3)
    assert np.array_equal(got.out, whole.out) and sqnr_db(got.out, alone.out) > 45
    assert not lse or np.array_equal(got.lse, whole.lse)
    assert got.traffic[1]["in_16_bit"] == whole.traffic[1]["in_16_bit"]


@pytest.mark.parametrize("dim, tiles", [(64, 2), (32, 3)])
def test_pieces_are_chosen_by_the_tiles_of_the_longest_share_and_by_what_travels(framework, dim, tiles, monkeypatch):
    asked, real = set(), ring_module.head_pieces
    monkeypatch.setattr(ring_module, "head_pieces", lambda *given: asked.add(given) or real(*given))
    together(framework, Case(arrays(tokens=450, heads=2, dim=dim), "int8+fp8", lse=False), 1, 2, shares=[384, 66])
    assert asked == {(2, 1, 2 * tiles, None, framework.name, gathered_waves(2, 2))}


def test_what_can_be_gathered(framework, monkeypatch):
    """Shares of whole blocks where there are blocks, up to MOST_BYTES, on one host, and no ring within."""
    like = framework.tensor(arrays()[0])
    kind_of = lambda precision: engine.kind_of(like, LowBitAttnProcessor(precision).options(), runtime_of(like))
    group = lambda ranks, size=4: Group(SimpleNamespace(rank=ranks[0], size=size), ranks)
    inner, by_block = LowBitAttnProcessor("int8+fp8"), kind_of("int8+fp8")
    can = lambda shares=(256, 194), kind=by_block, inner=inner, ranks=(0, 1): can_gather(
        kind, 2, 5, list(shares), inner, group(ranks))
    assert can() and can(kind=kind_of(Precision("int8+fp16", granularity="token")), shares=(250, 200))
    assert not can(shares=(250, 200)) and not can(inner=ring(inner.attend, group([0])))
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "2")
    assert can() and can(ranks=(2, 3)) and not can(ranks=(1, 2)) and not can(ranks=(0, 2))
    monkeypatch.delenv("PADDLE_LOCAL_SIZE")
    size = layout_of(by_block, 2, 5, 0, 450).size
    for most, gathered in ((size, True), (size - 1, False)):
        monkeypatch.setattr(keys_part, "MOST_BYTES", most)
        assert can() is gathered



@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_and_no_lse(framework, way, dtype):
    for precision in ("int8+fp8", "int8/int4+fp16", "exact"):
        case = Case(arrays(tokens=300, heads=3), precision, dtype=dtype, scale=0.3, lse=precision == "exact")
        for degrees in ((1, 2), (2, 2)):
            got, alone = together(framework, case, *degrees), case.alone(framework)
            assert_as_good(got, alone, case.exact(), case, 30, loss_db=0.6)
    assert sqnr_db(got.out, case._replace(scale=None).exact()[0]) < 10, "the scale must have mattered"


@pytest.mark.parametrize("shares", [[100, 200], [1, 299], [33, 128, 139]], ids=str)
def test_any_shares_are_codes(framework, shares):
    for precision in ("int8+fp16", "int8+fp8", "exact"):
        for causal in (False, True):
            case = Case(arrays(tokens=300), precision, causal)
            for told in (True, False):
                got = together(framework, case, 1, len(shares), shares=shares, told=told)
                assert not got.traffic[0]["notes"]
                if precision == "exact":
                    assert_exact(got, case.exact(), case)
                else:  # the blocks of K's scales begin elsewhere, so that a row has other luck with them
                    assert_as_good(got, case.alone(framework), case.exact(), case, 25, 0.5, 12, 6e-2)


def test_keys_that_are_not_the_queries(framework, way):
    for precision in ("int8+fp8", "int4+fp16", "exact"):
        for q_len, kv_len in ((300, 600), (600, 300)):
            for degrees in ((1, 2), (2, 2)):
                case = Case(arrays(tokens=q_len, kv_len=kv_len), precision)
                got = together(framework, case, *degrees, shares=None if degrees[0] == 1 else {
                    300: [128, 64, 64, 44], 600: [128, 256, 128, 88]}[q_len], kv_shares=None if degrees[0] == 1 else {
                    600: [128, 256, 128, 88], 300: [128, 44, 128, 0]}[kv_len] if kv_len == 600 else [128, 20, 128, 24])
                if precision == "exact":
                    assert_exact(got, case.exact(), case)
                else:
                    assert_as_good(got, case.alone(framework), case.exact(), case, 25, loss_db=0.5, lse_atol=2e-2)
    case = Case(arrays(tokens=300, kv_len=600), "int8+fp8", causal=True)
    with pytest.raises(UnsupportedError, match=r"a causal ring needs keys shared as the queries are; given: queries \[256, 44\]"
                                               r", keys \[384, 216\]; use ulysses"):
        together(framework, case, 1, 2, patience=5)


@pytest.mark.parametrize("precision", ["exact", "int8+fp8"])
def test_grouped_queries_travel_as_values(framework, precision):
    """Of each part by itself: its keys' own mean."""
    case = Case(arrays(tokens=600, heads=6, kv_heads=3), precision)
    for degrees in ((1, 2), (2, 2)):
        got = together(framework, case, *degrees)
        if precision == "exact":
            assert_exact(got, case.exact(), case)
        else:
            assert_as_good(got, case.alone(framework), case.exact(), case, 25, loss_db=0.5, lse_atol=2e-2)
            assert got.traffic[0]["notes"] == ["in 16 bits: grouped queries"]
        assert "statistics" not in got.traffic[0]["sent"]


@pytest.mark.parametrize("precision", ["int8+fp16", "int8+fp8", "int4+fp8", "int4+fp16"])
def test_statistics_are_those_of_all_tokens(framework, way, precision):
    """K's mean, Q's mean and V's largest values, none of them those of a share or of shares that weigh the same."""
    q, k, v = (x.copy() for x in arrays(tokens=600))
    k[:, 384:] += 8
    q[:, :300, :, 4] += 5
    v[:, 500] *= 20
    case = Case((q, k, v), precision)
    alone, exact = case.alone(framework), case.exact()
    for degrees, shares in (((1, 2), [384, 216]), ((1, 2), [128, 472]), ((1, 3), [128, 128, 344]),
                            ((2, 2), [128, 128, 256, 88]), ((2, 2), [256, 128, 128, 88])):
        got = together(framework, case, *degrees, shares=shares)
        assert_as_good(got, alone, exact, case, near_db(precision))


def test_values_beyond_float16(framework, way):
    q, k, v = arrays(tokens=300)
    for precision in ("int8+fp16", "int8+fp8", "exact"):
        case = Case((q, k, v * 1e5), precision)
        for degrees in ((1, 2), (2, 2)):
            got = together(framework, case, *degrees)
            if precision == "exact":
                assert_exact(got, case.exact(), case)
            else:
                assert_as_good(got, case.alone(framework), case.exact(), case, 30, loss_db=0.5, lse_atol=1e-2)


@pytest.mark.parametrize("exchange, precision, computes", [
    ("16bit", "int8+fp16", "int8+fp16"), ("int8", "int8/int4+fp16", "int8+fp16"), ("int4", "int8+fp8", "int8/int4+fp8"),
    ("int4", "exact", "exact")])
def test_what_travels_is_what_is_computed(framework, way, exchange, precision, computes):
    case, wanted = (Case(arrays(tokens=600, heads=4), p) for p in (precision, computes))
    for degrees in ((1, 2), (2, 2)):
        got = together(framework, case, *degrees, exchange=exchange)
        if precision == "exact":
            assert_exact(got, case.exact(), case)
        else:
            assert_as_good(got, wanted.alone(framework), case.exact(), case, near_db(computes) if exchange != "16bit" else 25,
                           0.5, 12, 2e-2)
        ratio = got.traffic[0]["sent"]["ring"] / got.traffic[0]["in_16_bit"]["ring"]
        assert ratio == 2 if "exact" in precision or exchange == "16bit" else ratio < 1.7  # float32 tensors


def test_a_processor_falls_back_as_on_one_rank(framework):
    case = Case(arrays(tokens=300, heads=2, dim=36))
    served = Case(arrays(tokens=300, heads=2), dtype="bfloat16")
    processor = LowBitAttnProcessor("fp8+fp8", fallback="exact", backend="hopper")
    for degrees in ((1, 2), (2, 2)):
        got = together(framework, served, *degrees, attend=processor.attend)
        assert sqnr_db(got.out, served.exact()[0]) > 40  # bfloat16's
        with pytest.raises(UnsupportedError, match="head_dim 36 is not a multiple of 8"):  # which has no LSE either
            together(framework, case, *degrees, attend=LowBitAttnProcessor("int8+fp8", fallback="exact").attend, patience=5)


def test_the_coded_form_of_a_ring(framework):
    def work(wire):
        group, processor = Group(wire, range(2)), LowBitAttnProcessor("int8+fp8")
        low, exact = ring(processor.attend, group), ring(exact_attend, group)
        choices = low.options(False, 0.5, True), processor.options(False, 0.5, True)
        return coded(low) is low and coded(exact) is None and choices[0] == choices[1]

    assert run_threads(2, work) == [True, True]


@pytest.mark.parametrize("lse", [True, False])
def test_pieces_of_heads_go_round_one_by_one(framework, lse, monkeypatch):
    case = Case(arrays(heads=7), "int8+fp16", causal=True, lse=lse)
    whole = together(framework, case, 2, 2)
    monkeypatch.setattr(heads_module, "head_pieces", lambda *given: (Piece(0, 3, (1, 2)), Piece(3, 4, (3, 1))))
    got = together(framework, case, 2, 2)
    assert sqnr_db(got.out, whole.out) > 80
    assert not lse or np.abs(got.lse - whole.lse).max() < 1e-5


def test_output_in_int8_of_a_ring_within(framework):
    case = Case(arrays(), "int8+fp8", causal=True)
    got, plain = (together(framework, case, 2, 2, output=output) for output in ("int8", "16bit"))
    assert_as_good(got, case.alone(framework), case.exact(), case, 28, loss_db=0.3)
    assert not np.array_equal(got.out, plain.out) and np.array_equal(got.lse, plain.lse)
    assert got.traffic[3]["sent"]["attention out"] < 0.6 * plain.traffic[3]["sent"]["attention out"]


def test_codes_that_begin_later_in_their_memory_go_round(framework):
    """`Ring.of_codes` by itself: Q's and K's codes follow each other in one memory, heads first."""
    case = Case(arrays(tokens=256, heads=2), "int8+fp8")

    def work(wire):
        tensors = [framework.tensor(x[:, 128 * wire.rank:][:, :128]) for x in case.arrays]
        runtime, processor = runtime_of(tensors[0]), LowBitAttnProcessor("int8+fp8")
        around = ring(processor.attend, Group(wire, range(2)), shares=[128, 128])
        options = processor.options(False, None, True).scaled(32)
        found = shared_statistics(engine.statistics(*tensors, options, runtime), ([128, 128],) * 2, around.group, processor,
                                  options, runtime)
        kind = engine.kind_of(tensors[0], options, runtime)
        layouts = [layout_of(kind, 2, 2, *lengths, True) for lengths in ((128, 0), (0, 128))]
        memory = runtime.empty((sum(layout.size for layout in layouts),), "uint8", tensors[0])
        held = [engine.Codes(memory, layout, begin) for layout, begin in zip(layouts, (0, layouts[0].size))]
        for one in held:
            engine.encode(tuple(tensors), found, one.layout, options, runtime, memory=memory, begin=one.begin)
        scale = runtime.contiguous(runtime.permute(engine.v_scale_of(found, options), (1, 0, 2)))
        codes = engine.AttentionCodes(*held, scale, options, "float32")
        results = [around.of_codes(codes, False, True, tokens_first=first) for first in (True, False)]
        return [(framework.numpy(out), framework.numpy(lse)) for out, lse in results]

    exact, lse = case.exact()
    for rank, results in enumerate(run_threads(2, work)):
        cut = slice(128 * rank, 128 * rank + 128)
        for (out, out_lse), axes in zip(results, ((2, 0, 1, 3), (2, 1, 0, 3))):  # of [N, H, B, D] and [H, N, B, D]
            assert sqnr_db(out.transpose(axes), exact[:, cut]) > 27
            np.testing.assert_allclose(out_lse.transpose(1, 0, 2), lse[:, :, cut], atol=5e-2)


def test_bytes_by_hand(framework, monkeypatch):
    """Two ranks, 1024 tokens each, 4 heads of 64: everyone's K and V go to the next one, once."""
    case = Case(arrays(tokens=2048, heads=4, batch=1, dim=64), "int8+fp8", lse=False, dtype="float16")
    values, statistics = 2 * 1024 * 4 * 64 * 2, 2 * 4 * 64 * 4
    codes = 2 * 1024 * 4 * 64 + 4 * 8 * 4
    for traffic in together(framework, case, 1, 2).traffic:
        assert traffic["sent"] == {"ring": codes, "statistics": statistics}
        assert traffic["in_16_bit"] == {"ring": values, "statistics": statistics}
        assert traffic["sent_total"] / traffic["in_16_bit_total"] < 0.52
    shares = [640, 640, 768]
    size = lambda tokens: 2 * tokens * 4 * 64 + -(-4 * (tokens // 128) * 4 // 128) * 128
    for place, traffic in enumerate(together(framework, case, 1, 3, shares=shares).traffic):  # its own to both others
        assert traffic["sent"]["ring"] == 2 * size(shares[place])
        assert traffic["in_16_bit"]["ring"] == 2 * 2 * 2 * shares[place] * 4 * 64
    # every rank of three passes on what it has got, one part less than there are
    monkeypatch.setattr(keys_part, "MOST_BYTES", 0)
    traffic = together(framework, case, 1, 3, shares=shares).traffic
    sent, in_16_bit = ([one[what]["ring"] for one in traffic] for what in ("sent", "in_16_bit"))
    assert sent == [size(640) + size(768), 2 * size(640), size(768) + size(640)]
    assert in_16_bit == [2 * 2 * tokens * 4 * 64 for tokens in (1408, 1280, 1408)]
    case = case._replace(precision="exact", dtype="float32")
    for traffic in together(framework, case, 1, 2).traffic:
        assert traffic["sent"] == {"ring": 2 * values} and traffic["in_16_bit"] == {"ring": values}


def test_parts_that_no_query_sees_are_not_computed(framework):
    processor, calls = LowBitAttnProcessor("int8+fp8"), []
    of_codes = processor.of_codes
    processor.of_codes = lambda codes, is_causal, *more: calls.append(is_causal) or of_codes(codes, is_causal, *more)
    together(framework, Case(arrays(), "int8+fp8", causal=True), 1, 4, attend=processor.attend)
    assert sorted(calls) == [False] * 6 + [True] * 4


def test_what_cannot_be_meant_is_refused(framework):
    with pytest.raises(ValueError, match="unknown exchange 'int2'"):
        ring(exact_attend, None, exchange="int2")
    with pytest.raises(ValueError, match="exchange 'int4' would make fp8.fp8 attention 'fp8/int4.fp8', which does not exist"):
        together(framework, Case(arrays(tokens=300), "fp8+fp8"), 1, 2, exchange="int4", patience=5)
    case = Case(tuple(x.copy() for x in arrays(tokens=300, heads=2)), "int8+fp8")
    for precision in ("int8+fp8", "exact"):
        with pytest.raises(UnsupportedError, match=r"queries \[100, 200\], keys \[200, 100\]; use ulysses"):
            together(framework, Case(case.arrays, precision, True), 1, 2, shares=[100, 200], kv_shares=[200, 100], patience=5)
    case.arrays[1][0, 0, 0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="^k has 0 NaN and 1 infinite"):
        together(framework, case, 1, 2, patience=0.5)
