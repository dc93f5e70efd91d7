"""Which rank is to blame where nothing moves."""
import json
import socket
import threading
import time
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest

from lowbit_video.distributed import watch as module
from lowbit_video.distributed.watch import State, Watch, WatchedWire, stalled


@pytest.mark.parametrize("states, words", [
    ([dict(count=18, inside=1), dict(count=17, inside=0)], "rank 1 does not answer: it stopped after exchange 17 while rank 0 "
     "waits in exchange 18"),
    ([dict(count=17, inside=0), dict(count=18, inside=1), dict(count=18, inside=1)], "rank 0 does not answer: it stopped after "
     "exchange 17 while rank 1"),
    # the one that computes has done more than those that wait for it, as where it decodes for all
    ([dict(count=90, inside=0), dict(count=18, inside=1)], "rank 0 does not answer: it stopped after exchange 90 while rank 1"),
    ([dict(count=17, inside=1), dict(count=18, inside=1)], "rank 0 does not answer"),
    ([dict(count=18, inside=2), dict(count=17, left=True)], "rank 1 has ended: it stopped after exchange 17"),
    ([dict(count=18), dict(count=17)], None)], ids=["second", "first", "busy", "crossed", "ended", "idle"])
def test_the_rank_that_others_wait_for_is_named(states, words):
    text = stalled({rank: State(**state) for rank, state in enumerate(states)})
    assert text is None if words is None else text.startswith(words)


def test_a_watched_wire_counts_and_knows_when_it_waits():
    class Wire:
        rank, size = 0, 2

        def exchange(self, *given):
            seen.append((given, watched.state.count, watched.state.inside))
            return "work"

        send = receive = exchange

        def barrier(self):
            arrived.set()
            go.wait(10)

    seen, arrived, go = [], threading.Event(), threading.Event()
    watched = WatchedWire(Wire())
    assert watched.exchange(1, 2, 3, 4) == watched.send(5, 6) == watched.receive(7, 8) == "work"
    assert seen == [((1, 2, 3, 4), 1, 1), ((5, 6), 2, 1), ((7, 8), 3, 1)] and watched.state.inside == 0
    with watched:
        assert watched.state.inside == 1
    thread = threading.Thread(target=watched.barrier)
    thread.start()
    assert arrived.wait(10) and (watched.state.count, watched.state.inside) == (4, 1)
    go.set()
    thread.join()
    assert watched.state.inside == 0


def test_ranks_that_answer_at_once_are_told_no_more_often_than_once_a_beat(monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    watched, (mine, other) = Watch.__new__(Watch), Pipe()
    watched.rank, watched.wire, watched.failure = 1, SimpleNamespace(size=2, state=State(count=7)), None
    watched._lock, watched._ending, watched._connections = threading.Lock(), True, {mine: 0}
    watched._states, (watched._signals, signals) = {0: State(), 1: watched.wire.state}, socket.socketpair()
    thread = threading.Thread(target=watched._run, args=(None,), daemon=True)
    thread.start()
    told, begin = [], time.monotonic()
    while time.monotonic() < begin + 0.65:
        if other.poll(0.01):
            told.append(json.loads(other.recv_bytes()))
            other.send_bytes(json.dumps({"count": len(told)}).encode())
    other.close()
    thread.join(10)
    watched._signals.close(), signals.close()
    assert not thread.is_alive() and 2 <= len(told) <= 8 and told[0] == {"count": 7, "inside": 0}
    assert watched._states[0].count >= len(told) - 1
