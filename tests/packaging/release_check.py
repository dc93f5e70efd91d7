"""Checks what a release is made of, as a user gets it: `make release-check` (minutes; not a test of the suite).

sdist and wheel are built and their metadata checked. Each is then installed with [cpu] into an empty environment of the oldest
and the newest Python at hand, and used outside of the checkout: the README's first lines as they stand, beside a copy of the
small model; `lowbit-video doctor`; what `generate` says where there is no model.

    python release_check.py [PYTHON ...]    # other interpreters than the oldest and the newest
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL_MODEL = Path("examples", "small_cogvideox", "model")
OLDEST = (3, 10)
SEARCH = ("~/.pyenv/versions/*/bin", "~/.local/share/uv/python/*/bin", "/opt/python/*/bin", "/usr/local/bin", "/usr/bin")


def run(*command: object, cwd: Path | None = None, status: int = 0) -> str:
    """What a command printed, run without this process's Python settings. SystemExit with it where its status is another."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != status:
        raise SystemExit(f"{done.stdout[-4000:]}\nrelease-check: status {done.returncode}, expected {status}, of: "
                         + " ".join(map(str, command)))
    return done.stdout


def version_of(python: Path) -> tuple[int, ...] | None:
    """Version of an interpreter that this package is for and that can make environments, else None."""
    program = "import ensurepip, sys, venv; print(*sys.version_info[:3])"
    done = subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=False)
    version = tuple(map(int, done.stdout.split())) if done.returncode == 0 else ()
    return version if version >= OLDEST else None


def pythons_at_hand() -> dict[tuple[int, ...], Path]:
    """Interpreters by version, oldest first: of PATH and of the folders where they are usually kept."""
    folders = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    for pattern in SEARCH:
        base = Path(pattern).expanduser()
        folders += base.parent.parent.glob(f"{base.parent.name}/bin") if "*" in pattern else [base]
    found = {}
    for folder in dict.fromkeys(folders):
        for python in sorted(folder.glob("python3.[0-9]*")):
            if re.fullmatch(r"python3\.\d+", python.name) and (version := version_of(python)):
                found.setdefault(version, python)
    return dict(sorted(found.items()))


def build(folder: Path) -> list[Path]:
    """The sdist, and the wheel that is built of it; checked by twine."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    built = sorted(folder.iterdir())
    if [path.suffix for path in built] != [".whl", ".gz"]:
        raise SystemExit(f"release-check: expected one sdist and one wheel, there are {[path.name for path in built]}")
    print(run(sys.executable, "-m", "twine", "check", "--strict", *built).strip(), flush=True)
    return built


def readme_lines() -> str:
    """The first block of the README, as it stands."""
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def use(python: Path, package: Path, folder: Path) -> None:
    """Installs a package into an empty environment and uses it as the README says, from a folder that is no checkout."""
    run(python, "-m", "venv", folder / "env")
    there, work = folder / "env" / "bin", folder / "work"
    run(there / "pip", "install", "-q", f"{package}[cpu]")
    run(there / "pip", "check")
    work.mkdir()
    where = run(there / "python", "-c", "import lowbit_video; print(lowbit_video.__file__)", cwd=work).strip()
    if not Path(where).is_relative_to(folder.resolve()):
        raise SystemExit(f"release-check: imported {where}, not what was installed")
    for command in ("doctor", "kernels"):
        said = run(there / "lowbit-video", command, cwd=work)
        if "reference-lowbit" not in said or "Error" in said:
            raise SystemExit(f"release-check: lowbit-video {command} said:\n{said}")
    said = run(there / "lowbit-video", "generate", cwd=work, status=2)
    if said.count("\n") != 1 or "no --model is given" not in said:
        raise SystemExit(f"release-check: lowbit-video generate without a model said:\n{said}")
    shutil.copytree(ROOT / SMALL_MODEL, work / SMALL_MODEL)
    (work / "readme.py").write_text(readme_lines(), encoding="utf-8")
    said = run(there / "python", "readme.py", cwd=work)
    if not re.search(r"\b([1-9]\d*) of \1 attention modules ran at low bit", said):
        raise SystemExit(f"release-check: the README's lines said:\n{said}")


def main(named: list[str]) -> int:
    at_hand = pythons_at_hand()
    chosen = [Path(python) for python in named] or [at_hand[min(at_hand)], at_hand[max(at_hand)]]
    with tempfile.TemporaryDirectory() as temporary:
        built = build(Path(temporary, "dist"))
        for python in dict.fromkeys(chosen):
            version = ".".join(map(str, version_of(python) or ()))
            if not version:
                raise SystemExit(f"release-check: {python} is no Python >= 3.10 with venv and ensurepip")
            for package in built:
                begin, folder = time.perf_counter(), Path(temporary, "use")
                use(python, package, folder)
                shutil.rmtree(folder)
                print(f"Python {version}, {package.name}: installed and used, {time.perf_counter() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
