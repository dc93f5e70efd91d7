"""Attention of tokens that ranks share, as threads: what they make together, beside one rank's."""
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from lowbit_video import LowBitAttnProcessor
from lowbit_video.distributed.mesh import Degrees, Mesh
from lowbit_video.distributed.ring import ring
from lowbit_video.distributed.shares import begins, token_shares
from lowbit_video.distributed.ulysses import ulysses
from lowbit_video.hook.attend import exact_attend
from ranks import run_threads

from helpers import naive_attention, qkv, sqnr_db

EXACT_DB = 120.0
"""What is left of exact attention when float32 sums are taken in another order."""


_EXACT: dict[tuple[Any, ...], tuple[Any, tuple[np.ndarray, np.ndarray]]] = {}


class Result(NamedTuple):
    """out [B, N, H, D], lse [B, H, N] or None: what the ranks' parts make up. traffic: of each rank."""

    out: np.ndarray
    lse: np.ndarray | None
    traffic: list[dict]


class Case(NamedTuple):
    """Arrays q, k, v and how they are attended."""

    arrays: tuple[np.ndarray, np.ndarray, np.ndarray]
    precision: Any = "exact"
    causal: bool = False
    scale: float | None = None
    lse: bool = True
    dtype: str = "float32"

    def attend(self) -> Any:
        return exact_attend if self.precision == "exact" else LowBitAttnProcessor(self.precision).attend

    def alone(self, framework) -> Result:
        """On one rank."""
        tensors = [framework.tensor(x, self.dtype) for x in self.arrays]
        result = self.attend()(*tensors, self.causal, self.scale, self.lse)
        out, lse = result if self.lse else (result, None)
        return Result(framework.numpy(out), None if lse is None else framework.numpy(lse), [])

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) in float64; of the same `arrays` once."""
        if any(array.flags.writeable for array in self.arrays):
            return naive_attention(*self.arrays, self.scale, self.causal)
        key = *map(id, self.arrays), self.scale, self.causal
        if key not in _EXACT:
            _EXACT[key] = self.arrays, naive_attention(*self.arrays, self.scale, self.causal)  # while kept, they own their ids
        return _EXACT[key][1]


def wrap(attend, mesh: Mesh, shares, kv_shares=None, output="16bit", exchange="auto"):
    """An attention around which a mesh's ring and heads are put, as `parallelize` does it."""
    size, place = mesh.ulysses.size, mesh.ring.rank
    first, more = place * size, {}
    if mesh.ring.size > 1:
        parts = lambda told: told and [sum(told[part * size:(part + 1) * size]) for part in range(mesh.ring.size)]
        attend = ring(attend, mesh.ring, exchange, parts(shares), parts(kv_shares))
    if size > 1:
        more = dict(shares=shares and shares[first:first + size], kv_shares=kv_shares and kv_shares[first:first + size])
        attend = ulysses(attend, mesh.ulysses, exchange, output, **more)
    return attend


def together(framework, case: Case, heads_by=1, ring_of=1, shares=None, kv_shares=None, told=True, attend=None, patience=60,
             **choices) -> Result:
    """On heads_by x ring_of ranks. shares: default: `token_shares`; told: whether the wrappers are given them.
    attend: default: the case's. patience: seconds that a rank waits for another."""
    size = heads_by * ring_of
    q_len, kv_len = case.arrays[0].shape[1], case.arrays[1].shape[1]
    q_shares = shares or token_shares(q_len, size)
    k_shares = kv_shares or (q_shares if q_len == kv_len else token_shares(kv_len, size))

    def work(wire):
        mesh = Mesh(wire, Degrees(ulysses=heads_by, ring=ring_of))
        given = (q_shares, None if k_shares == q_shares else k_shares) if told else (None, None)
        around = wrap(attend or case.attend(), mesh, *given, **choices)
        cut = lambda x, shares: x[:, begins(shares)[wire.rank]:][:, :shares[wire.rank]]
        tensors = [framework.tensor(cut(x, each), case.dtype) for x, each in zip(case.arrays, (q_shares, k_shares, k_shares))]
        before = [framework.numpy(x).copy() for x in tensors]
        result = around(*tensors, case.causal, case.scale, case.lse)
        for x, array in zip(tensors, before):
            np.testing.assert_array_equal(framework.numpy(x), array, err_msg="the tensors that were given have changed")
        out, lse = result if case.lse else (result, None)
        assert out.dtype == tensors[0].dtype and list(out.shape) == list(tensors[0].shape)
        assert size == 1 or out.is_contiguous()
        return framework.numpy(out), None if lse is None else framework.numpy(lse), mesh.world.traffic.as_dict()

    outs, lses, traffic = zip(*run_threads(size, work, patience))
    return Result(np.concatenate(outs, 1), np.concatenate(lses, 2) if case.lse else None, list(traffic))


def row_db(value, exact):
    """SQNR of each row [B, N, H], dB; of rows without an error infinity."""
    noise = ((np.asarray(value, np.float64) - exact) ** 2).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(noise == 0, np.inf, 10 * np.log10((exact**2).sum(-1) / noise))


def assert_as_good(got: Result, alone: Result, exact, case: Case, near_db, loss_db=0.05, row_loss_db=6.0, lse_atol=5e-3):
    """As near to exact attention as one rank's result, all in all and row by row, and near that itself; the LSE as well.

    near_db: what is computed from the same codes differs by rounding alone.
    """
    assert sqnr_db(got.out, exact[0]) > sqnr_db(alone.out, exact[0]) - loss_db
    assert np.array_equal(got.out, alone.out) or sqnr_db(got.out, alone.out) > near_db
    ours, theirs = (row_db(one.out, exact[0]) for one in (got, alone))
    # a row that one rank gets nearly right by chance is no measure: there the floor is the usual row's
    floor = np.minimum(theirs, np.median(theirs)) - row_loss_db
    assert (ours >= floor).all(), (floor - ours).max()
    if case.lse:
        assert np.isneginf(got.lse).sum() == np.isneginf(exact[1]).sum()
        seen = np.isfinite(exact[1])
        np.testing.assert_allclose(got.lse[seen], alone.lse[seen], atol=lse_atol)


def assert_exact(got: Result, exact, case: Case) -> None:
    """Exact attention but for float32 rounding, each row of it."""
    assert sqnr_db(got.out, exact[0]) > EXACT_DB and row_db(got.out, exact[0]).min() > EXACT_DB - 25
    if case.lse:
        np.testing.assert_allclose(got.lse, exact[1], atol=2e-5)


@functools.cache
def arrays(tokens=450, heads=5, batch=2, dim=32, seed=0, **more):
    """Read only: those of the same sizes are the same ones."""
    made = qkv(batch=batch, heads=heads, q_len=tokens, dim=dim, seed=seed, **more)
    for array in made:
        array.flags.writeable = False
    return made
