"""Several ranks for a test: as threads of this process, as processes that meet by gloo, or as those that a launcher starts."""
import json
import multiprocessing
import os
import queue
import runpy
import socket
import subprocess
import sys
import threading
import time


class ThreadWire:
    """One rank's end of a `Wire` whose ranks are threads of this process; transfers are done when they return.

    rendezvous: whether `send` returns only when the other one has taken it.
    """

    def __init__(self, rank, boxes, barrier, patience, rendezvous):
        self.rank, self.size = rank, len(boxes)
        self._boxes, self._barrier, self._patience, self._rendezvous = boxes, barrier, patience, rendezvous

    def exchange(self, sent, sent_bytes, received, received_bytes):
        begin = 0
        for to, length in enumerate(sent_bytes):
            if length:
                self._put(sent[begin:begin + length], to)
            begin += length
        assert begin == sent.shape[0], "the pieces do not make up what is sent"
        begin = 0
        for source, length in enumerate(received_bytes):
            if length:
                self._take(received[begin:begin + length], source)
            begin += length
        assert begin == received.shape[0], "the pieces do not make up what is received"
        return Finished()

    def send(self, tensor, to):
        assert is_whole(tensor), "what is sent must be contiguous and begin where its memory does"
        taken = self._put(tensor, to)
        if self._rendezvous and not taken.wait(self._patience):
            raise TimeoutError(f"rank {to} has not taken what rank {self.rank} sends it")
        return Finished()

    def receive(self, tensor, source):
        assert is_whole(tensor), "what is received must be contiguous and begin where its memory does"
        self._take(tensor, source)
        return Finished()

    def barrier(self):
        self._barrier.wait(self._patience)

    def _put(self, tensor, to):
        taken = threading.Event()
        self._boxes[to][self.rank].put((tensor.clone(), taken))
        return taken

    def _take(self, tensor, source):
        arrived, taken = self._boxes[self.rank][source].get(timeout=self._patience)
        assert (arrived.shape, arrived.dtype) == (tensor.shape, tensor.dtype), "what is sent is not what is awaited"
        tensor[:] = arrived
        taken.set()


def is_whole(tensor):
    return tensor.is_contiguous() and tensor.offset == 0


class Finished:
    def wait(self):
        pass


def run_threads(size, work, patience=60, rendezvous=False):
    """[work(wire) of each rank]; the first rank's error is raised."""
    boxes = [[queue.Queue() for _ in range(size)] for _ in range(size)]
    barrier = threading.Barrier(size)
    results, errors = [None] * size, []

    def one(rank):
        try:
            results[rank] = work(ThreadWire(rank, boxes, barrier, patience, rendezvous))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        late = queue.Empty, TimeoutError, threading.BrokenBarrierError
        raise next((e for e in errors if not isinstance(e, late)), errors[0])
    for row in boxes:
        assert all(box.empty() for box in row), "something was sent that nobody took"
    return results


def launch_torch(script, ranks, folder, *arguments, timeout=240):
    """Runs a script on `ranks` processes by torchrun; what each rank wrote as JSON to $RANK_OUT/<rank>.json.

    Raises AssertionError with the output unless the status is 0.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), str(script),
               *map(str, arguments)]
    done = subprocess.run(command, env=_environment(folder), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return [json.load(open(os.path.join(folder, f"{rank}.json"))) for rank in range(ranks)]


def _environment(folder):
    """Of a launcher: one thread a rank, this tree first, and where ranks write."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = [root, os.path.join(root, "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "RANK_OUT": str(folder), "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "OMP_NUM_THREADS": "1"}


def launch(script, ranks, folder, *arguments, timeout=240, environment=None, check=True):
    """Runs a script on `ranks` processes by paddle.distributed.launch.

    Returns (exit status, output of the launcher and of each rank, what each rank wrote as JSON to $RANK_OUT/<rank>.json).
    check: raise AssertionError with the logs unless the status is 0.
    """
    folder = str(folder)
    variables = {**_environment(folder), **(environment or {})}
    variables.pop("CUDA_VISIBLE_DEVICES", None)  # Paddle's launcher fails on an empty one
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(ranks), "--log_dir",
               os.path.join(folder, "log"), str(script), *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout)
    logs, written = [done.stdout + done.stderr], []
    for rank in range(ranks):
        log = os.path.join(folder, "log", f"workerlog.{rank}")
        logs.append(open(log).read() if os.path.exists(log) else "")
        out = os.path.join(folder, f"{rank}.json")
        written.append(json.load(open(out)) if os.path.exists(out) else None)
    assert not check or done.returncode == 0, "\n".join(text[-3000:] for text in logs)
    return done.returncode, logs, written


FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["paddle"])


def run_processes(script, ranks, folder, timeout=240, environment=None):
    """Runs a script on `ranks` processes with what `paddle.distributed.launch` tells its own: for tests of what ranks do.

    All are forked from one process that has imported Paddle, which takes longer than many a script.
    Returns (output of each rank, what each rank wrote as JSON to $RANK_OUT/<rank>.json); raises AssertionError with the
    outputs unless every status is 0.
    """
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(ranks + 1)]
    master, *own = [f"127.0.0.1:{server.getsockname()[1]}" for server in servers]
    for server in servers:
        server.close()
    logs = [os.path.join(folder, f"rank{rank}.log") for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        variables = {**_environment(folder), **(environment or {}), "PADDLE_MASTER": master, "PADDLE_TRAINER_ID": str(rank),
                     "PADDLE_TRAINERS_NUM": str(ranks), "PADDLE_RANK_IN_NODE": str(rank), "PADDLE_DISTRI_BACKEND": "gloo",
                     "PADDLE_CURRENT_ENDPOINT": own[rank], "PADDLE_TRAINER_ENDPOINTS": ",".join(own)}
        processes.append(FORKED.Process(target=_run_rank, args=(str(script), variables, log)))
        processes[-1].start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        process.kill()
        process.join()
    outputs = [open(log).read() for log in logs]
    assert not any(process.exitcode for process in processes), "\n".join(text[-3000:] for text in outputs)
    written = [os.path.join(folder, f"{rank}.json") for rank in range(ranks)]
    return outputs, [json.load(open(path)) if os.path.exists(path) else None for path in written]


def _run_rank(script, variables, log):
    """What such a process does."""
    os.environ.update(variables)
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    runpy.run_path(script, run_name="__main__")
