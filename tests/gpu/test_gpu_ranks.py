"""Codes, and attention shared by several ranks, on one GPU: the ranks are threads that pass each other tensors."""
import numpy as np
import pytest

from lowbit_video import LowBitAttnProcessor, Precision, attention, attention_of_codes, prequantize
from lowbit_video.distributed import keys_part
from lowbit_video.distributed import ring as ring_module
from lowbit_video.distributed import ulysses as ulysses_module
from lowbit_video.distributed.group import Group
from lowbit_video.distributed.pieces import Piece
from lowbit_video.distributed.ring import ring
from lowbit_video.distributed.shares import begins, even_shares, token_shares
from lowbit_video.distributed.ulysses import ulysses
from lowbit_video.hook.attend import exact_attend
from ranks import run_threads

pytestmark = pytest.mark.gpu

PRECISIONS = ["int8+fp8", "int8+fp16", "fp8+fp8", "int8/int4+fp8", "int4+fp16", "int2+fp8",
              Precision("int8+fp8", smooth_k=False), Precision("int8+fp16", granularity="token", smooth_q=True)]
L1 = {"int8+fp8": 0.05, "int8+fp16": 0.02, "int4+fp16": 0.2, "exact": 2e-3}


def tensors(gpu, q_len, kv_len, heads=5, head_dim=64, batch=2, dtype="float16"):
    rng = np.random.default_rng(3)
    normal = lambda tokens: rng.standard_normal((batch, tokens, heads, head_dim)).astype(np.float32)
    k = normal(kv_len) + 2 * rng.standard_normal((1, 1, heads, head_dim)).astype(np.float32)
    k[:, kv_len // 2:] += 1.5  # the ranks' means differ
    v = normal(kv_len)
    v[:, -3] *= 4  # the last rank has the largest
    return tuple(gpu.tensor(x, dtype) for x in (normal(q_len), k, v))


def l1(out, wanted):
    return float(np.abs(out - wanted).sum() / np.abs(wanted).sum())


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("head_dim, q_len, kv_len", [(64, 1000, 1000), (128, 257, 129), (96, 2, 128)])
def test_codes_give_what_tensors_give(gpu, precision, head_dim, q_len, kv_len):
    q, k, v = tensors(gpu, q_len, kv_len, head_dim=head_dim)
    for causal in (False, True):
        for _ in range(2):  # launched, and replayed
            wanted, wanted_lse = attention(q, k, v, precision, is_causal=causal, return_lse=True)
            made, lse = attention_of_codes(prequantize(q, k, v, precision, return_lse=True), is_causal=causal, return_lse=True)
            np.testing.assert_array_equal(gpu.numpy(made), gpu.numpy(wanted))
            np.testing.assert_array_equal(gpu.numpy(lse), gpu.numpy(wanted_lse))


def shared(gpu, attend, q, k, v, size, wrap, **choices):
    """What every rank's wrapper gives for its share, joined along the tokens; (out, lse)."""
    shares = token_shares(q.shape[1], size)

    def work(wire):
        begin = begins(shares)[wire.rank]
        own = [x[:, begin:begin + shares[wire.rank]] for x in (q, k, v)]
        return [gpu.numpy(x) for x in wrap(attend, wire, shares)(*own, return_lse=True, **choices)]

    made = run_threads(size, work)
    return np.concatenate([out for out, _ in made], 1), np.concatenate([lse for _, lse in made], 2)


def by_ulysses(exchange="auto", output="16bit"):
    return lambda attend, wire, shares: ulysses(attend, Group(wire, range(wire.size)), exchange, output, shares)


def by_ring(exchange="auto"):
    return lambda attend, wire, shares: ring(attend, Group(wire, range(wire.size)), exchange, shares)


def by_both(attend, wire, shares):
    first = wire.rank // 2 * 2
    inner = ring(attend, Group(wire, range(wire.rank % 2, 4, 2)), shares=[sum(shares[:2]), sum(shares[2:])])
    return ulysses(inner, Group(wire, [first, first + 1]), shares=shares[first:first + 2])


def by_ring_round(attend, wire, shares):
    """The codes of keys go round, as where those of all would take too much memory."""
    return by_ring()(attend, wire, shares)


WAYS = {"ulysses2": (2, by_ulysses()), "ulysses3": (3, by_ulysses()), "ulysses2-16bit": (2, by_ulysses("16bit")),
        "ulysses2-int8": (2, by_ulysses(output="int8")), "ring2": (2, by_ring()), "ring3": (3, by_ring()),
        "ring2-round": (2, by_ring_round), "ring3-round": (3, by_ring_round), "ring2-16bit": (2, by_ring("16bit")),
        "usp4": (4, by_both)}


@pytest.mark.parametrize("precision", ["int8+fp8", "int8+fp16", "int4+fp16", "exact"])
@pytest.mark.parametrize("size, wrap", WAYS.values(), ids=list(WAYS))
def test_several_ranks_compute_what_one_computes(gpu, precision, size, wrap, monkeypatch):
    if wrap is by_ring_round:
        monkeypatch.setattr(keys_part, "MOST_BYTES", 0)
    q, k, v = tensors(gpu, 1500, 1500)
    attend = exact_attend if precision == "exact" else LowBitAttnProcessor(precision).attend
    for causal in (False, True):
        exact, exact_lse = (gpu.numpy(x) for x in exact_attend(q, k, v, causal, None, True))
        one, one_lse = (gpu.numpy(x) for x in attend(q, k, v, causal, None, True))
        for _ in range(2):
            out, lse = shared(gpu, attend, q, k, v, size, wrap, is_causal=causal)
            assert l1(out, exact) < max(L1[precision], 1.05 * l1(one, exact) + 0.006)
            rows = np.abs(out - exact).sum(-1) / np.abs(exact).sum(-1)
            assert rows.max() < 3 * max(L1[precision], (np.abs(one - exact).sum(-1) / np.abs(exact).sum(-1)).max())
            assert np.abs(lse - exact_lse).max() < np.abs(one_lse - exact_lse).max() + 0.02


def test_pieces_of_heads_change_nothing(gpu, monkeypatch):
    q, k, v = tensors(gpu, 1200, 1200, heads=7)
    attend = LowBitAttnProcessor("int8+fp8").attend
    whole, _ = shared(gpu, attend, q, k, v, 2, by_ulysses())
    pieces = tuple(Piece(first, count, tuple(even_shares(count, 2))) for first, count in ((0, 2), (2, 3), (5, 2)))
    monkeypatch.setattr(ulysses_module, "head_pieces", lambda *_: pieces)
    cut, _ = shared(gpu, attend, q, k, v, 2, by_ulysses())
    np.testing.assert_array_equal(cut, whole)


def test_pieces_of_heads_that_are_gathered_change_nothing(gpu, monkeypatch):
    """And give what one GPU gives: its codes but for ties, attended over all keys at once."""
    q, k, v = tensors(gpu, 1200, 1200, heads=7)
    attend = LowBitAttnProcessor("int8+fp8").attend
    for size in (2, 3):
        monkeypatch.setattr(ring_module, "head_pieces", lambda *_: (Piece(0, 7, (7,)),))
        whole, whole_lse = shared(gpu, attend, q, k, v, size, by_ring())
        monkeypatch.setattr(ring_module, "head_pieces", lambda *_: (Piece(0, 2, (2,)), Piece(2, 5, (5,))))
        cut, lse = shared(gpu, attend, q, k, v, size, by_ring())
        np.testing.assert_array_equal(cut, whole)
        np.testing.assert_array_equal(lse, whole_lse)
        one = gpu.numpy(attend(q, k, v))
        assert l1(whole, one) < 2e-4 and (np.abs(whole - one).sum(-1) / np.abs(one).sum(-1)).max() < 0.1
