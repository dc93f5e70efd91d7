"""What every stage of a training needs: arguments, folders, device, deadline, log."""
from __future__ import annotations

import csv
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from models import CONFIGURATIONS
from sampling import Judges

from lowbit_video.files import write_whole


class Log:
    """Prints, and appends rows to `log.csv`, so that a run that breaks leaves its trace. Only one process `speaks`."""

    def __init__(self, state: Path, speaks: bool):
        self.start = time.time()
        self.path = state / "log.csv"
        self.speaks = speaks
        if not speaks:
            return
        fresh = not self.path.exists()
        self.file = open(self.path, "a", newline="")
        self.rows = csv.writer(self.file)
        if fresh:
            self.rows.writerow(["stage", "step", "minutes", "name", "value"])

    def say(self, text: str) -> None:
        if self.speaks:
            print(f"[{time.time() - self.start:6.1f} s] {text}", flush=True)

    def row(self, stage: str, step: int, minutes: float, **values: float) -> None:
        if self.speaks:
            for name, value in values.items():
                self.rows.writerow([stage, step, f"{minutes:.3f}", name, f"{value:.6g}"])
            self.file.flush()


class Run:
    """What every stage needs: arguments, sizes, device, deadline, log."""

    def __init__(self, args, accelerator: Accelerator, judges: Judges):
        self.args = args
        self.accelerator, self.judges = accelerator, judges
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.first = accelerator.is_main_process
        self.state = Path(args.state)
        self.out = Path(args.out)
        for folder in (self.state, self.out):
            folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.state, self.first)
        self.sizes = CONFIGURATIONS[args.config][args.tiny]
        self.device = accelerator.device if torch.cuda.is_available() else torch.device("cpu")
        self.deadline = time.time() + 60 * args.minutes
        self.vae = None
        self.vae_bf16 = True
        self.encoded = {}  # clips by how much smaller they are
        self.ahead, self.word_sets, self.vae_pool = {}, None, None  # what workers prepare meanwhile
        self.writers = []  # threads that write encoded clips

    def left(self) -> float:
        return self.deadline - time.time()

    def own(self, name: str) -> Path:
        """This process's file of that name in the state folder."""
        return self.state / (name if self.first else f"{self.rank}-{name}")

    def autocast(self):
        """bf16 on the GPU, float32 on the CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def vae_autocast(self):
        """For the autoencoder: bf16 on the GPU unless its convolutions were found faster without."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda" and self.vae_bf16)


def save_state(path: Path, content: dict) -> None:
    """All or nothing: a run killed while writing keeps the state before."""
    with write_whole(path) as part:
        torch.save(content, part)


def on_cpu(content):
    """A copy of a state in which every tensor lies on the CPU."""
    if isinstance(content, dict):
        return {key: on_cpu(value) for key, value in content.items()}
    if isinstance(content, list):
        return [on_cpu(value) for value in content]
    return content.detach().to("cpu", copy=True) if isinstance(content, torch.Tensor) else content


def device_name(device) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"
