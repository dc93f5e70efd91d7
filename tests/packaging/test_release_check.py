"""What `make release-check` finds and refuses, without building or installing anything."""
import importlib.util
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("release_check", Path(__file__).with_name("release_check.py"))
release_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release_check)


def interpreter(folder, name, version):
    """A stand-in for an interpreter that says its version, or (None) has no venv."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{f'echo {version}' if version else 'exit 1'}\n")
    path.chmod(0o755)
    return path


def test_interpreters_at_hand_are_listed_oldest_first(tmp_path, monkeypatch):
    made = [interpreter(tmp_path / "a", name, version) for name, version in (
        ("python3.9", "3 9 18"), ("python3.13", "3 13 0"), ("python3.10", "3 10 13"), ("python3.12", None),
        ("python3.11-config", "3 11 2"))]
    shadowed = interpreter(tmp_path / "b", "python3.13", "3 13 0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    monkeypatch.setattr(release_check, "SEARCH", (str(tmp_path / "versions" / "*" / "bin"),))
    assert release_check.pythons_at_hand() == {(3, 10, 13): made[2], (3, 13, 0): made[1]} and shadowed.exists()
    (tmp_path / "versions" / "3.14.1").mkdir(parents=True)
    newest = interpreter(tmp_path / "versions" / "3.14.1" / "bin", "python3.14", "3 14 1")
    assert list(release_check.pythons_at_hand().items())[-1] == ((3, 14, 1), newest)
    assert release_check.version_of(Path(sys.executable)) == sys.version_info[:3]


def test_a_command_that_ends_otherwise_than_expected_ends_the_check():
    say = "import sys; print('said'); sys.exit({})"
    assert release_check.run(sys.executable, "-c", say.format(2), status=2) == "said\n"
    for status, wanted in ((1, 0), (0, 2)):
        with pytest.raises(SystemExit, match=f"said(.|\n)*status {status}, expected {wanted}, of: "):
            release_check.run(sys.executable, "-c", say.format(status), status=wanted)


def test_this_processs_packages_do_not_reach_what_is_checked(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    monkeypatch.setenv("KEPT", "1")
    said = release_check.run(sys.executable, "-c", "import os, sys; print(os.environ['KEPT'], '/somewhere/else' in sys.path)")
    assert said == "1 False\n"


def test_the_lines_are_the_readmes_first(tmp_path):
    lines = release_check.readme_lines()
    assert lines.startswith("from lowbit_video import") and "print(coverage(pipe))" in lines and "```" not in lines
    assert str(release_check.SMALL_MODEL) in lines
    compile(lines, "README.md", "exec")


SAID = {"-c": "{folder}/env/lib/lowbit_video/__init__.py", "doctor": "reference-lowbit runs", "kernels": "reference-lowbit",
        "generate": "lowbit-video: error: no --model is given\n", "readme.py": "8 of 8 attention modules ran at low bit"}


@pytest.mark.parametrize("command, said", [
    (None, None), ("-c", "/work/checkout/lowbit_video/__init__.py"), ("doctor", "reference-lowbit TypeError: x"),
    ("kernels", "no kernels"), ("generate", "Traceback\nno --model is given\n"), ("generate", "error: no such folder\n"),
    ("readme.py", "7 of 8 attention modules ran at low bit"), ("readme.py", "18 of 8 attention modules ran at low bit"),
    ("readme.py", "0 of 0 attention modules ran at low bit")])
def test_a_use_passes_only_where_every_step_said_what_it_should(tmp_path, monkeypatch, command, said):
    def run(*words, cwd=None, status=0):
        assert status == (2 if words[1] == "generate" else 0)
        if words[1] == "readme.py":
            assert (cwd / release_check.SMALL_MODEL / "model_index.json").is_file()
        found = said if words[1] == command else SAID.get(words[1], "")
        return found.replace("{folder}", str(tmp_path.resolve()))

    monkeypatch.setattr(release_check, "run", run)
    if command is None:
        release_check.use(Path("python"), Path("a.whl"), tmp_path)
    else:
        with pytest.raises(SystemExit, match="release-check: "):
            release_check.use(Path("python"), Path("a.whl"), tmp_path)
