"""The experiment on pools: it computes what it says, and its check fails where pooled attention is not the reference's."""
import json
import sys

import numpy as np
import pytest

from lowbit_video.eval.speed.experiments import pools
from lowbit_video.eval.speed.experiments.captures import Capture
from lowbit_video.kernels.formats import LOG2_E
from lowbit_video.kernels.pooled import reference

TOKENS, TEXT, GRID = 1000, 40, (4, 12, 20)


def attention(q, k, v):
    s = q @ k.T * q.shape[1]**-0.5
    p = np.exp(s - s.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True) @ v


@pytest.fixture(scope="module")
def capture():
    rng = np.random.default_rng(0)
    smooth = np.repeat(rng.standard_normal((3, 2, 40, 64)), 25, 2)
    return Capture(*(smooth + 0.5 * rng.standard_normal((3, 2, TOKENS, 64))).astype(np.float32), TEXT, GRID, layer=0, step=0)


@pytest.fixture
def head(capture):
    q, k, v = (x[0] for x in capture[:3])
    return q[192:384], k, v


def test_attention_by_tiles_is_attention(head):
    q, k, v = head
    taken = np.array([True, False, True, False, False, True, False, True])
    keys = taken.repeat(pools.KEY_TILE)[:TOKENS]
    some = pools.Rows(q, k, v)
    np.testing.assert_allclose(some.attend(np.ones(8, bool)), attention(q, k, v), atol=1e-5)
    np.testing.assert_allclose(some.attend(taken), attention(q, k[keys], v[keys]), atol=1e-5)


def test_plain_pools_are_keys_of_their_tiles_weight(head):
    q, k, v = head
    taken = np.arange(8) < 3
    for size, starts in ((128, pools.Tiles(k, v).starts), (32, pools.Tiles(k, v).parts)):
        cut = [slice(first, min(first + size, TOKENS)) for first in range(384, TOKENS, size)]
        more = [np.concatenate([x[:384], *(np.tile(x[one].mean(0), (one.stop - one.start, 1)) for one in cut)]) for x in (k, v)]
        got = pools.Rows(q, k, v).attend(taken, pools.Tiles(k, v).plain(q, ~taken, starts))
        np.testing.assert_allclose(got, attention(q, *more), atol=1e-5)


def test_centred_pools_are_exact_for_the_mean_and_beat_plain_ones(head):
    q, k, v = head
    centred, lse = pools.Tiles(k, v).centred(q)
    mean = q.mean(0, keepdims=True)
    alone, _ = pools.Tiles(k, v).centred(mean)
    none = np.zeros(8, bool)
    np.testing.assert_allclose(pools.Rows(mean, k, v).attend(none, alone), attention(mean, k, v), atol=1e-5)
    np.testing.assert_allclose(np.exp(lse).sum(), np.exp(k @ mean[0] / 8).sum(), rtol=1e-5)
    off = lambda out: np.abs(out - attention(q, k, v)).sum()
    some, tiles = pools.Rows(q, k, v), pools.Tiles(k, v)
    assert off(some.attend(none, centred)) < 0.95 * off(some.attend(none, tiles.plain(q, ~none, tiles.starts)))
    last = k[896:]  # of 104 keys
    weight = np.exp(last @ mean[0] / 8)
    by_hand = np.log(weight.sum()) + (q - mean) @ (weight @ last) / weight.sum() / 8
    np.testing.assert_allclose(centred.scores[:, -1], by_hand, atol=1e-4)


def test_tiles_are_skipped_by_the_maximum_of_those_after_them(head):
    some = pools.Rows(*head)
    some.top = np.array([[0.0, 40, 5, 9], [0.0, 0, 9, 9], [0.0, 0, 0, 9], [0.0, 0, 0, 9]])  # walked from the last tile on
    bits = 8.5 * LOG2_E
    assert some.skipped(bits, 1).astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert some.skipped(bits, 2).astype(int).tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert some.skipped(bits, 1, final=True).astype(int).tolist() == [[1, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert not some.skipped(9.5 * LOG2_E, 2)[2:].any()


def test_own_choice_looks_at_log_sum_exp_spread_and_values(head):
    q, k, v = head
    stats = reference.tile_stats(k[None, None], v[None, None], None)
    scores = pools.own_choice(q, np.arange(8, dtype=np.float32), stats)
    by_hand = [lse * LOG2_E + 0.5 * np.log2((k[i:i + 128].var(0) * q.var(0)).sum()) + 0.5 * np.log2(v[i:i + 128].var(0).sum())
               for lse, i in enumerate(range(0, TOKENS, 128))]
    np.testing.assert_allclose(scores, by_hand, rtol=1e-4)


def test_orders_leave_text_in_front_and_keep_every_token(capture):
    other = pools.ordered(capture, "hilbert")
    assert (other.k[:, :TEXT] == capture.k[:, :TEXT]).all() and not (other.k == capture.k).all()
    assert np.array_equal(np.sort(other.k, 1), np.sort(capture.k, 1))
    np.testing.assert_array_equal(pools.ordered(capture, "raster").v, capture.v)


def test_skipping_is_counted_and_errs_as_far_as_it_leaves_out(capture):
    alike = capture._replace(q=6 * capture.q[:, 50:51] + 0.3 * capture.q)  # rows that look at the same keys
    where, found = next(pools.measure(alike, 1))
    q, k, v = alike.q[0, 192:384], alike.k[0], alike.v[0]
    some, exact = pools.Rows(q, k, v), attention(q, k, v)
    assert (where["head"], where["tile"]) == (0, 1) and where["size"] == pytest.approx(np.abs(exact).sum(), rel=1e-4)
    for name, rows_together, final in (("tile", 192, False), ("consumer", 64, False), ("consumer, best", 64, True)):
        shares = [found["skipped", name, bits] for bits in pools.THRESHOLDS]
        errors = [found["skip error", name, bits] for bits in pools.THRESHOLDS]
        assert shares == [some.skipped(bits, rows_together, final).mean() for bits in pools.THRESHOLDS]
        assert shares == sorted(shares, reverse=True) and errors[2] <= errors[1] <= errors[0] < 0.05
    assert 0 < found["skipped", "consumer", 8] < found["skipped", "consumer, best", 8] < 0.9
    assert found["skip error", "consumer, best", 8] > 1e-6


def test_methods_stand_to_plain_pools_capture_by_capture():
    falling = {keep: 0.4 * 2**-i for i, keep in enumerate(pools.KEEPS)}
    half, quarter = ({keep: error * part for keep, error in falling.items()} for part in (0.5, 0.25))
    errors = [{method: other for method in pools.METHODS} | {"pools": falling} for other in (half, quarter)]
    found = pools.over_pools(errors)["centred"]
    assert found[0.2] == dict(error=0.354, least=0.25, most=0.5, kept=0.1)
    assert found[0.3]["kept"] == pytest.approx((0.2 + 0.1) / 2) and found[0.5]["kept"] == pytest.approx((0.3 + 0.2) / 2)


def test_the_whole_program(capture, tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("a", "b")]
    monkeypatch.setattr(pools, "captures", lambda *given: files)
    monkeypatch.setattr(pools, "load", lambda file: capture)
    monkeypatch.setattr(sys, "argv", ["pools", "--model", "m", "--captures", str(tmp_path), "--every", "2", "--out",
                                      str(tmp_path / "out.json")])
    assert pools.main() == 0
    report = json.loads((tmp_path / "out.json").read_text())
    found = report["orders"]["raster"]
    assert found["query_tiles"] == 2 * 2 * 3 and len(report["by_capture"]) == 4  # tiles 1, 3 and 5 of six; tile 0 has text
    errors = {method: [by[str(keep)]["mean"] for keep in pools.KEEPS] for method, by in found["errors"].items()}
    assert all(errors["centred"][i] < errors["pools"][i] < errors["dropped"][i] for i in range(4))
    assert all(by == sorted(by, reverse=True) for by in errors.values())
    assert found["kept"] == {"0.1": 0.25, "0.2": 0.25, "0.3": 0.375, "0.5": 0.5}
    assert all(0.1 <= at["kept"] < float(keep) and at["error"] < 1 for keep, at in found["over_pools"]["centred"].items())
    plain = pools.Tiles.plain
    monkeypatch.setattr(pools.Tiles, "plain", lambda self, q, pooled, starts: plain(self, q * 1.01, pooled, starts))
    assert pools.main() == 1
