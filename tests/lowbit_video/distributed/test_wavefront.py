"""The wavefront's order of transfers, where every send waits for the other rank, and what comes out of a gather."""
import random
import time
from functools import partial

import numpy as np
import paddle
import pytest

from lowbit_video.distributed.group import Group
from lowbit_video.distributed.shares import balanced
from lowbit_video.distributed.wavefront import Wavefront, gather_parts
from lowbit_video.runtime import paddle_runtime as runtime
from ranks import run_threads

PATIENCE = 5  # seconds after which a rank that waits counts as stuck


def chain(wire, degree, pieces, layers, ahead=False, slow=0.0):
    """[(piece, layer, what it took)] of this rank; each layer hands on two tensors that say who kept them."""
    group, seen = Group(wire, range(wire.size)), []
    like, shapes = paddle.zeros([1]), [(2, 3), (1,)]
    wave = Wavefront(group, degree, pieces, [(layer, shapes) for layer in range(layers)], like, ahead, runtime, "chain")
    delays = random.Random(wire.rank)
    for number in wave.numbers:
        wave.begin(number)
        for layer in range(layers):
            taken = wave.take(layer)
            seen.append((number, layer, taken and [t.mean().item() for t in taken]))
            time.sleep(delays.random() * slow)
            wave.keep(layer, [paddle.full(shape, 100.0 * number + layer + 0.5 * i) for i, shape in enumerate(shapes)])
        wave.end()
    return seen, group.traffic.sent.get("chain", 0)


@pytest.mark.parametrize("ahead", [False, True], ids=["when needed", "ahead"])
@pytest.mark.parametrize("layers", [1, 2, 9])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_states_arrive_and_nobody_waits_in_a_circle(size, layers, ahead):
    for pieces in (1, size - 1, size, size + 1, 2 * size, 3 * size + 1):
        ranks = run_threads(size, partial(chain, degree=size, pieces=pieces, layers=layers, ahead=ahead), PATIENCE, True)
        seen = sorted(entry for rank in ranks for entry in rank[0])
        before = lambda number, layer: [100 * (number - 1) + layer + i for i in (0, 0.5)] if number else None
        assert seen == [(number, layer, before(number, layer)) for number in range(pieces) for layer in range(layers)]
        assert sum(sent for _, sent in ranks) == (pieces - 1) * layers * 7 * 4


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_of_uneven_speed_stay_in_order(size):
    ranks = run_threads(size, lambda wire: chain(wire, size, 3 * size - 1, 8, slow=0.004), PATIENCE, rendezvous=True)
    assert all(taken == [100 * (number - 1) + layer, 100 * (number - 1) + layer + 0.5]
               for seen, _ in ranks for number, layer, taken in seen if number)


def test_ranks_beyond_the_degree_have_no_pieces():
    ranks = run_threads(4, lambda wire: chain(wire, 2, 5, 3), PATIENCE, rendezvous=True)
    assert [sorted({number for number, *_ in seen}) for seen, _ in ranks] == [[0, 2, 4], [1, 3], [], []]


@pytest.mark.parametrize("ahead", [False, True], ids=["when needed", "ahead"])
def test_ranks_work_at_the_same_time(ahead):
    """12 pieces of 10 layers, each asleep for 10 ms: 4 ranks need 3 pieces and a little, not 12."""
    def work(wire):
        group = Group(wire, range(4))
        like = paddle.zeros([1])
        wave = Wavefront(group, 4, 12, [(layer, [(1,)]) for layer in range(10)], like, ahead, runtime, "chain")
        wire.barrier()
        begin = time.perf_counter()
        for number in wave.numbers:
            wave.begin(number)
            for layer in range(10):
                wave.take(layer)
                time.sleep(0.01)
                wave.keep(layer, [like.clone()])
            wave.end()
        return time.perf_counter() - begin

    alone, shared = 1.2, max(run_threads(4, work, PATIENCE, rendezvous=True))
    assert shared < 0.6 * alone, shared  # 0.33 and a lag of 3 layers a round, on a quiet machine


def test_parts_come_together_in_order_also_from_ranks_that_have_none():
    shapes, owners = [(1, 2), (3, 2), (2, 1), (1, 1)], [2, 0, 2, 0]

    def work(wire):
        group, like = Group(wire, range(4)), paddle.zeros([1])
        mine = [paddle.full(shape, number + 1.0) for number, shape in enumerate(shapes) if owners[number] == wire.rank]
        parts = gather_parts(mine, shapes, owners, like, group, runtime, "gather")
        return [part.numpy() for part in parts], group.traffic.sent["gather"]

    ranks = run_threads(4, work, PATIENCE)
    for parts, _ in ranks:
        for number, (part, shape) in enumerate(zip(parts, shapes)):
            np.testing.assert_array_equal(part, np.full(shape, number + 1.0))
    assert [sent for _, sent in ranks] == [3 * 4 * 7, 0, 3 * 4 * 4, 0]


def test_works_that_cannot_be_split_are_balanced():
    tiles = [1350, 1350, 540, 1350, 1350, 540, 450, 450, 180]  # 60x90 latents in tiles of 30x45
    loads = lambda ranks: sorted(sum(size for size, owner in zip(tiles, balanced(tiles, ranks)) if owner == rank)
                                 for rank in range(ranks))
    assert loads(1) == [7560] and loads(2) == [3690, 3870] and loads(4)[-1] < 7560 / 3.7
    assert balanced([1, 1, 1], 2) == [0, 1, 0] and sorted(balanced([5, 5], 3)) == [0, 1]


def test_a_layer_out_of_turn_is_refused():
    def work(wire):
        wave = Wavefront(Group(wire, [0, 1]), 2, 1, [("one", []), ("two", [])], paddle.zeros([1]), False, runtime, "chain")
        wave.begin(0)
        with pytest.raises(AssertionError, match="another order"):
            wave.take("two")

    run_threads(2, work, PATIENCE)
