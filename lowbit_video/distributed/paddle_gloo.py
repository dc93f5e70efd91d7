"""Between CPUs in Paddle: gloo, a process group for each pair of ranks, and a socket beside it.

Paddle's gloo has no all-to-all, counts the transfers of a process to tell them apart (so ranks that did not take part in the
same ones miss each other for ever), and gives up after 30 seconds of waiting. A group of two counts alike on both sides, and
the socket lets both arrive before gloo starts, says at once when the other one is gone, and has a timeout of our own.
"""
from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

import paddle
import paddle.distributed as dist
from paddle.base import core

from .wire import TIMEOUT, Done, Work, timeout

HEAD_START = 0.2
"""Seconds that the lower rank of a pair has for its store to listen; missed, Paddle tries again after three."""
FIRST_GROUP = 1000
"""Numbers of the pairs' process groups, above those that anyone else makes."""


class GlooWire:
    """A `Wire` of CPUs. What passes between a pair passes in the same order on both sides."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        sockets = _connect_all(self.rank, self.size)
        self.pairs = {other: Pair(self.rank, other, self.size, sockets[other]) for other in sorted(sockets)}

    def exchange(self, sent: paddle.Tensor, sent_bytes: Sequence[int], received: paddle.Tensor, received_bytes: Sequence[int]
                 ) -> Work:
        """See `Wire.exchange`. Pairs meet in one order everywhere, so nobody waits in a circle; the lower rank sends first."""
        begins = [[sum(sizes[:number]) for number in range(self.size)] for sizes in (sent_bytes, received_bytes)]
        outgoing = [sent[begin:begin + size] for begin, size in zip(begins[0], sent_bytes)]
        incoming = [received[begin:begin + size] for begin, size in zip(begins[1], received_bytes)]
        for low in range(self.size):
            for high in range(low + 1, self.size):
                if self.rank in (low, high):
                    other = low + high - self.rank
                    for sends in (self.rank == low, self.rank == high):
                        if sends and sent_bytes[other]:
                            self.pairs[other].send(outgoing[other])
                        elif not sends and received_bytes[other]:
                            self.pairs[other].receive(incoming[other])
        return Done()

    def send(self, tensor: paddle.Tensor, to: int) -> Work:
        """See `Wire.send`; returns when the other one has taken it."""
        self.pairs[to].send(tensor.reshape([-1]).view("uint8"))
        return Done()

    def receive(self, tensor: paddle.Tensor, source: int) -> Work:
        """See `Wire.receive`; returns when it is there."""
        self.pairs[source].receive(tensor.reshape([-1]).view("uint8"))
        return Done()

    def barrier(self) -> None:
        """See `Wire.barrier`."""
        for low in range(self.size):
            for high in range(low + 1, self.size):
                if self.rank in (low, high):
                    self.pairs[low + high - self.rank].meet()
        if self.size > 2:  # the last one to arrive may have met the others before some of them met each other
            for other in sorted(self.pairs):
                self.pairs[other].meet()


class Pair:
    """This rank and another one."""

    def __init__(self, rank: int, other: int, size: int, connection: socket.socket) -> None:
        self.other, self.connection, self.peer = other, connection, int(other > rank)
        connection.settimeout(timeout())
        low, high = sorted((rank, other))
        if rank == low:
            host, port = connection.getsockname()[0], _free_port()
            connection.sendall(port.to_bytes(4, "big"))
        else:
            host, port = connection.getpeername()[0], int.from_bytes(_take(connection, 4), "big")
            time.sleep(HEAD_START)
        self.store = core.TCPStore(host, port, rank == low, 2, int(timeout()))
        self.group = core.ProcessGroupGloo.create(self.store, int(rank == high), 2, FIRST_GROUP + low * size + high)

    def meet(self) -> None:
        """Returns when the other one is here too. Raises RuntimeError that names it if it is gone or does not come."""
        try:
            self.connection.sendall(b"1")
            arrived = self.connection.recv(1)
        except TimeoutError:
            raise RuntimeError(f"rank {self.other} does not answer: it has not come to where this rank waits for it within "
                               f"{timeout():g} s ({TIMEOUT} sets another time)") from None
        except OSError as error:
            raise RuntimeError(f"rank {self.other} is gone ({error}); its own output says why") from None
        if not arrived:
            raise RuntimeError(f"rank {self.other} is gone; its own output says why")

    def send(self, flat: paddle.Tensor) -> None:
        """uint8 [bytes] to the other one."""
        self.meet()
        self.group.send(flat, self.peer, True).wait()

    def receive(self, flat: paddle.Tensor) -> None:
        """Into uint8 [bytes]."""
        self.meet()
        self.group.recv(flat, self.peer, True).wait()


def _connect_all(rank: int, size: int) -> dict[int, socket.socket]:
    """A socket to every other rank: the higher one of a pair connects to the lower."""
    hosts = [endpoint.rpartition(":")[0] for endpoint in os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")]
    with socket.create_server(("", 0), backlog=size) as server:
        server.settimeout(timeout())
        ports: list[paddle.Tensor] = []
        dist.all_gather(ports, paddle.to_tensor([server.getsockname()[1]], dtype="int64"))
        sockets = {}
        for low in range(rank):
            sockets[low] = socket.create_connection((hosts[low], int(ports[low])), timeout=timeout())
            sockets[low].sendall(rank.to_bytes(4, "big"))
        for _ in range(rank + 1, size):
            connection, _ = server.accept()
            sockets[int.from_bytes(_take(connection, 4), "big")] = connection
    for connection in sockets.values():
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sockets


def _take(connection: socket.socket, count: int) -> bytes:
    taken = b""
    while len(taken) < count:
        more = connection.recv(count - len(taken))
        if not more:
            raise RuntimeError("a rank closed its connection while the ranks were finding each other")
        taken += more
    return taken


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
