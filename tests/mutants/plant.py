"""Plants the faults that are listed beside this file, one at a time, and fails where the named test does not notice.

    make mutants                          # all whose tests need no PyTorch
    make mutants-parity                   # the others, in the environment of `make parity`
    make mutants-some                     # a tenth, another one every day; mutants-parity-some: a twentieth of the others
    make mutants ARGS='--match portable'  # those of whose file, texts or test this is a part

Each worker has a copy of the tree, so the working tree is never touched, and each fault a process, so nothing of an earlier one
stays behind. Without faults the same tests must pass first.
"""
from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from .entry import ROOT, Mutant
from .listed import BESIDE_TORCH, MUTANTS

PARTS = 10
"""`--some` takes one of so many parts, unless it is told of how many."""
LIMIT_S = 240
"""Seconds after which a test counts as failed: a fault may make a loop endless."""
FAILED = 1
"""What pytest returns where a test failed; all else but 0 says that it could not run."""
CRASHED = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE}
"""What a process returns that such a fault ended: a kernel that is interpreted may write anywhere."""
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload([  # what an environment lacks is left out
    "pytest", "pytest_timeout", "ml_dtypes", "paddle", "matplotlib.pyplot", "skimage.metrics", "torch._dynamo",
    "diffusers.models.transformers.transformer_wan"])


def copied(root: Path, folder: Path) -> Path:
    """A copy of a checkout in which `lowbit_video` is whole without being installed."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines():
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)  # for tests that ask which files there are
    for mapped in ("kernels", "pipelines", "eval"):
        (folder / "lowbit_video" / mapped).symlink_to(Path("..") / mapped)
    return folder


def interpreted(test: str) -> bool:
    """Whether a test's kernels run in Triton's interpreter, which is chosen for a whole process."""
    return Path(test.partition("::")[0]).name.startswith("interpreted")


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status and the end of what it says, of tests that run in the copy.

    Each call has a process of its own, forked from one that has imported what is slow to import and is not this project's. But
    Triton's own functions are defined as it is imported: where it interprets, it is imported anew.
    """
    limit_s = LIMIT_S * len(tests)
    with tempfile.NamedTemporaryFile("r") as said:
        process = FRESH.Process(target=_run_pytest, args=(str(folder), list(tests), said.name))
        process.start()
        process.join(limit_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            return FAILED, f"ran longer than {limit_s} s"
        return process.exitcode, said.read()[-3000:]


def _run_pytest(folder: str, tests: list[str], said: str) -> None:
    """What such a process does."""
    file = os.open(said, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    # plug-ins that nothing needs take longer to load than many a test runs
    os.environ.update(PYTHONPATH=folder, PYTHONDONTWRITEBYTECODE="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    arguments = ["-qx", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-p", "pytest_timeout", *tests]
    if interpreted(tests[0]):
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    import pytest

    sys.exit(pytest.main(arguments))


def why_survived(mutant: Mutant, folder: Path) -> str | None:
    """Plants the fault in the copy, runs its test and takes it back; None where the test noticed."""
    path = folder / mutant.file
    source = path.read_text()
    try:
        path.write_text(mutant.planted(source))
        status, said = run_tests(folder, [mutant.test])
    except ValueError as error:
        return str(error)
    finally:
        path.write_text(source)
    if status == FAILED or status in CRASHED:
        return None
    return "survived" if status == 0 else f"the test could not run (pytest returned {status}):\n{said}"


def chosen(mutants: Sequence[Mutant], match: str, some: bool, day: int, parts: int = PARTS) -> list[Mutant]:
    """Those to plant: not equivalent, matching, and of one part of the list where `some` is set, by the day's number."""
    wanted = [mutant for mutant in mutants if not mutant.equivalent and re.search(match, f"{mutant} {mutant.test}")]
    return [mutant for number, mutant in enumerate(wanted) if number % parts == day % parts] if some else wanted


def plant(mutants: Sequence[Mutant], folders: Sequence[Path]) -> dict[Mutant, str]:
    """Why each of those that no test noticed survived; one worker for each copy of the tree."""
    free: SimpleQueue[Path] = SimpleQueue()
    for folder in folders:
        free.put(folder)

    def one(mutant: Mutant) -> str | None:
        folder, begin = free.get(), time.monotonic()
        try:
            reason = why_survived(mutant, folder)
        finally:
            free.put(folder)
        print(f"{'caught' if reason is None else 'SURVIVED':8} {time.monotonic() - begin:5.1f} s  {mutant}", flush=True)
        return reason

    with ThreadPoolExecutor(len(folders)) as pool:
        return {mutant: reason for mutant, reason in zip(mutants, pool.map(one, mutants)) if reason is not None}


def main(arguments: Sequence[str] | None = None, mutants: Sequence[Mutant] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--beside-torch", action="store_true", help="those whose tests need PyTorch and diffusers")
    parser.add_argument("--some", action="store_true", help="a part of them, another one every day")
    parser.add_argument("--parts", type=int, default=PARTS, help=f"how many parts there are (default: {PARTS})")
    parser.add_argument("--day", type=int, default=datetime.date.today().toordinal(), help="the day's number, for --some")
    parser.add_argument("--match", default="", help="a regular expression for a mutant's file, texts or test")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    given = parser.parse_args(arguments)
    if mutants is None:
        mutants = BESIDE_TORCH if given.beside_torch else MUTANTS
    picked = chosen(mutants, given.match, given.some, given.day, given.parts)
    if not picked:
        parser.error(f"no mutant matches {given.match!r}; there are {len(mutants)}")
    with tempfile.TemporaryDirectory() as scratch:
        folders = [copied(root, Path(scratch, str(number))) for number in range(given.jobs)]
        tests = dict.fromkeys(mutant.test for mutant in picked)
        for group in ([t for t in tests if interpreted(t)], [t for t in tests if not interpreted(t)]):
            status, said = run_tests(folders[0], group) if group else (0, "")
            if status:
                print(f"the tests do not pass without any fault, so nothing is proved (pytest returned {status}):\n{said}")
                return 1
        survived = plant(picked, folders)
    print(f"{len(picked) - len(survived)} of {len(picked)} planted faults were noticed")
    for mutant, reason in survived.items():
        print(f"\n{mutant}\n  by {mutant.test}: {reason}")
    return 1 if survived else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything is imported that reads it
    sys.exit(main())
