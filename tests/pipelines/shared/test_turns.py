"""One call at a time on what calls share: others wait, whatever order they name it in, and a call within a call is refused."""
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from lowbit_video.errors import UnsupportedError
from lowbit_video.pipelines.shared import turns
from lowbit_video.pipelines.shared.turns import alone, one_at_a_time


class Thing:
    """What a call keeps something on."""

    def __init__(self, scheduler=None):
        self.scheduler = scheduler


def others_wait(*objects):
    """Whether another thread would have to wait for these."""
    return any(turns._turns[one].locked() for one in objects if one in turns._turns)


def test_others_wait_for_each_object_and_for_no_longer():
    first, second, free = Thing(), Thing(), Thing()
    with alone(first, second):
        assert others_wait(first) and others_wait(second) and others_wait(free, second) and not others_wait(free)
    assert not others_wait(first, second)


def test_what_a_call_within_a_call_ends_is_its_own(monkeypatch):
    """The outer one still holds what it has, and says so to a third, which would wait for ever but for locks like these."""
    monkeypatch.setattr(turns, "threading", SimpleNamespace(Lock=threading.RLock))
    outer, inner = Thing(), Thing()
    with alone(outer):
        with alone(inner):
            pass
        with pytest.raises(UnsupportedError, match="Thing is in the middle of a call"), alone(outer):
            pass
        with alone(inner):
            pass
    with alone(outer, inner):
        pass


def test_locks_are_taken_in_one_order_however_they_are_named(monkeypatch):
    """Else two threads could wait for each other."""
    first, second = sorted((Thing(), Thing()), key=id)
    taken = []

    @contextmanager
    def lock(name):
        taken.append(name)
        yield

    class Locks:
        def setdefault(self, thing, _):
            return lock("first" if thing is first else "second")

    monkeypatch.setattr(turns, "_turns", Locks())
    for objects in ((first, second), (second, first)):
        with alone(*objects):
            pass
    assert taken == ["first", "second"] * 2


def test_a_call_holds_the_pipeline_and_its_scheduler_and_gets_its_arguments():
    @one_at_a_time
    def call(pipe, *given, **named):
        """What it says."""
        return others_wait(pipe), others_wait(pipe.scheduler), given, named

    pipe = Thing(Thing())
    assert call(pipe, 1, two=2) == (True, True, (1,), {"two": 2}) and call.__doc__ == "What it says."
    assert not others_wait(pipe, pipe.scheduler)
