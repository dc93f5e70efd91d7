"""A job on several ranks: what the launcher says, what all ranks wait for, what is said of them."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..distributed.parallelize import Parallel, parallelize
from ..distributed.watch import WatchedWire, process_wire, report_failure
from ..runtime.detect import anchor
from .job import Job

DEGREES = ("ulysses", "ring", "cfg", "vae")


def launched() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM") or 1)


def is_first() -> bool:
    """Whether this process is rank 0, which writes and prints."""
    return launched() == 1 or os.environ.get("PADDLE_TRAINER_ID", "0") == "0"


def check_launched(job: Job) -> None:
    """Raises ValueError where the job asks for several ranks and one process runs; says how to launch them."""
    defaults = {field.name: field.default for field in fields(Job)}
    given = [f"--{name.replace('_', '-')} {getattr(job, name)}" for name in (*(f"{n}_degree" for n in DEGREES), "exchange",
             "exchange_output") if getattr(job, name) != defaults[name] and getattr(job, name) != 1]
    if given and launched() == 1:
        ranks = (job.ulysses_degree or 1) * (job.ring_degree or 1) * (job.cfg_degree or 1)
        ranks = max(ranks, job.vae_degree or 1, 2)
        devices = ",".join(map(str, range(ranks)))
        raise ValueError(
            f"{' '.join(given)} shares the work of several processes, and one runs; launch them: python -m "
            f"paddle.distributed.launch --devices {devices} examples/cogvideo.py {' '.join(given)} ... (GPUs), or with "
            f"--nproc_per_node {ranks} in place of --devices {devices} (CPU)")


@contextlib.contextmanager
def connected(device: str) -> Iterator[WatchedWire | None]:
    """The wire to the other ranks, None without a launcher; an error in the block ends all of them."""
    if launched() == 1:
        yield None
        return
    wire = process_wire(anchor("paddle", device))
    try:
        yield wire
    except BaseException as error:
        report_failure(error)
        raise


def share(pipe: Any, job: Job, wire: WatchedWire) -> Parallel:
    """Shares the pipeline's work among the ranks as the job says; a job without guidance has no halves of it to share."""
    cfg = job.cfg_degree
    if cfg is None and job.guidance is not None and job.guidance <= 1:
        cfg = 1
    return parallelize(pipe, job.ulysses_degree, job.ring_degree, cfg, job.vae_degree, job.exchange, job.exchange_output, wire)


def make_once(folder: Path, make: Callable[[Path], None], wire: WatchedWire | None) -> None:
    """`make(folder)` by rank 0, and then by the first rank of each host that does not see it."""
    if is_first():
        make(folder)
    if wire is None:
        return
    wire.barrier()
    if os.environ.get("PADDLE_LOCAL_RANK", "0") == "0" and not (folder / "model_index.json").is_file():
        make(folder)
    wire.barrier()


def describe(report: dict[str, Any]) -> str:
    """A few lines about the ranks for a person. report: of `Parallel.report`."""
    degrees = ", ".join(f"{name} {degree}" for name, degree in report["degrees"].items() if degree > 1) or "nothing shared"
    lines = [f"{report['ranks']} ranks: {degrees}; on {', '.join(report['devices'])}"]
    for rank, traffic in enumerate(report["traffic"]):
        parts = ", ".join(f"{purpose} {_mib(count)}" for purpose, count in traffic["sent"].items())
        whole = f"in 16 bits {_mib(traffic['in_16_bit_total'])} MiB"
        lines.append(f"rank {rank} sent {_mib(traffic['sent_total'])} MiB ({parts}); {whole}")
    for rank, runs in report["coverage_differs"].items():
        lines.append(f"rank {rank} ran other attention than rank 0: {runs}")
    if not report["coverage_differs"]:
        lines.append("attention ran alike on every rank")
    return "\n".join(lines)


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f}"
