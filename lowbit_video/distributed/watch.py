"""`Watch`: a thread of every rank that knows how the others are: one that fails or does not answer is named, and ends all.

The thread does it because the rest of a process may be waiting for another rank where no signal and no exception reaches it
(a GPU's stream, a collective). Rank 0's thread hears from all others by sockets of their own and passes on what matters.
"""
from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, NoReturn

from ..runtime.detect import runtime_of
from ..runtime.protocol import Runtime
from .agree import values_of
from .group import Group
from .wire import TIMEOUT, Wire, Work, timeout

BEAT_S = 0.5
"""Between two looks at the others."""
GRACE_S = 1.0
"""For which a rank that hears of a failure may come to fail by itself, with a message of its own."""
UNWIND_S = 5.0
"""For which it may then close files and end by itself."""


@dataclass
class State:
    """What is known of a rank. count: exchanges begun. inside: whether it waits in one. left: whether it said goodbye."""

    count: int = 0
    inside: int = 0
    left: bool = False


class WatchedWire:
    """A `Wire` that counts what passes for a `Watch`."""

    def __init__(self, wire: Wire) -> None:
        self.wire, self.rank, self.size = wire, wire.rank, wire.size
        self.state = State()

    def exchange(self, *arguments: Any) -> Work:
        """See `Wire.exchange`."""
        return self._counted(self.wire.exchange, *arguments)

    def send(self, *arguments: Any) -> Work:
        """See `Wire.send`."""
        return self._counted(self.wire.send, *arguments)

    def receive(self, *arguments: Any) -> Work:
        """See `Wire.receive`."""
        return self._counted(self.wire.receive, *arguments)

    def barrier(self) -> None:
        """See `Wire.barrier`."""
        self._counted(self.wire.barrier)

    def __enter__(self) -> None:
        """Within this block the host waits for what was exchanged."""
        self.state.inside += 1

    def __exit__(self, *exception: object) -> None:
        self.state.inside -= 1

    def _counted(self, transfer: Callable, *arguments: Any) -> Any:
        self.state.count += 1
        with self:
            return transfer(*arguments)


class Watch:
    """Watches over the ranks of a wire from now on; one a process.

    wire: counts what passes. like: a tensor on the device that exchanges. runtime: of its framework.
    failure: None, or what is known of the rank that failed first.
    """

    def __init__(self, wire: WatchedWire, like: Any, runtime: Runtime) -> None:
        self.wire, self.rank = wire, wire.rank
        self.failure: str | None = None
        self._ending, self._said = False, False  # whether this rank ends by itself; whether the other's failure was printed
        self._lock, self._known = threading.Lock(), threading.Event()
        self._counts: list[int] = []
        self._moved = time.monotonic()
        self._states = {rank: State() for rank in range(wire.size)}
        self._states[self.rank] = wire.state
        self._connections: dict[Connection, int] = {}
        key = secrets.token_bytes(16)
        listener = Listener(("", 0), backlog=wire.size, authkey=key) if self.rank == 0 else None
        offer = [listener.address[1], key.hex()] if listener else None
        port, key_text = values_of(offer, Group(wire, range(wire.size)), like, runtime)[0]
        if listener is None:
            hub = Client((_first_host(), port), authkey=bytes.fromhex(key_text))
            hub.send_bytes(json.dumps(self.rank).encode())
            self._connections[hub] = 0
        self._signals = _signals_as_bytes()
        self._hook, sys.excepthook = sys.excepthook, self._on_exception
        atexit.register(self.goodbye)
        threading.Thread(target=self._run, args=(listener,), daemon=True, name="lowbit_video watch").start()

    # ---------------------------------------------------------------------------------------------------- this rank's own end

    def failed(self, error: BaseException) -> None:
        """Tells the others, who end too. Where one of them failed first, says so and ends this process."""
        if isinstance(error, RuntimeError):  # perhaps only "rank 2 is gone": its own reason is on its way by the other sockets
            self._known.wait(GRACE_S)
        self._ending = True
        mine = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        if self.failure is None:
            self._send_all({"end": f"rank {self.rank} failed: {mine}"})
        elif not self.failure.endswith(mine):  # with the same words it failed by itself
            self._say()
            leave(1)

    def goodbye(self) -> None:
        """This rank needs the others no longer, and they need not ask after it."""
        if not self._ending:
            self._ending = True
            self._send_all({"left": True})

    def _on_exception(self, kind: type, error: BaseException, trace: Any) -> None:
        self.failed(error)
        self._hook(kind, error, trace)
        leave(130 if kind is KeyboardInterrupt else 1)

    # ------------------------------------------------------------------------------------------------------------- the thread

    def _run(self, listener: Listener | None) -> None:
        while listener is not None and len(self._connections) < self.wire.size - 1:
            try:
                connection = listener.accept()
                self._connections[connection] = json.loads(connection.recv_bytes())
            except (AuthenticationError, EOFError, OSError):
                pass  # somebody else's connection
        heard = due = time.monotonic()
        while self._connections:
            if (now := time.monotonic()) >= due:  # not for each message: the others would answer it at once, and so on
                self._send_all({"count": self.wire.state.count, "inside": self.wire.state.inside})
                due = now + BEAT_S
            for ready in wait([*self._connections, self._signals], max(due - now, 0)):
                if ready is self._signals:
                    if signal.SIGTERM in self._signals.recv(64):
                        self._unwind(128 + signal.SIGTERM)
                else:
                    heard = time.monotonic()
                    self._hear(ready)
            if self.rank == 0:
                self._look_for_stalled()
            elif time.monotonic() - heard > timeout() and not self._states[0].left:
                self._end(f"rank 0 does not answer: nothing was heard from it for {timeout():g} s")

    def _hear(self, connection: Connection) -> None:
        rank = self._connections[connection]
        state = self._states[rank]
        try:
            message = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            del self._connections[connection]
            if not state.left:
                self._end(f"rank {rank} is gone without a word; its own output may say why")
            return
        if "end" in message:
            self._end(message["end"])
        state.left = state.left or "left" in message
        state.count, state.inside = message.get("count", state.count), message.get("inside", 0)

    def _look_for_stalled(self) -> None:
        now, counts = time.monotonic(), [state.count for state in self._states.values()]
        if counts != self._counts:
            self._counts, self._moved = counts, now
        if now - self._moved >= timeout():
            text = stalled(self._states)
            if text is not None:
                self._end(f"{text}, for {timeout():g} s now ({TIMEOUT} sets another time)")

    def _end(self, text: str) -> None:
        """Another rank failed: passes it on, lets this rank come to an end by itself, and else ends it."""
        if self.failure is not None or self._ending:
            return
        self.failure = text
        self._known.set()
        if self.rank == 0:
            self._send_all({"end": text})
        time.sleep(GRACE_S)
        if not self._ending:
            self._say()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # it may be waiting on a socket
        self._unwind(1)

    def _unwind(self, status: int) -> NoReturn:
        time.sleep(UNWIND_S)
        self._say()
        leave(status)

    def _say(self) -> None:
        if self.failure is not None and not self._said:
            self._said = True
            print(self.failure, file=sys.stderr, flush=True)

    def _send_all(self, message: dict) -> None:
        with self._lock:
            for connection in list(self._connections):
                with contextlib.suppress(OSError):  # it is gone; reading from it says so
                    connection.send_bytes(json.dumps(message).encode())


def stalled(states: dict[int, State]) -> str | None:
    """Which rank others wait for, where nothing moves anywhere: one that is in no exchange, or else in the earliest.

    None where nobody waits: ranks may compute, or be idle, for as long as they like.
    """
    waiting = [rank for rank, state in states.items() if state.inside]
    if not waiting:
        return None
    count_of = lambda rank: states[rank].count
    rank = min([rank for rank in states if rank not in waiting] or waiting, key=count_of)
    other = max(waiting, key=count_of)
    what = "has ended" if states[rank].left else "does not answer"
    return (f"rank {rank} {what}: it stopped after exchange {count_of(rank)} while rank {other} waits in exchange "
            f"{count_of(other)}")


def _first_host() -> str:
    """Where rank 0 runs, as the launcher says."""
    first = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")[0].rpartition(":")[0]
    return first or os.environ.get("MASTER_ADDR") or "127.0.0.1"


def _signals_as_bytes() -> socket.socket:
    """A socket on which each signal arrives as a byte; SIGTERM, by which launchers end their ranks, is as Ctrl-C, once."""
    ours, theirs = socket.socketpair()
    if threading.current_thread() is threading.main_thread():
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, _interrupt)
    return ours


def _interrupt(number: int, frame: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it again, into the closing of files
    raise KeyboardInterrupt


_watch: Watch | None = None


def process_wire(like: Any) -> WatchedWire:
    """The wire of this process, watched; made when first asked for. like: a tensor on the device that exchanges.

    Raises RuntimeError where no other process was launched.
    """
    global _watch
    if _watch is None:
        runtime = runtime_of(like)
        module = importlib.import_module(f".{runtime.NAME}_wire", __package__)
        wire = WatchedWire(module.TorchWire() if runtime.NAME == "torch" else module.paddle_wire())
        if runtime.NAME == "paddle" and runtime.is_cpu(like) != (type(wire.wire).__name__ == "GlooWire"):
            raise RuntimeError(f"the tensors are on {runtime.place(like)}, and the launcher chose the "
                               f"{type(wire.wire).__name__} for other devices; launch CPU ranks with --nproc_per_node N and "
                               "PADDLE_DISTRI_BACKEND=gloo, GPU ranks with --devices 0,1")
        _watch = Watch(wire, like, runtime)
    return _watch.wire


def report_failure(error: BaseException) -> None:
    """Tells the other ranks, if there are any, that this one fails; see `Watch.failed`."""
    if _watch is not None:
        _watch.failed(error)


def end_process(status: int) -> None:
    """Ends a process that is one of several ranks here and now; does nothing in another.

    At a normal exit Paddle takes its communicators down after the device is gone, and some devices do not survive it.
    """
    if _watch is not None:
        _watch.goodbye()
        leave(status)


def leave(status: int) -> NoReturn:
    """Ends this process with nothing but its output written."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
