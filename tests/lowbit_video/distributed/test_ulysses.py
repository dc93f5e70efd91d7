"""Attention by shares of the heads: what one rank computes, with every precision, share and number of ranks."""
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from lowbit_video import LowBitAttnProcessor, NonFiniteError, Precision, UnsupportedError
from lowbit_video.distributed import ulysses as module
from lowbit_video.distributed.pieces import Piece
from lowbit_video.distributed.ring import ring
from lowbit_video.distributed.ulysses import ulysses
from lowbit_video.hook.attend import coded, exact_attend
from parallel_attention import Case, Result, arrays, assert_as_good, assert_exact, together
from ranks import run_threads

from helpers import sqnr_db

PRECISIONS = ["int8+fp8", "int8+fp16", "int4+fp16", "int8/int4+fp8", "int2+fp8", "fp8+fp8",
              Precision("int8+fp8", smooth_k=False), Precision("int8+fp16", granularity="token", smooth_q=True)]
NEAR_DB = 60.0
"""Codes are those of one rank but where a mean that was rounded otherwise puts a value on another code."""
IN_16_BITS = "in 16 bits: "


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_exact_attention(framework, size, causal):
    case = Case(arrays(tokens=200), causal=causal)
    got = together(framework, case, size)
    assert_exact(got, case.exact(), case)
    assert got.traffic[0]["sent"].get("statistics", 0) == 0


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: p if isinstance(p, str) else f"{p.granularity}-{p.smooth_k}")
def test_low_bit(framework, precision, causal):
    case = Case(arrays(), precision, causal)
    alone, exact = case.alone(framework), case.exact()
    for size in (2, 3, 4):
        got = together(framework, case, size)
        assert_as_good(got, alone, exact, case, NEAR_DB, row_loss_db=1)
        assert not got.traffic[0]["notes"] and got.traffic[0]["in_16_bit_total"] > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes(framework, dtype):
    for precision in ("int8+fp8", "int8/int4+fp16", "exact"):
        case = Case(arrays(tokens=300, heads=3), precision, dtype=dtype, scale=0.1)
        assert_as_good(together(framework, case, 2), case.alone(framework), case.exact(), case, NEAR_DB, row_loss_db=1)


def test_without_lse_and_with_a_scale(framework):
    for precision in ("exact", "int8+fp8", "int4+fp16"):
        case = Case(arrays(tokens=300), precision, lse=False, scale=0.3)
        got, exact = together(framework, case, 3), case.exact()
        if precision == "exact":
            assert_exact(got, exact, case)
        else:
            assert_as_good(got, case.alone(framework), exact, case, NEAR_DB)
        other = Case(case.arrays, precision, lse=False)
        assert sqnr_db(got.out, other.exact()[0]) < 10, "the scale must have mattered"


@pytest.mark.parametrize("precision, loss_db", [("int8+fp8", 0.3), ("int4+fp16", 0.3), ("exact", 300)], ids=str)
def test_output_in_int8(framework, precision, loss_db):
    """Rows that come back as codes: as many bits as attention has itself. Exact attention's come as they are."""
    for causal in (False, True):
        case = Case(arrays(), precision, causal)
        got = together(framework, case, 3, output="int8")
        if precision == "exact":
            assert_exact(got, case.exact(), case)
        else:
            assert_as_good(got, case.alone(framework), case.exact(), case, 38, loss_db=loss_db)
            plain = together(framework, case, 3)
            assert not np.array_equal(got.out, plain.out) and np.array_equal(got.lse, plain.lse)
            assert got.traffic[1]["sent"]["attention out"] < 0.6 * plain.traffic[1]["sent"]["attention out"]


@pytest.mark.parametrize("exchange, precision, computes", [
    ("16bit", "int8+fp8", "int8+fp8"), ("auto", "int8+fp8", "int8+fp8"), ("int8", "int8/int4+fp8", "int8+fp8"),
    ("int8", "int8/int2+fp16", "int8+fp16"), ("int4", "int8+fp8", "int8/int4+fp8"), ("int4", "int8+fp16", "int8/int4+fp16"),
    ("int4", "int4+fp8", "int4+fp8"), ("int8", "exact", "exact"), ("16bit", "exact", "exact"),
    ("int4", Precision("int8+fp16", None, False, True), Precision("int8/int4+fp16", None, False, True))], ids=str)
def test_what_travels_is_what_is_computed(framework, exchange, precision, computes):
    case, wanted = (Case(arrays(tokens=300, heads=4), p) for p in (precision, computes))
    got = together(framework, case, 2, exchange=exchange)
    if precision == "exact":
        assert_exact(got, case.exact(), case)
    else:
        assert_as_good(got, wanted.alone(framework), case.exact(), case, NEAR_DB, row_loss_db=1)
    by_codes = exchange != "16bit" and precision != "exact"
    sent = got.traffic[0]["sent"]
    assert ("statistics" in sent) == (by_codes and computes != "exact" and got.traffic[0]["notes"] == []
                                      and sum(bool(x) for x in statistics_of(computes)) > 0)
    ratio = sent["attention in"] / got.traffic[0]["in_16_bit"]["attention in"]
    assert ratio == 2 if not by_codes else ratio < 1.5  # float32 tensors


def statistics_of(precision):
    precision = Precision(precision) if isinstance(precision, str) else precision
    return precision.smooth_k, precision.smooth_q, precision.pv == "fp8"


@pytest.mark.parametrize("heads, size", [(7, 3), (5, 4), (3, 3), (4, 4)])
def test_heads_that_do_not_divide(framework, heads, size):
    for precision in ("exact", "int8+fp8"):
        case = Case(arrays(tokens=600, heads=heads), precision)
        got = together(framework, case, size)
        if precision == "exact":
            assert_exact(got, case.exact(), case)
        else:
            assert_as_good(got, case.alone(framework), case.exact(), case, NEAR_DB, row_loss_db=1)


def test_shares_that_are_not_whole_blocks_travel_in_16_bits(framework):
    case = Case(arrays(tokens=300), "int8+fp8")
    for told in (True, False):
        got = together(framework, case, 2, shares=[100, 200], told=told)
        assert_as_good(got, case.alone(framework), case.exact(), case, 100)
        assert got.traffic[1]["notes"] == [IN_16_BITS + "shares of 100, 200 tokens are not whole blocks of 128"]
        assert "attention in" in got.traffic[0]["sent"]
    by_token = Case(case.arrays, "int4+fp16")  # has no scale of a block
    got = together(framework, by_token, 2, shares=[100, 200])
    assert_as_good(got, by_token.alone(framework), case.exact(), by_token, NEAR_DB)
    assert not got.traffic[0]["notes"]


def test_only_the_keys_shares_must_be_whole_blocks(framework):
    case = Case(arrays(tokens=300, kv_len=300), "int8+fp8")
    for shares, kv_shares in (([100, 200], [128, 172]), ([128, 172], [100, 200])):
        got = together(framework, case, 2, shares=shares, kv_shares=kv_shares)
        assert_as_good(got, case.alone(framework), case.exact(), case, NEAR_DB)
        assert bool(got.traffic[0]["notes"]) == (kv_shares == [100, 200])


@pytest.mark.parametrize("precision", ["exact", "int8+fp8", "int4+fp16"])
def test_shares_that_are_asked_for(framework, precision):
    for kv_len in (600, 300):
        case = Case(arrays(tokens=600, kv_len=kv_len), precision)
        told, asked = (together(framework, case, 3, told=told, shares=[256, 128, 216], kv_shares=None if kv_len == 600 else [
            128, 128, 44]) for told in (True, False))
        np.testing.assert_array_equal(asked.out, told.out)
        np.testing.assert_array_equal(asked.lse, told.lse)
        difference = [sum(a["sent"].values()) - sum(b["sent"].values()) for a, b in zip(asked.traffic, told.traffic)]
        assert difference == [2 * 2 * 4] * 3  # two int32 to each of two


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_keys_that_are_not_the_queries(framework, causal):
    for q_len, kv_len in ((300, 600), (600, 300)):
        for precision in ("exact", "int8+fp8"):
            case = Case(arrays(tokens=q_len, kv_len=kv_len), precision, causal)
            got = together(framework, case, 2)
            if precision == "exact":
                assert_exact(got, case.exact(), case)
            else:
                assert_as_good(got, case.alone(framework), case.exact(), case, NEAR_DB, row_loss_db=1)
                assert not got.traffic[0]["notes"]
            tokens = {300: (256, 44), 600: (384, 216)}
            for rank, others in enumerate((2, 3)):  # heads that this rank does not compute
                values = 2 * others * 32 * (tokens[q_len][rank] + 2 * tokens[kv_len][rank])
                assert got.traffic[rank]["in_16_bit"]["attention in"] == 2 * values


@pytest.mark.parametrize("precision", ["exact", "int8+fp8"])
def test_grouped_queries_travel_as_values(framework, precision):
    case = Case(arrays(tokens=300, heads=6, kv_heads=3), precision)
    got = together(framework, case, 2)
    if precision == "exact":
        assert_exact(got, case.exact(), case)
    else:
        assert_as_good(got, case.alone(framework), case.exact(), case, 100)
        assert got.traffic[0]["notes"] == [IN_16_BITS + "grouped queries"]


def uneven():
    """Q, K and V whose statistics are none that a rank could have of its own share, or that equal weights would give."""
    q, k, v = (x.copy() for x in arrays(tokens=600))
    k[:, 384:] += 8
    q[:, :300, :, 4] += 5
    v[:, 500] *= 20
    return q, k, v


@pytest.mark.parametrize("precision", ["int8+fp16", "int8+fp8", "int4+fp8", "int4+fp16"])
def test_statistics_are_those_of_all_tokens(framework, precision):
    for shares in ([384, 216], [128, 472], [128, 128, 344]):
        case = Case(uneven(), precision)
        got = together(framework, case, len(shares), shares=shares)
        assert_as_good(got, case.alone(framework), case.exact(), case, NEAR_DB, row_loss_db=1)


def test_values_beyond_float16(framework):
    q, k, v = arrays(tokens=300)
    for precision in ("int8+fp16", "int8+fp8", "exact"):
        case = Case((q, k, v * 1e5), precision)
        got = together(framework, case, 2)
        if precision == "exact":
            assert_exact(got, case.exact(), case)
        else:
            assert_as_good(got, case.alone(framework), case.exact(), case, NEAR_DB, row_loss_db=1)


class Noting(LowBitAttnProcessor):
    """A processor that keeps its notes."""

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.notes = Counter()

    def note(self, variant, reason="", tiles=None):
        self.notes[variant, reason] += 1


@pytest.mark.parametrize("changes, reason", [
    (dict(dim=36), "head_dim 36 is not a multiple of 8"), (dict(dim=288), "head_dim 288 is not a multiple of 8"),
    (dict(dtype="float64"), "the tensors have dtype float64"), (dict(), "")], ids=["36", "288", "float64", "served"])
def test_a_processor_falls_back_as_on_one_rank(framework, changes, reason):
    given = arrays(tokens=300, heads=3, batch=1, dim=changes.get("dim", 32))
    case = Case(given, lse=False, dtype=changes.get("dtype", "float32"))
    alone = Noting("int8+fp8", fallback="exact")
    wanted = alone.attend(*[framework.tensor(x, case.dtype) for x in case.arrays])
    ranks = [Noting("int8+fp8", fallback="exact") for _ in range(2)]
    taken = iter(ranks)
    by_values = lambda *given: next(taken).attend(*given)
    got = together(framework, case, 2, attend=by_values if reason else ranks[0].attend)
    assert sqnr_db(got.out, framework.numpy(wanted)) > (100 if reason else NEAR_DB)
    if reason:
        ((variant, why),) = alone.notes
        assert variant == "exact" and why.startswith(reason)
        assert ranks[0].notes == ranks[1].notes == alone.notes
    else:
        assert alone.notes == {("int8+fp8 (reference-lowbit)", ""): 1}
        assert ranks[0].notes == {("int8+fp8 (reference-lowbit)", ""): 4}  # two ranks', and each attends the queries of both


@pytest.mark.parametrize("dim, dtype", [(36, "float32"), (32, "float64")])
def test_without_a_fallback_what_is_not_served_is_refused_as_on_one_rank(framework, dim, dtype):
    case = Case(arrays(tokens=300, heads=3, dim=dim), "int8+fp8", dtype=dtype, lse=False)
    with pytest.raises(UnsupportedError) as alone:
        case.alone(framework)
    with pytest.raises(UnsupportedError) as shared:
        together(framework, case, 2)
    assert str(shared.value).replace("300x300", "") == str(alone.value).replace("300x300", "")


def test_what_ran_is_in_the_coverage():
    paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
    from lowbit_video import apply, coverage
    from lowbit_video.distributed.group import Group
    from lowbit_video.hook.base import slot_of

    import toy_model

    def work(wire):
        model = toy_model.model()
        apply(model, "int8+fp8")
        x = paddle.randn([1, 128, 2, 32])
        for block in model.blocks:
            slot_of(block, x).around = lambda attend: ulysses(attend, Group(wire, range(2)), shares=[128, 128])
            block.processor.run(block, x, x, x)
        return coverage(model)

    for report in run_threads(2, work):
        assert [one.runs for one in report.modules] == [(("int8+fp8 (reference-lowbit)", 2, ""),)] * 2


def test_the_coded_form_of_an_attention():
    processor = LowBitAttnProcessor("int8+fp8")
    assert coded(processor.attend) is processor and coded(processor) is processor
    assert coded(exact_attend) is None and coded(lambda *given: None) is None


PIECES = (Piece(0, 2, (1, 1)), Piece(2, 3, (2, 1)), Piece(5, 2, (1, 1))), (Piece(0, 3, (2, 1)), Piece(3, 4, (1, 3)))


@pytest.mark.parametrize("pieces", PIECES, ids=["three", "two"])
@pytest.mark.parametrize("output", ["16bit", "int8"])
@pytest.mark.parametrize("precision", ["int8+fp8", "int4+fp16"])
def test_pieces_of_heads_change_nothing(framework, precision, output, pieces, monkeypatch):
    case = Case(arrays(tokens=300, heads=7), precision)
    whole = together(framework, case, 2, output=output)
    monkeypatch.setattr(module, "head_pieces", lambda *given: pieces)
    got = together(framework, case, 2, output=output)
    assert sqnr_db(got.out, whole.out) > (80 if output == "16bit" else 38)
    np.testing.assert_allclose(got.lse, whole.lse, atol=1e-5)
    sent = [sum(one["sent"]["attention in"] for one in result.traffic) for result in (got, whole)]
    assert 0.7 < sent[0] / sent[1] < 1.3  # who computes which head decides it


@pytest.mark.parametrize("dim, tiles", [(64, 2), (128, 3), (32, 3)])
def test_pieces_are_chosen_by_the_tiles_of_the_longest_share(framework, dim, tiles, monkeypatch):
    """Of 192 query rows at head dim 64, else of 128; of all samples."""
    asked, real = set(), module.head_pieces
    monkeypatch.setattr(module, "head_pieces", lambda *given: asked.add(given) or real(*given))
    together(framework, Case(arrays(tokens=450, heads=2, dim=dim), "int8+fp8", lse=False), 2, shares=[384, 66])
    assert asked == {(2, 2, 2 * tiles, None, framework.name)}


@pytest.mark.parametrize("wrap", [ulysses, ring])
def test_a_rank_alone_passes_on_what_it_is_asked(wrap):
    alone = SimpleNamespace(size=1, rank=0)
    assert wrap(lambda *given: given, alone)("q", "k", "v", True, 0.3, True) == ("q", "k", "v", True, 0.3, True)
    assert wrap(lambda *given: given, alone)("q", "k", "v") == ("q", "k", "v", False, None, False)


def test_bytes_by_hand(framework):
    """Two ranks, 1024 tokens each, 4 heads of 64: 2 heads of everyone's tokens go each way."""
    given = Case(arrays(tokens=2048, heads=4, batch=1, dim=64), "int8+fp8", lse=False, dtype="float16")
    values = 3 * 1024 * 2 * 64 * 2
    back = 1024 * 2 * 64 * 2
    codes = 2 * (3 * 1024 * 64 + 4 * 1024) + 128  # Q, K and V; Q's scales; 2 x 8 of K's, and their room
    statistics = 2 * 4 * 64 * 4
    rows = 1024 * 2 * 64 + 1024 * 2 * 4
    for choices, arrive, leave, limit in ((dict(exchange="16bit"), values, back, 1), ({}, codes, back, 0.64),
                                          (dict(output="int8"), codes, rows, 0.52)):
        for traffic in together(framework, given, 2, **choices).traffic:
            sent = {"attention in": arrive, "attention out": leave}
            if limit < 1:
                sent["statistics"] = statistics
            assert traffic["sent"] == sent and traffic["notes"] == []
            assert traffic["in_16_bit"] == {**sent, "attention in": values, "attention out": back}
            assert 0.5 < traffic["sent_total"] / traffic["in_16_bit_total"] <= limit
    exact = given._replace(precision="exact", dtype="float32")
    for traffic in together(framework, exact, 2).traffic:
        assert traffic["sent"] == {"attention in": 2 * values, "attention out": 2 * back}
        assert traffic["in_16_bit"] == {"attention in": values, "attention out": back}
    with_lse = exact._replace(lse=True)
    assert together(framework, with_lse, 2).traffic[0]["sent"]["attention out"] == 2 * back + 1024 * 2 * 4


def test_what_cannot_be_shared_is_refused(framework):
    case = Case(arrays(tokens=300, heads=2), "int8+fp8")
    with pytest.raises(ValueError, match="2 heads cannot be shared by 3 ranks.*smaller ulysses degree"):
        together(framework, case, 3)
    with pytest.raises(ValueError, match=r"shares are \[100, 200\], and rank [01] of 2 was given (256|44) tokens"):
        run_pair(framework, case, shares=[100, 200])
    with pytest.raises(ValueError, match=r"kv_shares are \[100, 200\], and rank [01] of 2 was given (256|44) tokens"):
        run_pair(framework, case, shares=[256, 44], kv_shares=[100, 200])
    with pytest.raises(ValueError, match=r"shares are \[256\], and rank"):
        run_pair(framework, case, shares=[256])
    with pytest.raises(ValueError, match="unknown exchange 'int2'; there are: auto, 16bit, int8, int4"):
        ulysses(exact_attend, None, exchange="int2")
    with pytest.raises(ValueError, match="unknown output 'fp8'; there are: 16bit, int8"):
        ulysses(exact_attend, None, output="fp8")
    for precision, exchange, spec in (("fp8+fp8", "int4", "fp8/int4"), ("int4+fp16", "int8", "int4/int8")):
        with pytest.raises(ValueError, match=f"exchange '{exchange}' would make .* '{spec}.*try exchange='auto'"):
            together(framework, Case(case.arrays, precision), 2, exchange=exchange)


def run_pair(framework, case: Case, **choices) -> Result:
    """Wrappers that are told something else than they are given."""
    from lowbit_video.distributed.group import Group

    def work(wire):
        cut = slice(0, 256) if wire.rank == 0 else slice(256, 300)
        return ulysses(case.attend(), Group(wire, range(2)), **choices)(*[framework.tensor(x[:, cut]) for x in case.arrays])

    return run_threads(2, work, patience=5)


@pytest.mark.parametrize("exchange", ["16bit", "auto"])
def test_a_nan_is_named(framework, exchange):
    case = Case(tuple(x.copy() for x in arrays(tokens=300, heads=2)), "int8+fp8")
    case.arrays[2][0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="^v has 1 NaN"):
        together(framework, case, 2, exchange=exchange, patience=0.5)
    processor = LowBitAttnProcessor("int8+fp8", check_finite=False)
    assert np.isnan(together(framework, case, 2, exchange=exchange, attend=processor.attend).out).any()
